"""How a group gets its transport: the choice by itself from made-up facts, and all that surrounds it on real ranks.

On CPUs there is nothing to choose; ranks of these tests are told that there is, and then have memory that processes
share where GPUs map each other's.
"""

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from attention_cases import METHODS, check_exact, make_inputs, run, truth, unshard

import seqpar_attn
from seqpar_attn import LoopbackGroup
from seqpar_attn.comm import communicator, set_transport, transport, transports
from seqpar_attn.comm.choice import Facts, choose, usual_limit
from seqpar_attn.testing.distributed import RankPool

DEVICE = torch.device("cpu")

# The choice ----------------------------------------------------------------------------------------------------------


def facts(count=4, **odd):
    """Ranks of one host whose GPUs all reach each other; ``odd``: what is different on the last one."""
    gpus = tuple(f"gpu{i}" for i in range(count))
    usual = [Facts("host", gpu, gpus, tuple(x for x in gpus if x != gpu), "2.13.0", 80 << 30) for gpu in gpus]
    return [*usual[:-1], Facts(**vars(usual[-1]) | odd)]


def test_gpus_of_one_host():
    assert choose(facts()) == ("symmetric", "4 GPUs of one host with access to each other's memory")
    assert choose(facts(2)).name == "symmetric"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"host": "another"}, "the ranks are on 2 hosts"),
        ({"reaches": ("gpu0", "gpu2")}, "the GPU of rank 3 has no access to the memory of rank 1's"),
        ({"sees": ("gpu3",), "reaches": ()}, "rank 3 does not see the GPU of rank 0"),
        ({"gpu": "gpu0"}, "several ranks share a GPU"),
        ({"torch": "2.11.0"}, "rank 0 has torch 2.13.0 and rank 3 2.11.0"),
        ({"lacks": "the CUDA driver is too old"}, "rank 3: the CUDA driver is too old"),
        ({"capturing": True}, "the first call of rank 3 was captured in a CUDA graph"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_keeps_a_group_from_it(odd, words):
    name, reason = choose(facts(**odd))
    assert name == "p2p" and words in reason


def test_a_backend_that_cannot_send_between_gpus():
    """gloo: several ranks may share a GPU; all else is as before."""
    shared = [Facts("host", "gpu0", ("gpu0",), (), "2.13.0", 80 << 30, sends=False) for _ in range(3)]
    assert choose(shared).name == "symmetric" and "share" in choose(shared).reason
    apart = [Facts(**vars(x) | {"host": x.gpu}) for x in facts()]
    assert choose(apart).name == "p2p"


def test_a_limit_that_nobody_set():
    """Of the smallest GPU; none where there is no other transport."""
    assert usual_limit(facts()) == (80 << 30) // 6
    assert usual_limit(facts(memory=40 << 30)) == (40 << 30) // 6
    assert usual_limit([Facts(**vars(x) | {"sends": False}) for x in facts()]) is None


# Real ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    with RankPool(3, timeout=60) as pool:
        yield pool


@contextlib.contextmanager
def as_on_gpus(rank, world_size, group=None, **odd):
    """``group`` (the default one) has a choice; ``odd``: facts that are different on the last rank."""
    set_transport(group, "auto")
    own = facts(world_size, **odd)[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "_no_choice", lambda base: None)
        patch.setattr(transports, "_facts", lambda base: own)
        yield patch
    set_transport(group, "auto")


def attend(rank, world_size, x):
    return run(x, METHODS[0], world_size, rank)


def on_cpus(rank, world_size, x):
    before = transport(None)
    results = attend(rank, world_size, x)
    return before, results, transport(None)


def test_cpus_have_no_choice(pool):
    x = make_inputs(12 * pool.world_size)
    for before, _, after in pool.run(on_cpus, x):
        assert before == ("auto", "the first call decides")
        assert after == ("p2p", "the tensors are on CPUs")
    assert transport(LoopbackGroup(3)).name == "loopback"


def chosen(rank, world_size, x, odd):
    with as_on_gpus(rank, world_size, **odd):
        results = attend(rank, world_size, x)
        return transport(None), communicator(dist.group.WORLD.group_name, DEVICE).name, results


def test_the_first_call_decides(pool):
    x = make_inputs(12 * pool.world_size)
    ranks = pool.run(chosen, x, {})
    assert {(choice.name, name) for choice, name, _ in ranks} == {("symmetric", "symmetric")}
    check_exact(unshard([results for *_, results in ranks], METHODS[0]), truth(x))
    ranks = pool.run(chosen, x, {"host": "another"})
    assert {(*choice, name) for choice, name, _ in ranks} == {("p2p", "the ranks are on 2 hosts", "p2p")}


def broken(rank, world_size, x, explicit, where):
    """The last rank cannot do its part of the set-up."""
    with as_on_gpus(rank, world_size) as patch:
        if explicit:
            set_transport(None, "symmetric")
        if rank == world_size - 1:

            def fails(*_, **__):
                raise RuntimeError("no such memory")

            patch.setattr(torch, "from_file", fails) if where == "map" else patch.setattr("os.truncate", fails)
        try:
            results = attend(rank, world_size, x)
        except seqpar_attn.CommunicationError as error:
            return str(error), None
        return transport(None), results


@pytest.mark.parametrize("where", ["map", "make"])
def test_a_set_up_that_fails_on_one_rank(pool, where):
    x = make_inputs(12 * pool.world_size)
    ranks = pool.run(broken, x, False, where)
    assert {choice.name for choice, _ in ranks} == {"p2p"}
    assert all("rank 2 could not" in choice.reason and "no such memory" in choice.reason for choice, _ in ranks)
    check_exact(unshard([results for _, results in ranks], METHODS[0]), truth(x))
    for message, _ in pool.run(broken, x, True, where):
        assert "rank 2 could not" in message and message.endswith("use set_transport(group, 'p2p')")


def limited(rank, world_size, inputs, limit, explicit, variable):
    with as_on_gpus(rank, world_size) as patch:
        if variable:
            patch.setenv(transports.LIMIT, str(limit))
        set_transport(None, "symmetric" if explicit else "auto", None if variable else limit)
        found = []
        for x in inputs:
            try:
                found.append((attend(rank, world_size, x), transport(None)))
            except ValueError as error:
                found.append((str(error), transport(None)))
        return found


@pytest.mark.parametrize("variable", [False, True], ids=["argument", "variable"])
def test_a_limit_that_is_too_small(pool, variable):
    """One call fits, the next one's forward pass does not."""
    inputs = [make_inputs(tokens * pool.world_size, nheads_kv=1) for tokens in (2, 64, 2)]
    limit = 4000
    ranks = pool.run(limited, inputs, limit, False, variable)
    for i, x in enumerate(inputs):
        check_exact(unshard([found[i][0] for found in ranks], METHODS[0]), truth(x))
    for (_, first), (_, second), (_, third) in ranks:
        assert first.name == "symmetric" and second.name == "p2p" and second == third
        assert f"got {limit}" in second.reason
    messages = set()
    for (_, _), (message, choice), (last, _) in pool.run(limited, inputs, limit, True, variable):
        assert choice.name == "symmetric" and isinstance(last, dict), "a smaller call goes on"
        messages.add(message)
    (message,) = messages
    assert "expected a limit of at least " in message and f"got {limit}" in message
    assert "set_transport(group, 'p2p')" in message


def test_a_limit_that_only_the_backward_pass_exceeds(pool):
    inputs = [make_inputs(16 * pool.world_size, nheads_kv=1)]

    def needed(limit):
        message = pool.run(limited, inputs, limit, True, False)[0][0][0]
        return int(re.search("at least ([0-9]+) bytes", message)[1])

    forward = needed(1)
    assert needed(forward) > forward, "the forward pass of this call was not the one that had too little"
    ranks = pool.run(limited, inputs, forward, False, False)
    assert {found[0][1].name for found in ranks} == {"p2p"}
    check_exact(unshard([found[0][0] for found in ranks], METHODS[0]), truth(inputs[0]))


def bad_arguments(rank, world_size):
    found = []
    for arguments in [("symmetric", 0), ("symmetric", True), ("p2p", 10), ("symmetric", 10 + (rank == 1))]:
        try:
            set_transport(None, *arguments)
        except ValueError as error:
            found.append(str(error))
    with as_on_gpus(rank, world_size) as patch:
        for value in ("many", str(5 + rank)):
            patch.setenv(transports.LIMIT, value)
            try:
                attend(rank, world_size, make_inputs(2 * world_size))
            except ValueError as error:
                found.append(str(error))
    return found


def test_bad_limits_are_errors_everywhere(pool):
    for found in pool.run(bad_arguments):
        assert len(found) == 6
        assert found[0].startswith("rank 0: expected limit to be a positive number of bytes or None, got 0; rank 1: ")
        assert "got True" in found[1] and "expected no limit for 'p2p'" in found[2]
        assert "expected the same limit on every rank, got 10 on rank 0 and 11 on rank 1" in found[3]
        assert "expected SEQPAR_ATTN_ARENA_LIMIT to be a positive number of bytes, got 'many'" in found[4]
        assert "expected the same arena limit on every rank, got 5 on rank 0 and 6 on rank 1" in found[5]


def undecided(rank, world_size, x):
    """One rank is where nothing is to be decided, as if only its tensors were on the CPU."""
    with as_on_gpus(rank, world_size) as patch:
        if rank == 1:
            patch.setattr(transports, "_no_choice", lambda base: "the tensors are on CPUs")
        try:
            attend(rank, world_size, x)
        except ValueError as error:
            message = str(error)
    return message, attend(rank, world_size, x)


def test_a_rank_that_does_not_choose_is_an_error_everywhere(pool):
    x = make_inputs(12 * pool.world_size)
    ranks = pool.run(undecided, x)
    words = "expected the same direction on every rank, got 'choice of a transport' on rank 0 and 'forward' on rank 1"
    assert {message for message, _ in ranks} == {words}
    check_exact(unshard([results for _, results in ranks], METHODS[0]), truth(x))


def losses(rank, world_size, logits, labels):
    """Of a group whose attention has the symmetric transport: the loss is still that of all ranks' tokens."""
    set_transport(None, "symmetric")
    try:
        part = slice(rank * logits.shape[1] // world_size, (rank + 1) * logits.shape[1] // world_size)
        return seqpar_attn.cross_entropy(logits[:, part], labels[:, part], group=dist.group.WORLD).item()
    finally:
        set_transport(None, "auto")


def test_losses_know_the_ranks_of_such_a_group(pool):
    logits, labels = torch.randn(1, 12, 7, dtype=torch.float64), torch.randint(0, 7, (1, 12))
    labels[:, :5] = -100
    whole = seqpar_attn.cross_entropy(logits, labels, group=LoopbackGroup(1)).item()
    parts = pool.run(losses, logits, labels)
    assert sum(parts) == pytest.approx(whole, rel=1e-12)
