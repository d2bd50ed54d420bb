"""The transport that writes into peers' memory: its protocol, over memory that processes on CPUs share."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from attention_cases import METHODS, check_exact, make_inputs, run, truth, unshard

import seqpar_attn
from seqpar_attn.comm import communicator, set_transport
from seqpar_attn.testing.distributed import RankPool

CASES = [("causal", 2), ("full", 2), ("window", 1), ("packed", 2), ("packed-full", 4), ("softcap", 4)]


@pytest.fixture(scope="module", params=[3, 4])
def pool(request):
    with RankPool(request.param, timeout=90) as pool:
        yield pool


def many(rank, world_size, inputs, methods):
    set_transport(None, "symmetric")
    comm = communicator(dist.group.WORLD.group_name, torch.device("cpu"))
    pushed = []
    copy = comm.fabric.copy
    comm.fabric.copy = lambda target, source: (pushed.append(source.numel()), copy(target, source))
    results = []
    for method in methods:
        for x in inputs:
            time.sleep(0.002 * rank)  # nobody may rely on others being at the same step
            results.append(run(x, method, world_size, rank))
    set_transport(None, "p2p")
    assert communicator(dist.group.WORLD.group_name, torch.device("cpu")).name == "p2p"
    return results, len(pushed)


def test_equals_one_device(pool):
    length = 2 * pool.world_size * 6
    inputs = [make_inputs(length, mask, nheads_kv=heads, batch=1 + i % 2) for i, (mask, heads) in enumerate(CASES)]
    ranks = pool.run(many, inputs, METHODS)
    assert all(pushed > 0 for _, pushed in ranks)
    expected = [truth(x) for x in inputs]
    for i, (method, case) in enumerate((m, c) for m in METHODS for c in range(len(inputs))):
        check_exact(unshard([results[i] for results, _ in ranks], method), expected[case])


def growing(rank, world_size, inputs):
    set_transport(None, "symmetric")
    comm = communicator(dist.group.WORLD.group_name, torch.device("cpu"))
    found = []
    for x in inputs:
        found.append((run(x, METHODS[0], world_size, rank), comm.arena.generation))
    return found


def test_arena_grows_and_is_shared(pool):
    inputs = [make_inputs(2 * pool.world_size * n) for n in (2, 9, 4, 9)]
    ranks = pool.run(growing, inputs)
    for i, x in enumerate(inputs):
        check_exact(unshard([found[i][0] for found in ranks], METHODS[0]), truth(x))
    generations = [[generation for _, generation in found] for found in ranks]
    assert len(set(map(tuple, generations))) == 1
    assert generations[0][1] > generations[0][0] and generations[0][1:] == 3 * generations[0][1:2]


def refused(rank, world_size, transport):
    try:
        set_transport(None, transport if rank == 0 else "symmetric")
    except ValueError as error:
        return str(error)
    return "no error"


def test_unknown_or_different_transports_are_refused(pool):
    unknown = "rank 0: expected one of auto, p2p, symmetric, got 'pigeons'"
    assert set(pool.run(refused, "pigeons")) == {unknown}
    differ = "expected the same transport on every rank, got 'p2p' on rank 0 and 'symmetric' on rank 1"
    assert set(pool.run(refused, "p2p")) == {differ}
    with pytest.raises(ValueError, match="virtual ranks"):
        set_transport(seqpar_attn.LoopbackGroup(2), "symmetric")


def in_threads(rank, world_size, inputs):
    """Two threads' passes, in one order on every rank, of which the second begins in the middle of the first."""
    set_transport(None, "symmetric")
    fabric = communicator(dist.group.WORLD.group_name, torch.device("cpu")).fabric
    end, found, entered = fabric.end, {}, threading.Event()

    def slowly():
        if not entered.is_set():
            entered.set()
            time.sleep(0.3)
        return end()

    fabric.end = slowly
    layout = seqpar_attn.get_layout("zigzag", world_size)

    def attend(i):
        q, k, v = (layout.shard(x, rank) for x in (inputs[i].q, inputs[i].k, inputs[i].v))
        found[i] = seqpar_attn.ring_attention(q, k, v)

    first, second = (threading.Thread(target=attend, args=(i,)) for i in range(2))
    first.start()
    entered.wait()
    second.start()
    first.join()
    second.join()
    set_transport(None, "p2p")
    return found[0], found[1]


def test_passes_of_two_threads_take_turns(pool):
    inputs = [make_inputs(2 * pool.world_size * n) for n in (8, 8)]
    ranks = pool.run(in_threads, inputs)
    layout = seqpar_attn.get_layout("zigzag", pool.world_size)
    for i, x in enumerate(inputs):
        out = layout.unshard([found[i] for found in ranks])
        torch.testing.assert_close(out, truth(x)["out"], rtol=0, atol=1e-12)
