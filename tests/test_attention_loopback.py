"""The public functions on virtual ranks against float64 single-device attention."""

import pytest
import torch
from attention_cases import MASKS, METHODS, Method, check_error_rule, check_exact, make_inputs, run, truth

import seqpar_attn
from seqpar_attn import LoopbackGroup

ids = dict(ids=lambda x: getattr(x, "name", str(x)))
ZIGZAG, DIST_FLASH, ZIGZAG_BY_2 = METHODS[0], METHODS[7], METHODS[10]


SIZES = [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "world_size,method", [(n, m) for n in SIZES for m in METHODS if m.hosts == 1 or n % m.hosts == 0], **ids
)
def test_equals_one_device(world_size, method, mask):
    if method.transfer == "all_gather" and method.function == "dist_flash_attention":
        pytest.skip("not a schedule")
    x = make_inputs(2 * world_size * 5, mask, batch=2)
    check_exact(run(x, method, world_size), truth(x))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("method", [ZIGZAG, DIST_FLASH], **ids)
def test_head_groups(method, heads):
    x = make_inputs(24, nheads=heads[0], nheads_kv=heads[1])
    check_exact(run(x, method, 4), truth(x))


@pytest.mark.parametrize("method", METHODS, **ids)
def test_smallest_shards(method):
    """One chunk token per rank; for contiguous and striped layouts one token per rank, the second chunk empty."""
    world_size = 5
    x = make_inputs(2 * world_size if method.layout == "zigzag" else world_size)
    check_exact(run(x, method, world_size), truth(x))


@pytest.mark.parametrize("method", METHODS, **ids)
def test_empty_shards(method):
    x = make_inputs(0)
    results = run(x, method, 4)
    assert all(t.numel() == 0 for t in results.values())


@pytest.mark.parametrize("world_size", [2, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", [ZIGZAG, METHODS[3], METHODS[5], DIST_FLASH, METHODS[9], ZIGZAG_BY_2], **ids)
def test_error_does_not_grow_with_ranks(method, dtype, world_size):
    x = make_inputs(16 * 5 * 8, dtype=dtype, headdim=32)
    single = run(x, ZIGZAG, 1)
    check_error_rule(run(x, method, world_size), truth(x), single)


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("method", [ZIGZAG, METHODS[3], METHODS[5], DIST_FLASH, ZIGZAG_BY_2], **ids)
def test_backends(method, backend):
    x = make_inputs(96, dtype=torch.float32)
    expected = truth(x)
    check_exact(run(x, method, 4, backend=backend), expected, 2e-4)


def test_uncontiguous_inputs_and_gradients():
    x = make_inputs(32, batch=2)
    expected = truth(x)
    x.q, x.k, x.v, x.dout = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v, x.dout))
    q, k, v = (t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in (x.q, x.k, x.v))
    out = seqpar_attn.ring_attention(q, k, v)
    assert (out - expected["out"]).abs().max() < 1e-12
    check_exact(run(x, ZIGZAG, 4), expected)
    # A sum's gradient is an expanded scalar, without strides.
    out.sum().backward()
    ones = make_inputs(32, batch=2)
    ones.q, ones.k, ones.v = x.q, x.k, x.v
    ones.dout, ones.dlse = torch.ones_like(x.dout), torch.zeros_like(x.dlse)
    assert (k.grad - truth(ones)["dk"]).abs().max() < 1e-12


def test_without_group_is_plain_attention():
    x = make_inputs(17, batch=2)
    out = seqpar_attn.ring_attention(x.q, x.k, x.v, layout="contiguous")
    assert (out - truth(x)["out"]).abs().max() < 1e-12


@pytest.mark.parametrize("method", [ZIGZAG, METHODS[5], DIST_FLASH], **ids)
def test_gradcheck(method):
    x = make_inputs(12, "packed", nheads=2, nheads_kv=1, headdim=3)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    function = getattr(seqpar_attn, method.function)
    group = LoopbackGroup(3)

    def call(q, k, v):
        return function(q, k, v, group=group, layout=method.layout, return_lse=True, **x.arguments)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("method", [ZIGZAG, DIST_FLASH], **ids)
def test_nan_spreads_but_does_not_crash(method):
    x = make_inputs(32)
    x.q[0, 20] = float("nan")
    results = run(x, method, 4)
    assert results["out"][0, 20].isnan().all()
    others = torch.arange(32) != 20
    assert results["out"][0, others].isfinite().all()
    assert results["dk"][0, :21].isnan().all()


def test_large_scores_do_not_overflow():
    x = make_inputs(64)
    x.q *= 300
    x.k *= 300
    check_exact(run(x, ZIGZAG, 4), truth(x), 1e-4)
    single = make_inputs(64, dtype=torch.float32)
    single.q *= 3000
    results = run(single, ZIGZAG, 8)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("group", [None, LoopbackGroup(4)], ids=["single", "loopback"])
def test_torch_compile_sees_one_operator(group):
    x = make_inputs(32, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]

    def model(q, k, v):
        return seqpar_attn.ring_attention(q * 2, k, v, group=group, window_size=9).cos()

    expected = model(*leaves)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(expected, actual)
    for a, b in zip(torch.autograd.grad(expected.sum(), leaves), torch.autograd.grad(actual.sum(), leaves)):
        assert torch.equal(a, b)


def test_opcheck():
    x = make_inputs(16, dtype=torch.float32, headdim=8)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    arguments = ("loopback:2", "ring", "pull", "zigzag", True, None, [0, 5, 16], None, 0.3, "auto", False, None)
    torch.library.opcheck(torch.ops.seqpar_attn.attention.default, (*leaves, *arguments))


def test_checkpointing_gives_the_same_gradients():
    x = make_inputs(32)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]

    def block(q, k, v):
        return seqpar_attn.dist_flash_attention(q, k, v, group=LoopbackGroup(4)).sin()

    plain = torch.autograd.grad(block(*leaves).sum(), leaves)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_two_lengths_in_turn():
    """Nothing is remembered from one shape to the next."""
    for seqlen in (32, 48, 32, 16):
        x = make_inputs(seqlen)
        check_exact(run(x, Method("ring_attention", "zigzag"), 4), truth(x))
