"""The transport that writes into peers' memory, between processes on one GPU or with a GPU each."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import ulysses_cases
from attention_cases import METHODS, make_inputs, other_bits
from ulysses_cases import Grid

import seqpar_attn
from seqpar_attn.comm import CommunicationError, communicator, group_name, set_transport, transport
from seqpar_attn.testing.distributed import RankPool

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
SIZES = [min(GPUS, 8)] if GPUS > 1 else [2, 4]
TIMEOUT = 6.0
REPEAT = pytest.mark.parametrize("repetition", range(int(os.environ.get("SEQPAR_ATTN_REPEAT", "1"))))


@pytest.fixture(scope="module", params=SIZES)
def pool(request):
    with RankPool(request.param, timeout=200) as pool:
        yield pool


def take_gpu(rank):
    torch.cuda.set_device(rank % torch.cuda.device_count())


def name_of_transport():
    return communicator(dist.group.WORLD.group_name, torch.device("cuda", torch.cuda.current_device())).name


def many(rank, world_size, mask, shape, methods):
    take_gpu(rank)
    set_transport(None, "symmetric")
    torch.manual_seed(0)
    x = make_inputs(world_size * 512, mask, device="cuda", **shape)
    return other_bits(x, methods, world_size, rank), name_of_transport()


SHAPES = {
    "grouped": {"dtype": torch.bfloat16, "headdim": 128, "nheads": 8, "nheads_kv": 2},
    "batch": {"dtype": torch.float16, "headdim": 64, "nheads": 4, "nheads_kv": 4, "batch": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["causal", "full", "packed", "packed-full", "window", "softcap"])
def test_same_bits_as_virtual_ranks(pool, mask, shape):
    assert pool.run(many, mask, SHAPES[shape], METHODS) == pool.world_size * [([], "symmetric")]


def heads(rank, world_size, mask, shape, grids):
    take_gpu(rank)
    torch.manual_seed(0)
    x = make_inputs(world_size * 512, mask, device="cuda", **shape)
    differ, staged = [], []
    for grid in grids:
        grid.set_transport("symmetric", "cuda")
        group = None if grid.rows == 1 else grid.mesh("cuda")["ulysses"]
        comm = communicator(group_name(group), x.q.device)
        exchange = comm.base.exchange
        comm.base.exchange = lambda *args, exchange=exchange, **more: (staged.append(1), exchange(*args, **more))[1]
        differ += ulysses_cases.other_bits(x, [grid], rank)
        comm.base.exchange = exchange
    set_transport(None, "symmetric")
    return differ, comm.name, len(staged)


@pytest.mark.parametrize("shape", [*SHAPES, "one key head"])
@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_heads_are_exchanged_with_the_bits_of_virtual_ranks(pool, mask, shape):
    """Ulysses, and USP where there is a grid; key heads that go to several ranks; a batch, whose rows lie apart."""
    ranks = pool.world_size
    grids = [Grid(1, ranks, "contiguous"), Grid(1, ranks, "zigzag")]
    if ranks >= 4 and ranks % 2 == 0:
        grids.append(Grid(ranks // 2, 2, "zigzag"))
    given = SHAPES.get(shape, {"dtype": torch.bfloat16, "headdim": 64, "nheads": 8, "nheads_kv": 1})
    given = given | {"nheads": max(given["nheads"], ranks)}
    assert pool.run(heads, mask, given, grids) == ranks * [([], "symmetric", 0)]


def long_call(rank, world_size, tokens):
    """Transfers that take long enough to be caught out of order, many times."""
    take_gpu(rank)
    set_transport(None, "symmetric")
    torch.manual_seed(0)
    x = make_inputs(world_size * tokens, dtype=torch.bfloat16, headdim=128, nheads=8, device="cuda")
    differ = []
    for repetition in range(5):
        time.sleep(0.01 * (rank if repetition % 2 else world_size - rank))
        differ += other_bits(x, (METHODS[0], METHODS[1], METHODS[7]), world_size, rank)
    return differ


def test_long_calls(pool):
    assert pool.run(long_call, 4096) == pool.world_size * [[]]


def by_itself(rank, world_size):
    """gloo cannot send between GPUs, so its groups have what works where "auto" would else take NCCL."""
    take_gpu(rank)
    set_transport(None, "auto")
    torch.manual_seed(0)
    x = make_inputs(world_size * 64, dtype=torch.bfloat16, headdim=64, nheads=4, device="cuda")
    differ = other_bits(x, METHODS[:1], world_size, rank)
    chosen = transport(None)
    set_transport(None, "auto", limit=1024)
    try:
        other_bits(x, METHODS[:1], world_size, rank)
    except ValueError as error:
        return differ, chosen, str(error)
    return differ, chosen, "no error"


def test_gloo_groups_find_it_by_themselves(pool):
    for differ, (name, reason), message in pool.run(by_itself):
        assert differ == [] and name == "symmetric"
        assert ("share a GPU" if pool.world_size > GPUS else "GPUs of one host") in reason
        assert "expected a limit of at least" in message and "got 1024" in message


def captured(rank, world_size):
    take_gpu(rank)
    set_transport(None, "symmetric")
    q = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    seqpar_attn.ring_attention(q, q, q)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            seqpar_attn.ring_attention(q, q, q)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_cuda_graph_is_refused(pool):
    for message in pool.run(captured):
        assert "expected no CUDA graph" in message and "set_transport(group, 'p2p')" in message


def growing(rank, world_size, rounds, gib):
    """Arenas that, were they kept, would not fit the GPU."""
    take_gpu(rank)
    x = torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(rounds):
        set_transport(None, "symmetric")
        for part in range(1, 4):
            seqpar_attn.ring_attention(x, x, x)  # is kept for calls to come, views of the arena included
            comm = communicator(dist.group.WORLD.group_name, x.device)
            assert comm.arena.reserve(part * int(gib * 2**30) // 3).device == x.device
        set_transport(None, "p2p")
    return True


def test_memory_is_given_back(pool):
    gib = 3.0 / (1 if GPUS > 1 else pool.world_size)
    assert all(pool.run(growing, 40, gib))


def faulty(rank, world_size, what, backward):
    """``(error, seconds, the same from the next call, whether the result is NaN)`` after rank 1 has gone wrong."""
    take_gpu(rank)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    set_transport(group, "symmetric")
    q = torch.randn(1, 2048, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # compiles, and agrees on the call
        seqpar_attn.ring_attention(q, q, q, group=group).sum().backward()
    torch.cuda.synchronize()
    dist.barrier()
    out = seqpar_attn.ring_attention(q, q, q, group=group) if backward else None
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "skip":
            time.sleep(TIMEOUT + 4)
            return "skipped"
    start = time.monotonic()
    q.grad = None
    error = "no error"
    try:
        if backward:
            out.sum().backward()
        else:
            out = seqpar_attn.ring_attention(q, q, q, group=group)
        torch.cuda.synchronize()
        time.sleep(0.1)
    except CommunicationError as found:
        error = str(found)
    seconds = time.monotonic() - start
    result = q.grad if backward else out
    nan = bool(result is None or result.isnan().any().item())
    try:
        seqpar_attn.ring_attention(q, q, q, group=group)
        after = "no error"
    except CommunicationError as found:
        after = str(found)
    return error, seconds, after, nan


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("what", ["kill", "stop", "skip"])
@REPEAT
def test_every_survivor_raises(repetition, what, backward):
    world_size = SIZES[-1]
    with RankPool(world_size, timeout=120) as pool:
        outcomes = pool.outcomes(faulty, what, backward, timeout=40)
    named = 0
    for outcome in outcomes:
        if outcome.rank == 1:
            continue
        assert outcome.error is None, outcome
        error, seconds, after, nan = outcome.result
        assert "did not come within" in error or "has given up" in error, outcome
        assert seconds < TIMEOUT + 5, outcome
        assert nan and error in after, outcome
        named += "ranks [1] in step" in error
    assert named, outcomes


def swapped(rank, world_size, grid):
    """Equal calls, whose backward passes rank 1 comes to in the other order."""
    take_gpu(rank)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    set_transport(group, "symmetric")
    attend = seqpar_attn.ulysses_attention if grid == "ulysses" else seqpar_attn.ring_attention
    q = torch.randn(1, 1024, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # compiles, and agrees on the call
        attend(q, q, q, group=group).sum().backward()
    outs = [attend(q, q, q, group=group) for _ in range(2)]
    torch.cuda.synchronize()
    start = time.monotonic()
    try:
        for out in outs[::-1] if rank == 1 else outs:
            out.sum().backward()
        torch.cuda.synchronize()
        time.sleep(0.1)
    except CommunicationError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@REPEAT
def test_backward_passes_of_equal_calls_in_another_order(repetition, method):
    world_size = SIZES[-1]
    with RankPool(world_size, timeout=120) as pool:
        outcomes = pool.outcomes(swapped, method, timeout=60)
    for outcome in outcomes:
        assert outcome.error is None, outcome
        error, seconds = outcome.result
        assert "did not come within" in error or "has given up" in error, outcome
        assert seconds < TIMEOUT + 5, outcome
    assert any("are in the backward pass of another call" in outcome.result[0] for outcome in outcomes), outcomes
