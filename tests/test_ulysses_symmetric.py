"""Ulysses' and USP's exchange of heads written straight into peers' memory: the same bits as with virtual ranks."""

import pytest
import torch
from attention_cases import check_exact, make_inputs, truth
from ulysses_cases import Grid, other_bits, run, unshard

from seqpar_attn.comm import communicator, group_name, set_transport
from seqpar_attn.comm.gpu_driver import as_long, rows_of
from seqpar_attn.testing.distributed import RankPool

GRIDS = {
    2: [Grid(1, 2, "contiguous"), Grid(1, 2, "zigzag")],
    4: [Grid(1, 4, "striped"), Grid(2, 2, "zigzag"), Grid(2, 2, "contiguous")],
}
HEADS = [(4, 4), (4, 1), (12, 6), (12, 2)]
"""Among them key heads that go to several ranks, and such that a rank gets twice."""


@pytest.fixture(scope="module", params=[2, 4])
def pool(request):
    with RankPool(request.param, timeout=60) as pool:
        yield pool


def count_pushed(rank, grid):
    """Elements that go through the fabric, and messages that do not."""
    group = None if grid.rows == 1 else grid.mesh("cpu")["ulysses"]
    comm = communicator(group_name(group), torch.device("cpu"))
    assert comm.name == "symmetric"
    pushed, others = [], []
    copy, exchange = comm.fabric.copy, comm.base.exchange
    comm.fabric.copy = lambda target, source: (pushed.append(source.numel()), copy(target, source))
    comm.base.exchange = lambda *args, **more: (others.append(1), exchange(*args, **more))[1]
    return pushed, others


def many(rank, world_size, inputs, grids):
    differ, results = [], []
    for grid in grids:
        grid.set_transport("p2p", "cpu")
        by_p2p = [run(x, grid, rank, deterministic=True) for x in inputs]
        grid.set_transport("symmetric", "cpu")
        pushed, others = count_pushed(rank, grid)
        for x, expected in zip(inputs, by_p2p):
            del pushed[:]
            found = run(x, grid, rank, deterministic=True)
            differ += [(grid.name, "p2p", name) for name in found if not torch.equal(found[name], expected[name])]
            # At least all but its own heads of q and dout leave a rank, and all but its own tokens of out and dq.
            assert sum(pushed) >= 4 * x.q.numel() // world_size * (grid.columns - 1) // grid.columns
            assert not others
            if grid.rows == 1:  # on CPUs matrix products round by how many virtual ranks a row has
                differ += other_bits(x, [grid], rank)
            results.append(found)
        grid.set_transport("auto", "cpu")
    return differ, results


@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_same_bits_as_virtual_ranks_and_p2p(pool, mask):
    inputs = [make_inputs(24, mask, nheads=n, nheads_kv=m, batch=1 + i % 2) for i, (n, m) in enumerate(HEADS)]
    grids = GRIDS[pool.world_size]
    ranks = pool.run(many, inputs, grids)
    assert [differ for differ, _ in ranks] == pool.world_size * [[]]
    for i, (grid, x) in enumerate((grid, x) for grid in grids for x in inputs):
        check_exact(unshard([results[i] for _, results in ranks], grid), truth(x))


def kept(rank, world_size, inputs, grid):
    """Two calls whose backward passes come after both, with another call's heads in the arena in between."""
    grid.set_transport("symmetric", "cpu")
    layout = grid.whole_layout()
    leaves, results = [], []
    for x in inputs:
        leaves.append([layout.shard(t, rank).requires_grad_() for t in (x.q, x.k, x.v)])
        results.append(grid.attend(*leaves[-1], True, return_lse=True, **x.arguments))
    found = []
    for x, (q, k, v), (out, lse) in reversed(list(zip(inputs, leaves, results))):
        given = layout.shard(x.dout, rank), layout.shard(x.dlse, rank, 2)
        names = ("out", "lse", "dq", "dk", "dv")
        found.append(dict(zip(names, (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), given)))))
    grid.set_transport("auto", "cpu")
    return found[::-1]


@pytest.mark.parametrize("shape", [{}, {"batch": 2}, {"nheads_kv": 1}], ids=str)
def test_what_backward_needs_does_not_stay_in_the_arena(pool, shape):
    grid = GRIDS[pool.world_size][0]
    # As short as shards can be: then what was exchanged is in order without a copy.
    for length in (pool.world_size, 6 * pool.world_size):
        inputs = [make_inputs(length, **shape) for _ in range(2)]
        ranks = pool.run(kept, inputs, grid)
        for i, x in enumerate(inputs):
            check_exact(unshard([found[i] for found in ranks], grid), truth(x))


def empty(rank, world_size):
    set_transport(None, "symmetric")
    q = torch.randn(0, 4, 4, 16, requires_grad=True)
    grid = Grid(1, world_size, "contiguous")
    out = grid.attend(q, q, q, True)
    (grad,) = torch.autograd.grad(out.sum(), q)
    set_transport(None, "auto")
    return out.shape == grad.shape == q.shape


def test_empty_batch(pool):
    assert all(pool.run(empty))


def expanded(rank, world_size, x, grid):
    """The gradient of a sum is one number with strides of 0."""
    found = []
    for transport in ("symmetric", "p2p"):
        grid.set_transport(transport, "cpu")
        q, k, v = (grid.whole_layout().shard(t, rank).requires_grad_() for t in (x.q, x.k, x.v))
        found.append(torch.autograd.grad(grid.attend(q, k, v, True).sum(), (q, k, v)))
    return all(torch.equal(*pair) for pair in zip(*found))


def test_gradients_without_strides(pool):
    assert all(pool.run(expanded, make_inputs(24), GRIDS[pool.world_size][0]))


# What copy engines take ----------------------------------------------------------------------------------------------


def test_rows():
    x = torch.empty(2, 6, 8, 16)
    assert rows_of(x) == (1, 1536, 1536)
    assert rows_of(x[:, :, 2:4]) == (12, 32, 128)
    assert rows_of(x[:, 2:4]) == (2, 256, 768)
    assert rows_of(x[:, 2:4, 2:4]) is None
    assert rows_of(x.transpose(1, 2)[:, 2:4]) is None
    assert as_long(rows_of(x), 32) == (48, 32, 32)
    assert as_long(rows_of(x), 7) == (1, 1536, 1536)
    assert as_long((12, 32, 128), 16) == (12, 32, 128)
