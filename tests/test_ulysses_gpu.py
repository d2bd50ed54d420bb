"""Ulysses and USP on GPUs: virtual ranks on one, and processes over NCCL."""

import pytest
import torch
from attention_cases import Inputs, check_error_rule, make_inputs, truth
from ulysses_cases import Grid, run, unshard

from seqpar_attn import kernels
from seqpar_attn.testing.distributed import RankPool

pytestmark = pytest.mark.gpu
ONE = Grid(1, 1, "contiguous")
GRIDS = [Grid(1, 8, "contiguous"), Grid(1, 4, "zigzag"), Grid(2, 4, "zigzag"), Grid(4, 2, "striped")]
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


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1), (24, 6)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "full", "packed-window"])
@pytest.mark.parametrize("grid", GRIDS, **ids)
def test_error_rule(backend, grid, mask, heads):
    shape = dict(dtype=torch.bfloat16, device="cuda", headdim=64, batch=2, nheads=heads[0], nheads_kv=heads[1])
    x = make_inputs(16 * 96, mask, **shape)
    check_error_rule(run(x, grid, backend=backend), truth(x), run(x, ONE, backend=backend))


def test_nothing_synchronises(backend):
    """The host runs ahead: no call waits for the device."""
    x = make_inputs(2048, "packed", dtype=torch.bfloat16, device="cuda", headdim=128, nheads=24, nheads_kv=6)
    for grid in GRIDS:
        run(x, grid, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grid in GRIDS:
            run(x, grid, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in (x.q, x.k, x.v, x.dout, x.dlse)), x.arguments)


def many(rank, world_size, x, grids):
    for grid in grids:
        grid.set_transport("p2p", "cuda")
    results = [run(on_gpu(x), grid, rank, backend="triton") for grid in grids]
    return [{name: t.cpu() for name, t in result.items()} for result in results]


def test_processes():
    grids = [Grid(1, 4, "contiguous"), Grid(2, 2, "zigzag")]
    x = make_inputs(8 * 160, "packed", dtype=torch.bfloat16, headdim=64, batch=2, nheads=8, nheads_kv=2)
    expected, single = truth(x), {name: t.cpu() for name, t in run(on_gpu(x), ONE, backend="triton").items()}
    with RankPool(4, timeout=240, backend="nccl") as pool:
        ranks = pool.run(many, x, grids)
    for i, grid in enumerate(grids):
        check_error_rule(unshard([results[i] for results in ranks], grid), expected, single)
