"""Offloading on a GPU: the copies are in order, and memory is let go of."""

import gc

import pytest
import torch
from memory_model import Decoder, gradients

import seqpar_attn
from seqpar_attn import memory

pytestmark = pytest.mark.gpu
TOKENS = 1 << 15
NUMBER = TOKENS * 32 * 2
"""Bytes of a block's input, and of its attention's output."""


def build():
    torch.manual_seed(0)
    return Decoder(seqpar_attn.LoopbackGroup(2), backend="triton", deterministic=True).cuda().bfloat16()


@pytest.fixture
def ids():
    return torch.randint(50, (1, TOKENS), device="cuda")


@pytest.mark.parametrize("tile_mlp", [None, 5000])
@pytest.mark.parametrize("policy", [("save", "keep"), ("save", "offload"), ("offload", "keep"), ("offload", "offload")])
def test_the_same_bits(ids, policy, tile_mlp):
    """The sums have a fixed order, so nothing may differ, but for the embedding's, which torch adds by atomics; with
    tiles, those of the MLPs' weights have another one."""
    model = build()
    expected = gradients(model, ids)
    applied = memory.apply(model, attention=policy[0], activations=policy[1], tile_mlp=tile_mlp)
    for _ in range(3):
        for name, x in gradients(model, ids).items():
            if tile_mlp is None and name != "embed.weight":
                assert torch.equal(x, expected[name]), name
            else:
                torch.testing.assert_close(x, expected[name], rtol=3e-2, atol=3e-2 * expected[name].abs().max().item())
    gc.collect()
    applied.remove()


@pytest.mark.parametrize(
    "options", [{"head_groups": 2}, {"checkpoint_every": 2, "keep_last": 1}], ids=["heads", "every"]
)
def test_blocks_in_stages(ids, options):
    """Delta instead of out, heads in turn, and inputs that come back or are computed again, on their streams."""
    model = build()
    expected = gradients(model, ids)
    applied = memory.apply(model, attention="recompute", activations="offload", tile_block=5000, **options)
    for _ in range(3):
        for name, x in gradients(model, ids).items():
            torch.testing.assert_close(x, expected[name], rtol=3e-2, atol=3e-2 * expected[name].abs().max().item())
    gc.collect()
    applied.remove()


def requested():
    """Bytes of tensors, without what blocks of the allocator have besides, which depends on what was there before."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def held(policy):
    """Bytes that a forward leaves on the device, without what the head keeps."""
    model = build()
    ids = torch.randint(50, (1, TOKENS), device="cuda")
    gradients(model, ids)  # takes cuBLAS' workspace, and compiles
    model.zero_grad()
    memory.apply(model, **policy)
    gc.collect()
    torch.cuda.synchronize()
    before = requested()
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden)
    torch.cuda.synchronize()
    found = requested() - before
    del hidden
    return found


def test_memory_is_let_go_of():
    """Four blocks: of those offloaded, the last two are on the device."""
    small = 0.3 * NUMBER  # lse
    assert abs(held({"attention": "save"}) - 9 * NUMBER) < 4 * small  # inputs, attention's outputs, the last output
    assert abs(held({"attention": "offload"}) - 7 * NUMBER) < 4 * small
    assert abs(held({"attention": "offload", "activations": "offload"}) - 5 * NUMBER) < 4 * small
    assert abs(held({"attention": "recompute", "activations": "offload"}) - 3 * NUMBER) < 4 * small
