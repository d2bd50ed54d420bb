"""The public functions on real processes over gloo: outputs, gradients and every way in which ranks can disagree."""

import dataclasses
import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from attention_cases import METHODS, Inputs, check_error_rule, check_exact, make_inputs, run, truth, unshard

import seqpar_attn
from seqpar_attn import comm
from seqpar_attn.testing.distributed import RankPool

CASES = [("causal", 2), ("full", 2), ("window", 1), ("packed", 2), ("packed-full", 4), ("softcap", 4)]
ZIGZAG, DIST_FLASH = METHODS[0], METHODS[7]


@pytest.fixture(scope="module", params=[2, 3, 4])
def pool(request):
    with RankPool(request.param, timeout=60) as pool:
        yield pool


def many(rank, world_size, inputs, methods):
    return [run(x, method, world_size, rank) for method in methods for x in inputs]


def test_equals_one_device(pool):
    length = 2 * pool.world_size * 6
    inputs = [make_inputs(length, mask, nheads_kv=heads, batch=1 + i % 2) for i, (mask, heads) in enumerate(CASES)]
    ranks = pool.run(many, inputs, METHODS)
    expected = [truth(x) for x in inputs]
    for i, (method, case) in enumerate((m, c) for m in METHODS for c in range(len(inputs))):
        check_exact(unshard([results[i] for results in ranks], method), expected[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_rule(pool, dtype):
    x = make_inputs(2 * pool.world_size * 64, dtype=dtype, headdim=32)
    expected, single = truth(x), run(x, ZIGZAG, 1)
    ranks = pool.run(many, [x], [ZIGZAG, DIST_FLASH])
    for i, method in enumerate([ZIGZAG, DIST_FLASH]):
        check_error_rule(unshard([results[i] for results in ranks], method), expected, single)


class Together:
    """Works as one, as NCCL has them."""

    def __init__(self, works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()


class Coalescing:
    """Something that sends and receives, with NCCL's way to post several messages at once."""

    group_name = "coalescing"

    def __init__(self, way):
        self.way, self.works, self.sent, self.ended = way, [], 0, False

    def _start_coalescing(self):
        assert not self.works

    def _end_coalescing(self):
        works, self.works = self.works, []
        return Together(works)

    def send(self, tensors, peer, tag):
        self.sent += 1
        self.works.append(self.way.send(tensors, peer, tag))

    def recv(self, tensors, peer, tag):
        self.works.append(self.way.recv(tensors, peer, tag))

    def allreduce(self, tensors):
        return self.way.allreduce(tensors)

    def shutdown(self):
        self.ended = True

    abort = shutdown


class Options:
    pass


def with_two_communicators(rank, world_size, x, method):
    """As over NCCL: exchanges go through communicators of their own, slow ones through another."""
    made = []

    def nccl(store, rank, size, options):
        assert options.is_high_priority_stream
        made.append(Coalescing(dist.ProcessGroupGloo(store, rank, size, options._timeout)))
        return made[-1]

    nccl.Options = Options
    group = Coalescing(dist.group.WORLD)
    p2p = comm.communicator(comm.group_name(None), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
        patch.setattr(comm.P2P, "group", group)
        patch.setattr(p2p, "_coalesces", True)
        patch.setattr(comm, "communicator", lambda *_: p2p)
        patch.setattr("seqpar_attn.autograd.communicator", lambda *_: p2p)
        results = [run(x, method, world_size, rank) for _ in range(2)]
    sent = [group.sent, *(communicator.sent for communicator in made)]
    del group  # the patch and p2p let go of it, too
    gc.collect()
    return results[1], sent, [communicator.ended for communicator in made]


def test_exchanges_have_communicators_of_their_own_and_slow_ones_another(pool):
    x = make_inputs(2 * pool.world_size * 6)
    method = next(m for m in METHODS if m.name == "zigzag-double-2-hosts-by-1")
    ranks = pool.run(with_two_communicators, x, method)
    check_exact(unshard([results for results, *_ in ranks], method), truth(x))
    for _, (of_group, usual, *slow), ended in ranks:
        # Twice keys and values of one block, which take two steps; the sums that go back have one step in so small a
        # ring.
        assert of_group == 0 and usual > 0 and slow == ([4] if pool.world_size == 4 else [])
        assert ended and all(ended), "they end with their group"


def on_mesh(rank, world_size, x: Inputs):
    mesh = dist.init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "sp"))
    layout = seqpar_attn.Zigzag(world_size // 2)
    shards = (layout.shard(t, mesh["sp"].get_local_rank()) for t in (x.q, x.k, x.v))
    out = seqpar_attn.ring_attention(*shards, group=mesh["sp"])
    assert torch.equal(out, seqpar_attn.ring_attention(*(shards_of(x, mesh, layout)), group=mesh.get_group("sp")))
    return seqpar_attn.gather(out, layout, mesh["sp"])


def shards_of(x: Inputs, mesh, layout):
    return [layout.shard(t, mesh["sp"].get_local_rank()) for t in (x.q, x.k, x.v)]


def test_mesh_dimension():
    """A group need not be the world: two rings of two ranks."""
    x = make_inputs(16)
    with RankPool(4, timeout=60) as pool:
        for out in pool.run(on_mesh, x):
            assert (out - truth(x)["out"]).abs().max() < 1e-12


# What goes wrong on one rank must be an error on all of them, with a name, in time -----------------------------------

TIMEOUT = 10.0


def one_call(q_shape=(1, 8, 4, 16), kv_heads=2, dtype=torch.float32, method="ring_attention", **arguments):
    q = torch.randn(q_shape, dtype=dtype)
    k = torch.randn(*q_shape[:2], kv_heads, q_shape[3], dtype=dtype)
    return getattr(seqpar_attn, method)(q, k, k, **arguments)


def differing(rank, world_size, common: dict, odd_rank: int, odd: dict, warm: bool):
    if warm:
        one_call(**common)
    start = time.monotonic()
    try:
        one_call(**(odd if rank == odd_rank else common))
    except (ValueError, seqpar_attn.CommunicationError) as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error", "", time.monotonic() - start


MISMATCHES = {
    "shape": ({}, {"q_shape": (1, 10, 4, 16)}, "q shape"),
    "kv heads": ({}, {"kv_heads": 4}, "k shape"),
    "dtype": ({}, {"dtype": torch.bfloat16}, "dtype"),
    "layout": ({"layout": "zigzag"}, {"layout": "striped"}, "layout"),
    "window": ({"window_size": 4}, {"window_size": 5}, "window_size"),
    "causal": ({}, {"causal": False}, "causal"),
    "documents": ({"cu_seqlens": (0, 9, 24)}, {"cu_seqlens": (0, 8, 24)}, "cu_seqlens"),
    "method": ({"layout": "contiguous"}, {"layout": "contiguous", "method": "dist_flash_attention"}, "method"),
    "softcap": ({}, {"softcap": 3.0}, "softcap"),
    "transfer": ({}, {"transfer": "ring"}, "transfer"),
    "hosts": (
        {"transfer": "double", "ranks_per_host": 3},
        {"transfer": "double", "ranks_per_host": 1},
        "ranks_per_host",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_raises_on_every_rank(three_ranks, name, warm):
    common, odd, field = MISMATCHES[name]
    for kind, message, seconds in three_ranks.run(differing, common, 1, {**common, **odd}, warm):
        assert kind == "ValueError", message
        assert field in message and "rank 1" in message and "expected the same" in message
        assert seconds < TIMEOUT


BAD = {
    "odd zigzag shard": ({"q_shape": (1, 7, 4, 16)}, "divisible by 6"),
    "heads": ({"kv_heads": 3}, "multiple"),
    "unsorted documents": ({"cu_seqlens": (0, 9, 5, 24)}, "ascending"),
    "documents of the shard": ({"cu_seqlens": (0, 8)}, "global length 24"),
    "float documents": ({"cu_seqlens": torch.tensor([0.0, 24.0])}, "integers"),
    "window": ({"window_size": 0}, "window_size"),
    "window type": ({"window_size": 2.5}, "window_size"),
    "layout": ({"layout": "spiral"}, "layout"),
    "backend": ({"backend": "fastest"}, "expected auto or one of"),
    "dropout": ({"dropout_p": 0.1}, "dropout"),
    "hosts": ({"transfer": "double", "ranks_per_host": 2}, "to divide world_size 3, got 2"),
    "hosts of none": ({"ranks_per_host": 3}, "with transfer 'double' and only then"),
    "fraction of a host": ({"transfer": "double", "ranks_per_host": 1.5}, "ranks_per_host to be a positive int"),
    "negative hosts": ({"transfer": "double", "ranks_per_host": -1}, "to divide world_size 3, got -1"),
    "no hosts": ({"transfer": "double"}, "LOCAL_WORLD_SIZE"),
    "hosts of others": ({"transfer": "double", "method": "dist_flash_attention"}, "with ring_attention only"),
    "dimensions": ({"q_shape": (8, 4, 16)}, "batch, seqlen"),
}


def bad_everywhere(rank, world_size, arguments: dict, everywhere: bool):
    start = time.monotonic()
    try:
        if len(arguments.get("q_shape", (0, 0, 0, 0))) == 3 and (everywhere or rank == 1):
            x = torch.randn(arguments["q_shape"])
            seqpar_attn.ring_attention(x, x, x)
        one_call(**(arguments if everywhere or rank == 1 else {}))
    except (ValueError, seqpar_attn.CommunicationError) as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error", "", time.monotonic() - start


@pytest.mark.parametrize("everywhere", [True, False], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_on_every_rank(three_ranks, name, everywhere):
    arguments, words = BAD[name]
    for kind, message, seconds in three_ranks.run(bad_everywhere, arguments, everywhere):
        assert kind == "ValueError", message
        assert words in message and "expected" in message and ("got" in message or "not supported" in message)
        assert everywhere or "rank 1" in message
        assert seconds < TIMEOUT


@pytest.fixture(scope="module")
def three_ranks():
    with RankPool(3, timeout=60) as pool:
        yield pool


def outsider(rank, world_size):
    group = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match="with this rank"):
            one_call(group=group)
        return None
    return one_call(q_shape=(1, 6, 4, 16), group=group).shape


def test_group_without_this_rank(three_ranks):
    assert three_ranks.run(outsider)[:2] == [(1, 6, 4, 16)] * 2


def hosts_of_groups(rank, world_size):
    found = []
    for local, ranks in ((1, None), (3, None), (2, None), (2, [0, 2]), (2, [1, 2]), ("x", None)):
        os.environ["LOCAL_WORLD_SIZE"] = str(local)
        group = dist.new_group(ranks)
        if ranks is None or rank in ranks:
            try:
                found.append(comm.find_ranks_per_host(comm.group_name(group)))
            except ValueError as error:
                found.append(str(error).partition(",")[0])
    del os.environ["LOCAL_WORLD_SIZE"]
    return found


def test_hosts_of_groups(three_ranks):
    """Ranks 0 and 1 on one host and rank 2 on another, among others."""
    uneven, untold = "expected a group's ranks host by host", "expected ranks_per_host"
    expected = [1, 3, uneven, 1, untold]
    assert three_ranks.run(hosts_of_groups) == [expected, expected, [1, 3, uneven, 1, 1, untold]]


def groups_come_and_go(rank, world_size):
    for _ in range(3):
        group = dist.new_group()
        one_call(group=group)
        dist.destroy_process_group(group)
    one_call(group=dist.new_group())
    return [made.base.group in dist.distributed_c10d._world.pg_map for made in comm.transports._known.values()]


def test_destroyed_groups_are_forgotten(three_ranks):
    for alive in three_ranks.run(groups_come_and_go):
        assert alive and all(alive)


def dies(rank, world_size, where: str):
    dist.barrier()
    if rank == 1 and where == "before":
        os._exit(3)
    if rank == 1 and where == "inside":
        comm = seqpar_attn.comm.communicator(seqpar_attn.comm.group_name(None), torch.device("cpu"))
        comm.exchange = lambda *_: os._exit(3)
    start = time.monotonic()
    try:
        one_call(q_shape=(1, 1024, 4, 16))
    except seqpar_attn.CommunicationError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


@pytest.mark.parametrize("where", ["before", "inside"])
def test_dead_peer_raises(where):
    with RankPool(3, timeout=12) as pool:
        outcomes = pool.outcomes(dies, where, timeout=40)
    assert "exit code 3" in outcomes[1].error
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error is None, outcome.error
        message, seconds = outcome.result
        assert message != "no error" and ("[1]" in message or "ranks [" in message)
        assert seconds < 20


def absent(rank, world_size):
    if rank == 2:
        time.sleep(9)
        return None
    try:
        one_call()
    except seqpar_attn.CommunicationError as error:
        return str(error)
    return "no error"


def test_absent_peer_is_named():
    with RankPool(3, timeout=5) as pool:
        outcomes = pool.outcomes(absent, timeout=30)
    for outcome in outcomes[:2]:
        assert "[2]" in outcome.result and "did not join" in outcome.result


def test_handshake_fields_cover_the_call():
    """A new argument of Call cannot be forgotten in the comparison."""
    from seqpar_attn import kernels
    from seqpar_attn.autograd import describe
    from seqpar_attn.validation import Call

    call = Call("ring", "pull", "zigzag", True, None, None, None, 1.0, "auto", False)
    x = torch.zeros(1, 2, 1, 8)
    described = describe(x, x, call, kernels.get("reference"))
    assert {f.name for f in dataclasses.fields(Call)} <= described.keys()
    # A rank whose tensors are elsewhere may be at another handshake, whose only field in common is the first one.
    assert next(iter(described)) == "device"
    # Accumulators travel in a kernel's own form, so ranks for which "auto" chose different ones must not go on.
    assert described["chosen backend"] == "reference (ReferenceKernel)" != describe(x, x, call, None)["chosen backend"]
