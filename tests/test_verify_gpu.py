"""verify with the kernels that GPUs get by themselves: what is right passes, what is wrong does not."""

import pytest
import torch

pytest.importorskip("transformers")
from hf_models import build

import seqpar_attn
from seqpar_attn import LoopbackGroup, memory
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.integrations.verify import VerificationError

pytestmark = pytest.mark.gpu
GROUP = LoopbackGroup(4)


def prepared(**arguments):
    model = build("llama").to("cuda", torch.bfloat16)
    enable(model, GROUP, **arguments)
    return model


def tokens():
    return torch.randint(3, 61, (2, 512), generator=torch.Generator().manual_seed(3)).cuda()


@pytest.mark.parametrize("method", ["ring", "dist_flash", "ulysses"])
def test_right_models_pass(method):
    model = prepared(method=method)
    memory.apply(model, activations="offload")
    report = seqpar_attn.verify(model, tokens(), GROUP)
    assert report.ok and report.first_module is None


def test_attention_that_was_not_replaced_is_named():
    model = prepared()
    model.set_attn_implementation("sdpa")
    with pytest.raises((VerificationError, ValueError), match="attention"):
        seqpar_attn.verify(model, tokens(), GROUP)
