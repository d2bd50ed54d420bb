"""The schedule of a ring of hosts around a ring of ranks in each: proved, priced, and played with transfers that really
take as long as they may."""

import dataclasses
import functools

import pytest
import torch
from attention_cases import METHODS, check_exact, make_inputs, run, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import masks

import seqpar_attn
from seqpar_attn import LoopbackGroup
from seqpar_attn.comm import find_ranks_per_host, loopback
from seqpar_attn.layout import get_layout
from seqpar_attn.mask import Mask
from seqpar_attn.plan import make_plan
from seqpar_attn.schedule import (
    Kind,
    Rates,
    ScheduleError,
    build_schedule,
    format_schedule,
    simulate_schedule,
    validate_schedule,
)
from seqpar_attn.testing.steps import ring_steps

SHARD = 4
DOUBLE = [m for m in METHODS if m.transfer == "double"]
WEIGHTS = {Kind.KV: 1.0, Kind.QUERY: 1.0, Kind.OUT: 2.0, Kind.DQ: 2.0, Kind.DKV: 2.0}
"""Bytes: gradients are float32, everything else half of that."""


def build(hosts, per_host, backward=False, layout="zigzag", owners=1, transfer="double", **mask):
    world_size = hosts * per_host
    spans = get_layout(layout, world_size).chunks(world_size * SHARD)
    return build_schedule(
        "ring",
        spans,
        Mask(world_size * SHARD, **mask),
        backward=backward,
        transfer=transfer,
        owners_per_step=owners,
        ranks_per_host=per_host if transfer == "double" else None,
    )


def sends(schedule):
    return [(s, r, t) for s, row in enumerate(schedule.steps) for r, cell in enumerate(row) for t in cell.sends]


def crossing(schedule, per_host, kind):
    """(sender, receiver, tokens) of what crosses between hosts."""
    return [
        (r, t.peer, schedule.length(t.block))
        for _, r, t in sends(schedule)
        if t.kind is kind and r // per_host != t.peer // per_host
    ]


# Proofs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_causal_schedules_are_right(layout, hosts):
    for per_host in (1, 2, 3, 4, 8):
        if hosts * per_host <= (32 if layout == "zigzag" else 16):
            for owners in (1, 2):
                for backward in (False, True):
                    validate_schedule(build(hosts, per_host, backward, layout, owners))


@settings(max_examples=200, deadline=None)
@given(masks(), st.data(), st.sampled_from(["zigzag", "contiguous", "striped"]), st.booleans(), st.sampled_from([1, 2]))
def test_any_mask_is_right(case, data, layout, backward, owners):
    world_size, shard, mask = case
    per_host = data.draw(st.sampled_from([n for n in range(1, world_size + 1) if world_size % n == 0]))
    seqlen = world_size * shard
    validate_schedule(
        build_schedule(
            "ring",
            get_layout(layout, world_size).chunks(seqlen),
            Mask(seqlen, **mask),
            backward=backward,
            transfer="double",
            owners_per_step=owners,
            ranks_per_host=per_host,
        )
    )


@pytest.mark.parametrize(
    "hosts,per_host,layout,mask",
    [
        (4, 3, "zigzag", {"window_size": 13, "cu_seqlens": (0, 1, 6, 13, 18, 48)}),
        (3, 3, "contiguous", {"window_size": 10, "cu_seqlens": (0, 6, 36)}),
        (2, 2, "zigzag", {"causal": False, "cu_seqlens": (0, 8, 14, 16)}),
    ],
)
def test_a_sum_that_holds_a_travelling_chunk_is_not_added_to(hosts, per_host, layout, mask):
    """Documents let the two chunks of a shard end on different ranks: one travels on from a slot in which the other is
    a host's sum, to which parts will be added."""
    validate_schedule(build(hosts, per_host, True, layout, **mask))


@pytest.mark.parametrize("hosts,per_host", [(2, 2), (2, 8), (3, 4), (8, 2)])
def test_every_step_costs_the_same_on_every_rank(hosts, per_host):
    for backward in (False, True):
        schedule = build(hosts, per_host, backward)
        areas = [[sum(task.area for task in cell.tasks) for cell in row] for row in schedule.steps]
        working = areas[: hosts * per_host]
        assert working[0] == [SHARD * (SHARD + 1) // 2] * hosts * per_host
        assert all(row == [SHARD * SHARD // 2] * hosts * per_host for row in working[1:])
        assert not any(map(any, areas[hosts * per_host :]))


@pytest.mark.parametrize("hosts,per_host", [(2, 2), (2, 8), (4, 4), (8, 2)])
def test_a_shard_crosses_to_a_host_once_between_ranks_of_one_number(hosts, per_host):
    """An early chunk is read on later hosts, both chunks on earlier ones; sums of gradients come back by the same
    ways. A single ring has as many crossings for every rank of a host."""
    pairs = hosts * (hosts - 1) // 2
    expected = pairs * per_host * (SHARD // 2 + SHARD)
    for backward, kind in ((False, Kind.KV), (True, Kind.KV), (True, Kind.DKV)):
        found = crossing(build(hosts, per_host, backward), per_host, kind)
        assert sum(tokens for *_, tokens in found) == expected
        assert all((a - b) % per_host == 0 for a, b, _ in found)
        by_sender = [sum(n for a, _, n in found if a % per_host == number) for number in range(per_host)]
        assert len(set(by_sender)) == 1  # every adapter carries as much
    pulled = crossing(build(hosts, per_host, transfer="pull"), per_host, Kind.KV)
    assert sum(tokens for *_, tokens in pulled) == per_host * expected


def test_a_window_crosses_only_where_it_reaches():
    """One rank of each host reads the last rank of the host before: straight from it, and nothing else crosses."""
    per_host = 4
    for backward, kind in ((False, Kind.KV), (True, Kind.DKV)):
        schedule = build(3, per_host, backward, "contiguous", window_size=2)
        found = crossing(schedule, per_host, kind)
        assert sorted(found) == [(3, 4, 2), (7, 8, 2)] if kind is Kind.KV else sorted(found) == [(4, 3, 2), (8, 7, 2)]
        assert sum(any(cell.tasks for cell in row) for row in schedule.steps) == 3
    documents = tuple(range(0, 12 * SHARD + 1, SHARD))
    assert not sends(build(3, per_host, True, "contiguous", cu_seqlens=documents))


@pytest.mark.parametrize("owners,keys,gradients", [(1, 4, 5), (2, 9, 11)])
def test_few_buffers(owners, keys, gradients):
    """Whatever the number of hosts."""
    for hosts in (2, 4, 8):
        schedule = build(hosts, 4, True, owners=owners)
        assert schedule.slots(Kind.KV) <= keys and schedule.slots(Kind.DKV) <= gradients
    assert build(2, 4, True, owners=7) == build(2, 4, True, owners=2)


def test_slow_transfers_are_shown():
    assert "kv0~>2" in format_schedule(build(2, 2))


# What validation must find -------------------------------------------------------------------------------------------


def changed(schedule, wanted, step=0, **changes):
    """With every transfer that ``wanted`` names (a send, or its receive) changed and posted ``step`` later."""
    rows = [[dataclasses.replace(cell, sends=(), receives=()) for cell in row] for row in schedule.steps]
    for s, row in enumerate(schedule.steps):
        for r, cell in enumerate(row):
            for side in ("sends", "receives"):
                for t in getattr(cell, side):
                    ends = (r, t.peer) if side == "sends" else (t.peer, r)
                    found = wanted(s, *ends, t)
                    new = dataclasses.replace(t, **changes) if found else t
                    at = s + step if found else s
                    before = getattr(rows[at][r], side)
                    rows[at][r] = dataclasses.replace(rows[at][r], **{side: (*before, new)})
    return dataclasses.replace(schedule, steps=tuple(tuple(row) for row in rows))


def first_slow(schedule, kind):
    return next((s, r, t.peer) for s, r, t in sends(schedule) if t.steps > 1 and t.kind is kind)


def test_validation_finds_faults_of_slow_transfers():
    forward, backward = build(3, 3), build(3, 3, backward=True)
    validate_schedule(changed(forward, lambda *_: False))
    where = first_slow(forward, Kind.KV)
    ours = lambda s, a, b, t: (s, a, b) == where and t.steps > 1  # noqa: E731
    with pytest.raises(ScheduleError, match=r"does not hold|received into while used"):
        validate_schedule(changed(forward, ours, steps=4))  # it would land after its first use
    with pytest.raises(ScheduleError, match="does not end with a step"):
        validate_schedule(changed(forward, ours, steps=99))
    shorter = changed(forward, ours, steps=2)
    validate_schedule(shorter)
    one_sided = [list(row) for row in forward.steps]
    one_sided[where[0]][where[2]] = shorter.steps[where[0]][where[2]]
    with pytest.raises(ScheduleError, match="which expects"):
        validate_schedule(dataclasses.replace(forward, steps=tuple(map(tuple, one_sided))))
    # A sum of gradients is sent while the last part is still being added to it.
    where = first_slow(backward, Kind.DKV)
    with pytest.raises(ScheduleError, match=r"while sent|does not hold"):
        validate_schedule(changed(backward, ours, step=-1))


def test_validation_finds_overtaking():
    """Both kinds of slow transfers go from host 1 to host 0; if one that begins later ended earlier, a transport that
    counts them would take one for the other."""
    schedule = build(4, 5, backward=True)
    slow = {(s, a, t.peer): t for s, a, t in sends(schedule) if t.steps > 1}
    other = next(y for x in slow for y in slow if x[1:] == y[1:] and x[0] < y[0] < x[0] + slow[x].steps - 2)
    with pytest.raises(ScheduleError, match="overtakes"):
        validate_schedule(changed(schedule, lambda *x: x[:3] == other and x[3].steps > 1, steps=2))


def test_bad_hosts():
    spans = get_layout("zigzag", 4).chunks(16)
    for transfer, per_host, words in (
        ("double", None, "expected ranks_per_host with transfer 'double'"),
        ("pull", 2, "and only then"),
        ("double", 3, "to divide world_size 4, got 3"),
        ("double", 0, "to divide world_size 4, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            build_schedule("ring", spans, Mask(16), transfer=transfer, ranks_per_host=per_host)
    with pytest.raises(ValueError, match="expected method 'ring'"):
        build_schedule("dist_flash", spans, Mask(16), transfer="double", ranks_per_host=2)


# Prices --------------------------------------------------------------------------------------------------------------


def simulated(schedule, per_host, adapter):
    """A step computes for ``SHARD * SHARD / 2`` seconds; links inside hosts are fast."""
    return simulate_schedule(
        schedule,
        Rates(1.0, WEIGHTS),
        bandwidth=lambda a, b: 100.0 if a // per_host == b // per_host else adapter,
        host=lambda rank: rank // per_host,
    )


def enough(per_host, backward):
    """Bytes per second by which a shard's keys, and their gradients, cross within a turn of the inner ring."""
    weight = WEIGHTS[Kind.KV] + (WEIGHTS[Kind.DKV] if backward else 0.0)
    return 1.1 * SHARD * weight / (per_host * SHARD * SHARD / 2)


@pytest.mark.parametrize(
    "hosts,per_host,backward,gain",
    [(2, 8, False, 6.5), (2, 8, True, 3.5), (8, 4, True, 3), (16, 4, False, 3.3), (32, 2, False, 1.7)],
)
def test_slow_adapters_are_hidden_behind_a_turn_of_the_inner_ring(hosts, per_host, backward, gain):
    """``gain``: how many times as long a single ring takes."""
    adapter = enough(per_host, backward)
    double = build(hosts, per_host, backward)
    found = simulated(double, per_host, adapter)
    last = SHARD * WEIGHTS[Kind.DKV] / adapter if backward else 0.0  # the last sums have nothing to hide behind
    assert found.makespan <= 1.01 * max(found.busy) + 1.02 * last
    single = simulated(build(hosts, per_host, backward, transfer="pull"), per_host, adapter)
    assert single.makespan > gain * found.makespan
    # It is the early start that does it: with transfers that begin in the last step that they have, it is slower.
    in_time = double
    for steps in {t.steps for _, _, t in sends(double) if t.steps > 1}:
        in_time = changed(in_time, lambda *x, n=steps: x[-1].steps == n, step=steps - 1, steps=1)
    if hosts <= 8:
        validate_schedule(in_time)
    assert simulated(in_time, per_host, adapter).makespan > (1.05 if hosts == 2 else 1.25) * found.makespan


def test_many_hosts_are_priced():
    """64 of them: what a rank sends does not depend on where in a host it is."""
    found = simulated(build(64, 2), 2, enough(2, False))
    assert found.makespan == max(found.busy) and max(found.exposed) == 0.0


def test_links_inside_hosts_and_adapters_work_at_the_same_time():
    schedule = build(2, 4)
    rates = Rates(1e30, WEIGHTS, 1.0)
    one = simulate_schedule(schedule, rates).makespan
    assert simulate_schedule(schedule, rates, host=lambda rank: 0).makespan == one
    assert simulate_schedule(schedule, rates, host=lambda rank: rank // 4).makespan < one


# Playing -------------------------------------------------------------------------------------------------------------


class Handle:
    def __init__(self, copies):
        self.copies = copies

    def wait(self):
        for target, source in self.copies:
            target.copy_(source)


class AsLate(loopback.Loopback):
    """Transfers copy when they are waited for, and what they will overwrite is spoilt at once. So nothing may be read
    before it is due, nor written where it is still being sent."""

    def __init__(self, world_size):
        super().__init__(world_size)
        self.slow = self.flying = 0

    def exchange(self, sends, receives, *, slow=False):
        sent = {}
        for rank, messages in enumerate(sends):
            for peer, tensor in messages:
                sent.setdefault((rank, peer), []).append(tensor)
        copies = [(x, sent[peer, rank].pop(0)) for rank, messages in enumerate(receives) for peer, x in messages]
        for target, _ in copies:
            target.fill_(float("nan"))
        self.slow += slow * len(copies)
        return Handle(copies)


@pytest.mark.parametrize("mask", ["causal", "full", "packed", "window"])
@pytest.mark.parametrize("method", DOUBLE, ids=lambda m: m.name)
def test_nothing_is_used_before_it_is_due(method, mask, monkeypatch):
    comm = AsLate(8)
    monkeypatch.setattr("seqpar_attn.comm.transports._loopback", functools.lru_cache(lambda world_size: comm))
    x = make_inputs(8 * 6, mask)
    check_exact(run(x, method, 8), truth(x))
    assert comm.slow > 0 or method.owners is None or method.hosts == 4


def test_handshakes_and_passes_know_of_slow_transfers():
    with ring_steps(8):
        plan = make_plan("ring", "double", "zigzag", 8, Mask(64), 4)
        assert plan.program(False, (1,)).slow and plan.program(True, (1,)).slow
        assert not make_plan("ring", "double", "zigzag", 8, Mask(64), 1).program(True, (1,)).slow
        assert not make_plan("ring", "pull", "zigzag", 8, Mask(64)).program(True, (1,)).slow


def test_virtual_ranks_have_no_hosts():
    x = torch.zeros(1, 8, 2, 8)
    with pytest.raises(ValueError, match="expected ranks_per_host for virtual ranks"):
        seqpar_attn.ring_attention(x, x, x, group=LoopbackGroup(2), transfer="double")
    with pytest.raises(ValueError, match="expected transfer 'double' with ring_attention only, got it with 'usp'"):
        seqpar_attn.usp_attention(x, x, x, group=(LoopbackGroup(2), LoopbackGroup(2)), transfer="double")
    with pytest.raises(ValueError, match="expected transfer 'double' with ring_attention only"):
        seqpar_attn.dist_flash_attention(x, x, x, group=LoopbackGroup(2), transfer="double")
    with pytest.raises(ValueError, match="virtual ranks"):
        find_ranks_per_host("loopback:4")


def test_torch_compile_sees_one_operator():
    x = make_inputs(32, dtype=torch.float32)

    def model(q, k, v):
        out = seqpar_attn.ring_attention(q, k, v, group=LoopbackGroup(4), transfer="double", ranks_per_host=2)
        return out.cos()

    assert torch.equal(model(x.q, x.k, x.v), torch.compile(model, fullgraph=True, backend="eager")(x.q, x.k, x.v))
