"""Ulysses and USP against float64 single-device attention: virtual ranks, real processes, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from attention_cases import MASKS, check_error_rule, check_exact, make_inputs, truth
from ulysses_cases import Grid, run, unshard

import seqpar_attn
from seqpar_attn import LoopbackGroup, memory
from seqpar_attn.heads import key_copies
from seqpar_attn.layout import get_layout
from seqpar_attn.testing.distributed import RankPool

ids = dict(ids=lambda x: getattr(x, "name", str(x)))
GRIDS = [
    Grid(1, 2, "contiguous"),
    Grid(1, 4, "zigzag"),
    Grid(1, 3, "striped"),
    Grid(2, 2, "zigzag"),
    Grid(2, 3, "zigzag"),  # an odd row: parts of a zigzag shard that lie in both of its chunks
    Grid(3, 2, "contiguous"),
    Grid(2, 2, "striped"),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", GRIDS, **ids)
def test_virtual_ranks_equal_one_device(grid, mask):
    x = make_inputs(24 * grid.rows, mask, nheads=12, nheads_kv=2, batch=2)
    check_exact(run(x, grid), truth(x))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 6), (12, 3)], ids=str)
@pytest.mark.parametrize("grid", [Grid(1, 4, "contiguous"), Grid(2, 4, "zigzag")], **ids)
def test_key_heads(grid, heads):
    """As many as ranks, fewer, more, and such as do not divide among the ranks' query heads."""
    x = make_inputs(16 * grid.rows, nheads=heads[0], nheads_kv=heads[1])
    check_exact(run(x, grid), truth(x))


def test_copies_of_key_heads():
    assert [key_copies(*args) for args in [(8, 8, 4), (8, 2, 4), (8, 1, 4), (12, 6, 4), (8, 4, 4)]] == [1, 2, 4, 2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grid", [Grid(1, 4, "contiguous"), Grid(2, 4, "zigzag")], **ids)
def test_copies_are_added_before_they_are_rounded(grid, dtype):
    """One key head on four ranks: its gradient is as good as that of one device."""
    x = make_inputs(128 * grid.rows, dtype=dtype, nheads=8, nheads_kv=1, headdim=32)
    check_error_rule(run(x, grid), truth(x), run(x, Grid(1, 1, "contiguous")))


# Real processes -------------------------------------------------------------------------------------------------------

CASES = [("causal", 2), ("full", 1), ("window", 1), ("packed", 2), ("packed-full", 6), ("softcap", 6)]
REAL = {
    2: [Grid(1, 2, "contiguous")],
    3: [Grid(1, 3, "zigzag")],
    4: [Grid(1, 4, "striped"), Grid(2, 2, "zigzag")],
}


def many(rank, world_size, inputs, grids):
    return [run(x, grid, rank) for grid in grids for x in inputs]


@pytest.fixture(scope="module", params=[2, 3, 4])
def pool(request):
    with RankPool(request.param, timeout=60) as pool:
        yield pool


def test_processes_equal_one_device(pool):
    grids = REAL[pool.world_size]
    inputs = [make_inputs(24, mask, nheads=12, nheads_kv=h, batch=1 + i % 2) for i, (mask, h) in enumerate(CASES)]
    ranks = pool.run(many, inputs, grids)
    expected = [truth(x) for x in inputs]
    for i, (grid, case) in enumerate((g, c) for g in grids for c in range(len(inputs))):
        check_exact(unshard([results[i] for results in ranks], grid), expected[case])


def test_processes_error_rule(pool):
    grids = REAL[pool.world_size]
    x = make_inputs(2 * pool.world_size * 64, dtype=torch.bfloat16, headdim=32, nheads=12, nheads_kv=1)
    expected, single = truth(x), run(x, Grid(1, 1, "contiguous"))
    ranks = pool.run(many, [x], grids)
    for i, grid in enumerate(grids):
        check_error_rule(unshard([results[i] for results in ranks], grid), expected, single)


def one_call(q_shape=(1, 8, 4, 16), kv_heads=2, dtype=torch.float32, usp=False, **arguments):
    q = torch.randn(q_shape, dtype=dtype)
    k = torch.randn(*q_shape[:2], kv_heads, q_shape[3], dtype=dtype)
    if usp:
        mesh = dist.init_device_mesh("cpu", (2, 2))
        return seqpar_attn.usp_attention(q, k, k, group=mesh, **arguments)
    return seqpar_attn.ulysses_attention(q, k, k, **arguments)


FAULTS = {
    "heads": ({"q_shape": (1, 8, 5, 16), "kv_heads": 1}, ("expected nheads divisible", "got 5")),
    "shape": ({"q_shape": (1, 12, 4, 16)}, ("expected the same q shape",)),
    "key heads": ({"kv_heads": 3}, ("multiple",)),
    "length": ({"q_shape": (1, 7, 4, 16), "layout": "zigzag"}, ("divisible by 8", "got 28")),
    "layout": ({"layout": "spiral"}, ("expected one of", "'spiral'")),
    "other layout": ({"layout": "striped"}, ("expected the same layout",)),
    "window": ({"window_size": 0}, ("window_size", "got 0")),
    "documents": ({"cu_seqlens": (0, 8)}, ("global length 32", "got 8")),
    "dropout": ({"dropout_p": 0.1}, ("dropout",)),
    "backend": ({"backend": "fastest"}, ("expected auto or one of",)),
    "dtype": ({"dtype": torch.bfloat16}, ("expected the same dtype",)),
}


def faulty(rank, world_size, odd_rank):
    """What every rank hears of a fault of one rank."""
    found = {}
    for usp in (False, True):
        for name, (arguments, _) in FAULTS.items():
            try:
                one_call(usp=usp, **(arguments if rank == odd_rank else {}))
                found[name, usp] = "no error"
            except ValueError as error:
                found[name, usp] = str(error)
        one_call(usp=usp)  # and afterwards it works
    return found


@pytest.fixture(scope="module")
def four():
    with RankPool(4, timeout=60) as four:
        yield four


@pytest.mark.parametrize("odd_rank", [1, 2])
def test_a_fault_of_one_rank_is_an_error_on_all(four, odd_rank):
    for found in four.run(faulty, odd_rank):
        for (name, usp), message in found.items():
            wanted = FAULTS[name][1]
            if usp and name == "length":  # any shard of two ranks' rows makes two chunks
                wanted = ("expected the same q shape",)
            for words in wanted:
                assert words in message, (name, usp, message)


# Layouts, compilers and checkpoints -----------------------------------------------------------------------------------


def batch_of_grid(rank, world_size):
    mesh = dist.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "ring", "ulysses"))["ring", "ulysses"]
    tokens = torch.arange(100, 100 + 22)[None]
    by_mesh = seqpar_attn.shard_batch(tokens, layout="zigzag/2", group=mesh)
    by_rank = seqpar_attn.shard_batch(tokens, layout="zigzag/2", rank=rank, world_size=world_size)
    assert torch.equal(by_mesh.input_ids, by_rank.input_ids) and by_mesh.rank == rank
    local = by_mesh.position_ids.double().requires_grad_()
    whole = seqpar_attn.gather(local, "zigzag/2", mesh)
    assert torch.equal(whole, torch.arange(by_mesh.seqlen, dtype=torch.float64)[None])
    ((whole**2).sum() / world_size).backward()
    assert torch.equal(local.grad, 2 * local.detach())
    with pytest.raises(ValueError, match="expected a layout such as 'zigzag/2' for this grid of ranks, got 'zigzag'"):
        seqpar_attn.gather(local, "zigzag", mesh)
    with pytest.raises(ValueError, match="expected a mesh of two dimensions"):
        seqpar_attn.usp_attention(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8), group=None)
    return by_mesh.labels


def test_batches_of_a_grid(four):
    """Labels, positions and the way back, for a mesh of ranks."""
    labels = four.run(batch_of_grid)
    whole = get_layout("zigzag/2", 4).unshard(labels)
    assert whole[0].tolist() == [*range(101, 122), -100, -100, -100]


def test_torch_compile_sees_one_operator():
    x = make_inputs(24, dtype=torch.float32, nheads=4, nheads_kv=1)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    groups = (LoopbackGroup(2), LoopbackGroup(2))

    def model(q, k, v):
        return seqpar_attn.usp_attention(q * 2, k, v, group=groups, window_size=9).cos()

    expected = model(*leaves)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(expected, actual)
    for a, b in zip(torch.autograd.grad(expected.sum(), leaves), torch.autograd.grad(actual.sum(), leaves)):
        assert torch.equal(a, b)


def test_opcheck():
    x = make_inputs(24, dtype=torch.float32, headdim=8, nheads_kv=1)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    arguments = ("usp", "pull", "zigzag", True, None, [0, 5, 24], None, 0.3, "auto", False, None)
    torch.library.opcheck(torch.ops.seqpar_attn.ulysses.default, (*leaves, "loopback:2", "loopback:3", *arguments))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = torch.nn.Linear(32, 48), torch.nn.Linear(32, 32)

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).unflatten(2, (-1, 8)).split([4, 1, 1], 2)
        return hidden_states + self.o(seqpar_attn.ulysses_attention(q, k, v, group=LoopbackGroup(4)).flatten(2))


def test_a_recomputation_takes_back_attention(monkeypatch):
    """Under a memory policy gradients are the same, and no kernel runs twice."""
    from seqpar_attn import ulysses

    runs = []
    forward = ulysses.forward_pass
    monkeypatch.setattr(ulysses, "forward_pass", lambda *args: (runs.append(1), forward(*args))[1])
    model = torch.nn.Sequential(torch.nn.ModuleList([Block(), Block()])).double()
    model.forward = lambda x: model[0][1](model[0][0](x))
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    for attention in ("save", "offload", "recompute"):
        runs.clear()
        model.zero_grad()
        applied = memory.apply(model, attention=attention, activations="offload")
        model(x).square().sum().backward()
        applied.remove()
        assert len(runs) == (4 if attention == "recompute" else 2)
        assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters()))


def test_empty_batch():
    q = torch.randn(0, 8, 4, 16, requires_grad=True)
    out = seqpar_attn.ulysses_attention(q, q, q, group=LoopbackGroup(4))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == grad.shape == q.shape
