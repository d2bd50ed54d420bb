"""Ranks that come to backward passes of equal calls in different orders: noticed, and without false alarms."""

import threading

import pytest
import torch
import torch.distributed as dist
from attention_cases import make_inputs
from torch.utils.checkpoint import checkpoint
from ulysses_cases import Grid

import seqpar_attn
from seqpar_attn import LoopbackGroup, memory, numbers
from seqpar_attn.comm import communicator
from seqpar_attn.comm.flags import awaited, is_behind, is_other_call, told
from seqpar_attn.comm.handshake import Handshake
from seqpar_attn.testing.distributed import RankPool

RANKS = 4
DEVICE = torch.device("cpu")

# Flags ---------------------------------------------------------------------------------------------------------------


def test_a_flag_of_the_same_call_is_enough():
    for call in (None, 0, 7, 254, 255, 1000):
        assert not is_behind(told(3, call), awaited(3, call))
        assert not is_behind(told(4, 0), awaited(3, call)), "a later exchange"
        assert is_behind(told(2, None), awaited(3, call)), "an earlier one"
        assert not is_other_call(told(2, call), awaited(3, call))


def test_of_two_calls_one_waits_for_the_other():
    for a, b in [(6, 7), (0, 254), (254, 255), (3, 300)]:
        waits = [is_behind(told(5, x), awaited(5, y)) for x, y in ((a, b), (b, a))]
        assert sorted(waits) == [False, True]
        assert is_other_call(*((told(5, a), awaited(5, b)) if waits[0] else (told(5, b), awaited(5, a))))


def test_who_does_not_know_its_call_goes_with_any():
    for call in (0, 7, 254):
        assert not is_behind(told(5, None), awaited(5, call)) and not is_behind(told(5, call), awaited(5, None))


def test_flags_go_round():
    def signed(x):
        return (x + 2**31) % 2**32 - 2**31

    for count in (2**23 - 1, 2**23, 2**24 - 1, 2**24, 2**24 + 1):
        assert not is_behind(signed(told(count, 6)), awaited(count, 6))
        assert is_behind(signed(told(count - 1, 6)), awaited(count, 6))
        assert is_other_call(signed(told(count, 5)), awaited(count, 6))


# Numbers -------------------------------------------------------------------------------------------------------------


def test_unknown_outside_of_a_call():
    numbers.begin(5)
    assert numbers.here() == (None,) and numbers.here(2) == (None, None)
    with numbers.noting() as note:
        numbers.begin(5, 6)
    with numbers.of_backward(note.numbers):
        assert numbers.here(2) == (5, 6)
        found = []
        other = threading.Thread(target=lambda: found.append(numbers.here()))
        other.start()
        other.join()
        assert found == [(None,)]
    assert numbers.here() == (None,)


@pytest.fixture(scope="module")
def pool():
    with RankPool(RANKS, timeout=60) as pool:
        yield pool


def attend(grid, x):
    """Ring attention without a grid."""
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    out = seqpar_attn.ring_attention(q, k, v) if grid is None else grid.attend(q, k, v, True)
    return out, (q, k, v)


def swapped(rank, world_size, grid, odd):
    x = make_inputs(8, nheads=4)
    calls = [attend(grid, x) for _ in range(2)]
    for out, inputs in calls[::-1] if rank == odd else calls:
        try:
            torch.autograd.grad(out.sum(), inputs)
        except ValueError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("grid", [None, Grid(1, 4, "contiguous"), Grid(2, 2, "zigzag")], ids=["ring", "1x4", "2x2"])
def test_equal_calls_in_another_order(pool, grid, odd):
    for message in pool.run(swapped, grid, odd):
        assert "expected the same forward call on every rank" in message


class Silent(Handshake):
    """Of groups on GPUs, which do not compare what they have compared before."""

    def agree(self, fields, error):
        return super().agree({}, error)


def swapped_behind_the_handshake(rank, world_size, grid, odd):
    """As on GPUs: nothing but the transport can tell."""
    group = dist.group.WORLD
    seqpar_attn.set_transport(None, "symmetric")
    comm = communicator(group.group_name, DEVICE)
    comm.base.handshake.__class__ = Silent
    comm.fabric.timeout = 3.0
    x = make_inputs(8, nheads=4)
    calls = [attend(grid, x) for _ in range(2)]
    for out, inputs in calls[::-1] if rank == odd else calls:
        try:
            torch.autograd.grad(out.sum(), inputs)
        except seqpar_attn.CommunicationError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize("grid", [None, Grid(1, 4, "contiguous")], ids=["ring", "1x4"])
def test_the_symmetric_transport_notices_by_itself(grid, odd):
    with RankPool(RANKS, timeout=60) as pool:
        messages = pool.run(swapped_behind_the_handshake, grid, odd)
    assert all("did not come within 3 s" in message for message in messages), messages
    assert any("in the backward pass of another call" in message for message in messages), messages


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = torch.nn.Linear(32, 64), torch.nn.Linear(32, 32)

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).unflatten(2, (-1, 8)).split([4, 2, 2], 2)
        return hidden_states + self.o(seqpar_attn.ring_attention(q, k, v).flatten(2))


def recomputing(rank, world_size, how):
    """The numbers that the backward passes had, of three blocks that are computed again in different ways; rank 1
    computes them in one way less."""
    torch.manual_seed(0)
    found = []
    agree = Handshake.agree

    def noting(self, fields, error):
        if fields.get("direction") == "backward":
            found.append(repr(fields["forward call"]))
        return agree(self, fields, error)

    seqpar_attn.set_transport(None, "auto")  # a new communicator, which begins to count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handshake, "agree", noting)
        blocks = torch.nn.ModuleList([Block() for _ in range(3)])
        applied = memory.apply(torch.nn.Sequential(blocks), attention="save") if how == "save" else None
        x = torch.randn(1, 8, 32, requires_grad=True)
        for block in blocks:
            if how.startswith("checkpoint"):
                x = checkpoint(block, x, use_reentrant=how.endswith("reentrant"))
            elif how == "compiled" and rank != 1:
                x = torch.compile(block, backend="aot_eager")(x)
            else:
                x = block(x)
        x.sum().backward()
        if applied is not None:
            applied.remove()
    return found


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("plain", ["2", "1", "0"]),
        ("save", ["2", "1", "0"]),
        ("checkpoint", ["2", "1", "0"]),
        ("checkpoint reentrant", ["3", "4", "5"]),
        ("compiled", 3 * ["unknown"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_recomputation_and_compilation(pool, how, expected):
    """No false alarm, also where only some ranks know: one rank is not compiled."""
    ranks = pool.run(recomputing, how)
    assert ranks[0] == expected
    assert ranks[1] == (["2", "1", "0"] if how == "compiled" else expected)


def test_no_compilation_for_a_new_number():
    q = torch.randn(1, 16, 2, 8, requires_grad=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q: seqpar_attn.ring_attention(q, q, q, group=LoopbackGroup(2)).cos(), backend=backend
    )
    for _ in range(3):
        compiled(q).sum().backward()
    assert len(graphs) == 1
