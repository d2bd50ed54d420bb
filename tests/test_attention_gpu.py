"""The public functions on one GPU: virtual ranks, low precision, masks, lengths that are not multiples of a tile."""

import pytest
import torch
from attention_cases import MASKS, METHODS, check_error_rule, make_inputs, run, truth

import seqpar_attn
from seqpar_attn import kernels

pytestmark = pytest.mark.gpu
ZIGZAG, CONTIGUOUS, STRIPED, DIST_FLASH = METHODS[0], METHODS[3], METHODS[5], METHODS[7]
ids = dict(ids=lambda x: getattr(x, "name", str(x)))


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Our own kernels; csrc's only where there is a library and a GPU that it serves."""
    missing = kernels.unavailable(request.param)
    if missing is None and request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        missing = "expected compute capability 9.0"
    if missing:
        pytest.skip(missing)
    return request.param


def check(backend, seqlen, mask, method, world_size, dtype, **shape):
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("not served")
    x = make_inputs(seqlen, mask, dtype=dtype, device="cuda", **shape)
    single = run(x, ZIGZAG, 1, backend=backend)
    results = run(x, method, world_size, backend=backend)
    return check_error_rule(results, truth(x), single)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", METHODS, **ids)
def test_eight_ranks(backend, method, mask):
    check(backend, 16 * 101, mask, method, 8, torch.bfloat16, headdim=64, batch=2)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", [ZIGZAG, STRIPED, DIST_FLASH], **ids)
def test_eight_ranks_float16(backend, method, mask):
    check(backend, 16 * 101, mask, method, 8, torch.float16, headdim=64, batch=2)


@pytest.mark.parametrize("world_size", [2, 3, 5, 16])
@pytest.mark.parametrize("method", [ZIGZAG, CONTIGUOUS, STRIPED, DIST_FLASH, METHODS[9], METHODS[10]], **ids)
def test_error_does_not_grow_with_ranks(backend, method, world_size):
    ratios = check(backend, 2 * world_size * 77, "causal", method, world_size, torch.bfloat16, headdim=128, nheads=8)
    print(method.name, world_size, {name: f"{ratio:.3f}" for name, ratio in ratios.items()})


@pytest.mark.parametrize("headdim", [32, 80, 96, 128, 192, 256])
def test_head_dimensions(backend, headdim):
    check(backend, 16 * 45, "packed", ZIGZAG, 8, torch.bfloat16, headdim=headdim)


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (6, 2)], ids=str)
def test_head_groups(backend, heads):
    check(backend, 8 * 150, "window", ZIGZAG, 4, torch.bfloat16, headdim=64, nheads=heads[0], nheads_kv=heads[1])


def test_float32(backend):
    check(backend, 8 * 70, "packed-window", ZIGZAG, 4, torch.float32, headdim=64)


@pytest.mark.parametrize("mask", MASKS)
def test_small_odd_lengths(backend, mask):
    """Also what ``make gpu-memcheck`` runs: every bound is hit, nothing is a multiple of a tile."""
    for method in (ZIGZAG, DIST_FLASH):
        check(backend, 2 * 3 * 37, mask, method, 3, torch.bfloat16, headdim=40, batch=2)


def test_one_token_per_chunk(backend):
    check(backend, 16, "causal", ZIGZAG, 8, torch.bfloat16, headdim=64, batch=16)


@pytest.mark.parametrize("name", ["aten", "cudnn"])
@pytest.mark.parametrize("method", [ZIGZAG, STRIPED, DIST_FLASH], **ids)
def test_baseline_backends(method, name):
    x = make_inputs(1024, dtype=torch.bfloat16, device="cuda", headdim=128)
    results, expected = run(x, method, 4, backend=name), truth(x)
    for name in expected:
        error = (results[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, f"{name}: {error:.3e}"


def test_nothing_synchronises(backend):
    """The host runs ahead: no call waits for the device."""
    x = make_inputs(2048, "packed", dtype=torch.bfloat16, device="cuda", headdim=128)
    run(x, ZIGZAG, 8, backend=backend)
    run(x, DIST_FLASH, 8, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, ZIGZAG, 8, backend=backend)
        run(x, DIST_FLASH, 8, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mask", ["causal", "full", "softcap"])
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_runs_are_identical(backend, headdim, mask):
    """Asked to be deterministic, so any difference would be a race."""
    x = make_inputs(4096, mask, dtype=torch.bfloat16, device="cuda", headdim=headdim)
    first = run(x, ZIGZAG, 8, deterministic=True, backend=backend)
    for _ in range(10):
        again = run(x, ZIGZAG, 8, deterministic=True, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_long_sequence_offsets(backend):
    """More than 2^31 elements in q: every offset must be 64 bits wide."""
    seqlen, nheads, headdim = 2**19 + 2, 32, 128
    q = torch.randn(1, seqlen, nheads, headdim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, seqlen, 1, headdim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = seqpar_attn.ring_attention(q, k, v, window_size=64, backend=backend)
    tail = seqpar_attn.ring_attention(*(t[:, -256:].contiguous() for t in (q, k, v)), window_size=64, backend=backend)
    assert torch.equal(out[:, -128:], tail[:, -128:]) or (out[:, -128:] - tail[:, -128:]).abs().max() < 0.05
    assert out[:, -128:].abs().max() > 0.1
