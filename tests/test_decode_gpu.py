"""Attention of new tokens over sharded keys with the GPU's kernels, whole shards and parts of them."""

import pytest
import torch

from seqpar_attn import LoopbackGroup, ShardedKV, get_layout, kernels
from seqpar_attn.mask import Mask
from seqpar_attn.testing.errors import assert_error_rule
from seqpar_attn.testing.truth import attention

pytestmark = pytest.mark.gpu
PROMPT, NEW = 9001, 5


def decoded(x, backend, world_size, steps, **options):
    q, k, v = x
    layout = get_layout("zigzag", world_size)
    kv = ShardedKV(PROMPT, group=LoopbackGroup(world_size), reserve=NEW)
    padding = (0, 0, 0, 0, 0, -PROMPT % layout.multiple)
    shards = (layout.shard_all(torch.nn.functional.pad(y[:, :PROMPT], padding)) for y in (k, v))
    kv.store(*shards, window_size=options.get("window_size"))
    outs, at = [], PROMPT
    for s in steps:
        new = slice(at, at + s)
        outs.append(kv.attend(q[:, new], k[:, new], v[:, new], backend=backend, **options)[0])
        at += s
    return torch.cat(outs, 1)


@pytest.mark.parametrize("options", [{}, {"window_size": 3000}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton", "aten"])
@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 4, 64), (5, 1, 96)], ids=str)
def test_as_the_reference(heads, backend, options):
    """The rounding of ``out`` to bfloat16 is most of any error here."""
    if backend == "aten" and "softcap" in options:
        pytest.skip("not supported")
    if kernels.unavailable("reference" if backend == "auto" else backend) is not None:
        pytest.skip("not available")
    generator = torch.Generator("cuda").manual_seed(1)
    nheads, nheads_kv, headdim = heads
    shapes = [(1, PROMPT + NEW, n, headdim) for n in (nheads, nheads_kv, nheads_kv)]
    x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for shape in shapes]
    mask = Mask(PROMPT + NEW, window_size=options.get("window_size"))
    truth = attention(*(y.double() for y in x), mask, softcap=options.get("softcap"))[0][:, PROMPT:]
    baseline = decoded(x, "reference", 1, [1] * NEW, **options)
    # torch's kernels round each shard's out to bfloat16 before the shards are merged and rounded again: of equal thirds
    # that makes sqrt(1 + 1/3) of one rounding's error.
    factor = 1.25 if backend == "aten" else 1.1
    one_by_one = decoded(x, backend, 3, [1] * NEW, **options)
    assert_error_rule(one_by_one, truth, baseline, factor=factor, worst_factor=2.0 if backend == "aten" else 1.5)
    if backend != "aten":  # which knows no intervals
        assert_error_rule(decoded(x, backend, 3, [2, 3], **options), truth, baseline, worst_factor=1.5)
