"""Schedules are proved: for every world size, method, transfer and mask."""

import dataclasses
import itertools
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar_attn.layout import get_layout
from seqpar_attn.mask import Mask, MaskKind, Span
from seqpar_attn.schedule import (
    Kind,
    Rates,
    ScheduleError,
    build_schedule,
    format_schedule,
    simulate_schedule,
    validate_schedule,
)

# (name, method, layout, transfer, ranks whose keys a step attends, whether half of the own work comes last)
METHODS = [
    ("zigzag", "ring", "zigzag", "pull"),
    ("zigzag-by-2", "ring", "zigzag", "pull", 2),
    ("zigzag-by-5", "ring", "zigzag", "pull", 5),
    ("zigzag-own-last", "ring", "zigzag", "pull", 1, True),
    ("zigzag-own-last-by-4", "ring", "zigzag", "pull", 4, True),
    ("contiguous-own-last-by-2", "ring", "contiguous", "pull", 2, True),
    ("contiguous-by-3", "ring", "contiguous", "pull", 3),
    ("zigzag-ring", "ring", "zigzag", "ring"),
    ("zigzag-gather", "ring", "zigzag", "all_gather"),
    ("contiguous", "ring", "contiguous", "pull"),
    ("contiguous-ring", "ring", "contiguous", "ring"),
    ("contiguous-gather", "ring", "contiguous", "all_gather"),
    ("striped", "ring", "striped", "pull"),
    ("striped-ring", "ring", "striped", "ring"),
    ("striped-gather", "ring", "striped", "all_gather"),
    ("dist_flash", "dist_flash", "contiguous", "pull"),
    ("dist_flash-ring", "dist_flash", "contiguous", "ring"),
]
IDS = [m[0] for m in METHODS]
BY_NAME = {m[0]: m for m in METHODS}


def build(method, world_size, shard, backward=False, **mask):
    _, name, layout, transfer, owners, own_last = (*method, *(1, False)[len(method) - 4 :])
    seqlen = world_size * shard
    spans = get_layout(layout, world_size).chunks(seqlen)
    return build_schedule(
        name,
        spans,
        Mask(seqlen, **mask),
        backward=backward,
        transfer=transfer,
        owners_per_step=owners,
        own_last=own_last and backward and mask.get("causal", True),
    )


# All small world sizes, and large ones as chance wants it: with every one of them this takes six minutes.
SMALL, LARGE = range(1, 21), range(21, 65)
CHANCE = 5 if "SEQPAR_ATTN_REPEAT" not in os.environ else len(LARGE)


@pytest.mark.parametrize("sizes", ["small", "large"])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_causal_schedules_are_right_for_every_world_size(method, sizes):
    for size in SMALL if sizes == "small" else [64, *random.sample(LARGE, CHANCE)]:
        validate_schedule(build(method, size, 4))
        validate_schedule(build(method, size, 4, backward=True))


@st.composite
def masks(draw):
    world_size = draw(st.integers(1, 12))
    shard = 2 * draw(st.integers(1, 5))
    seqlen = world_size * shard
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, seqlen + 3)) if causal else None
    cuts = draw(st.none() | st.lists(st.integers(0, seqlen), max_size=6))
    cu_seqlens = None if cuts is None else (0, *sorted(cuts), seqlen)
    return world_size, shard, {"causal": causal, "window_size": window, "cu_seqlens": cu_seqlens}


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from(METHODS), st.booleans())
def test_any_mask_is_right_and_kinds_are_true(case, method, backward):
    world_size, shard, mask = case
    schedule = build(method, world_size, shard, backward, **mask)
    validate_schedule(schedule)
    for task in (task for row in schedule.steps for step in row for task in step.tasks):
        queries, keys = ([p for c in b.chunks for p in positions(schedule.span(c))] for b in (task.query, task.key))
        seen = {
            (i, j)
            for (i, query), (j, key) in itertools.product(enumerate(queries), enumerate(keys))
            if schedule.mask.interval(query)[0] <= key < schedule.mask.interval(query)[1]
        }
        assert len(seen) == task.area > 0
        if task.kind is MaskKind.FULL:
            assert len(seen) == len(queries) * len(keys)
        if task.kind is MaskKind.CAUSAL:
            assert seen == {(i, j) for i in range(len(queries)) for j in range(len(keys)) if j <= i + task.offset}


def positions(span: Span) -> list[int]:
    return [span.position(i) for i in range(span.length)]


@settings(max_examples=300, deadline=None)
@given(masks(), st.data())
def test_area_counts_pairs(case, data):
    world_size, shard, arguments = case
    mask = Mask(world_size * shard, **arguments)
    stride = data.draw(st.integers(1, 4))

    def span():
        start = data.draw(st.integers(0, mask.seqlen - 1))
        return Span(start, data.draw(st.integers(0, (mask.seqlen - 1 - start) // stride + 1)), stride)

    query, key = span(), span()
    counted = sum(mask.interval(i)[0] <= j < mask.interval(i)[1] for i in positions(query) for j in positions(key))
    assert mask.area(query, key) == counted


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7, 8, 16, 31, 64])
def test_balance(world_size):
    """Zigzag: every step costs the same on every rank. DistFlashAttn: a makespan of W / 2 blocks at every W."""
    shard = 8
    block = shard * shard
    rates = Rates(1.0, dict.fromkeys(Kind, 0.0))
    zigzag = build(BY_NAME["zigzag"], world_size, shard)
    for step, row in enumerate(zigzag.steps):
        areas = [sum(task.area for task in cell.tasks) for cell in row]
        assert areas == [block // 2 if step else shard * (shard + 1) // 2] * world_size
    diagonal = shard * (shard + 1) // 2
    ideal = (world_size - 1) * block // 2 + diagonal
    assert simulate_schedule(zigzag, rates).makespan == ideal
    assert simulate_schedule(build(BY_NAME["dist_flash"], world_size, shard), rates).makespan == ideal
    plain = simulate_schedule(build(BY_NAME["contiguous"], world_size, shard), rates).makespan
    assert plain == diagonal + (world_size - 1) * block


def sent_tokens(schedule, kind):
    return sum(schedule.length(t.block) for row in schedule.steps for step in row for t in step.sends if t.kind is kind)


@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
def test_zigzag_moves_only_what_is_read(world_size):
    """An early chunk is read by everybody, a late one by lower ranks only: 3/4 of what a plain ring moves."""
    shard = 4
    moved = sent_tokens(build(BY_NAME["zigzag"], world_size, shard), Kind.KV)
    assert moved == world_size * (world_size - 1) * shard * 3 // 4


def test_windows_and_documents_drop_tasks_and_transfers():
    world_size, shard = 8, 16
    whole = build(BY_NAME["contiguous"], world_size, shard)
    window = build(BY_NAME["contiguous"], world_size, shard, window_size=5)
    assert len(window.steps) == 2
    assert all(t.peer == rank + 1 for rank, cell in enumerate(window.steps[0]) for t in cell.sends)
    # The window reaches four keys back: half a shard is read, half is moved.
    assert sent_tokens(window, Kind.KV) == (world_size - 1) * shard // 2 < sent_tokens(whole, Kind.KV)
    documents = tuple(range(0, world_size * shard + 1, shard))
    for causal in (True, False):
        alone = build(BY_NAME["contiguous"], world_size, shard, causal=causal, cu_seqlens=documents)
        assert len(alone.steps) == 1
        assert sum(sent_tokens(alone, kind) for kind in Kind) == 0


def test_transfers_travel_under_compute():
    """With links fast enough for one step's data per step of compute, nothing but the last results is exposed."""
    shard = 16
    for backward in (False, True):
        schedule = build(BY_NAME["zigzag"], 8, shard, backward)
        weights = {Kind.KV: 1.0, Kind.QUERY: 1.0, Kind.OUT: 2.0, Kind.DQ: 2.0, Kind.DKV: 2.0}
        rates = Rates(1.0, weights, bytes_per_second=1.0)
        simulation = simulate_schedule(schedule, rates)
        trailing = sum(not any(cell.tasks for cell in row) for row in schedule.steps)
        assert trailing <= 2
        assert max(simulation.exposed) <= trailing * shard * 2.0
        assert simulate_schedule(build(BY_NAME["zigzag"], 8, shard), rates).makespan == pytest.approx(
            max(simulate_schedule(build(BY_NAME["zigzag"], 8, shard), rates).busy)
        )


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_few_buffers(method):
    """Double buffering is enough, whatever the world size; only all-gather holds everything."""
    for world_size in (8, 33):
        schedule = build(method, world_size, 4, backward=True)
        keys = schedule.slots(Kind.KV)
        owners = method[4] if len(method) > 4 else 1
        assert keys <= (world_size - 1 if method[3] == "all_gather" else 2 * owners)
        if method[3] != "all_gather":
            assert schedule.slots(Kind.QUERY) <= 2
            assert schedule.slots(Kind.DKV) <= 6 * owners and schedule.slots(Kind.DQ) <= 5


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("owners", [2, 4, 7])
def test_keys_of_several_ranks_take_one_launch(owners, backward):
    """At most one step of a zigzag rank attends both earlier and later ranks' keys, and takes two launches. Backward's
    last one attends one rank's keys only."""
    world_size = 8
    schedule = build(("", "ring", "zigzag", "pull", owners), world_size, 4, backward)
    steps = 2 + -(-(world_size - 2) // owners) if backward else 1 + -(-(world_size - 1) // owners)
    for rank in range(world_size):
        launches = [len(schedule.launches(step, rank)) for step in range(len(schedule.steps))]
        assert sum(launches) <= steps + 1 and max(launches) <= 2
    assert sum(len(schedule.launches(step, world_size - 1)) for step in range(len(schedule.steps))) == steps


@pytest.mark.parametrize("owners", [1, 3])
def test_own_work_hides_the_return_of_the_last_gradients(owners):
    """Of eight ranks, whose links move the keys of a step in half of the time of attending them."""
    exposed = []
    for own_last in (False, True):
        schedule = build(("", "ring", "zigzag", "pull", owners, own_last), 8, 16, backward=True)
        rates = Rates(1.0, {kind: 1.0 if kind in (Kind.KV, Kind.DKV) else 0.0 for kind in Kind}, bytes_per_second=1.0)
        exposed.append(max(simulate_schedule(schedule, rates).exposed))
    assert exposed[0] > 0 == exposed[1]


def first_task(schedule, wanted):
    for s, row in enumerate(schedule.steps):
        for r, cell in enumerate(row):
            for t, task in enumerate(cell.tasks):
                if wanted(task):
                    return s, r, t, task
    raise LookupError


def with_step(schedule, s, r, **changes):
    rows = [list(row) for row in schedule.steps]
    rows[s][r] = dataclasses.replace(rows[s][r], **changes)
    return dataclasses.replace(schedule, steps=tuple(tuple(row) for row in rows))


def faults():
    """Right schedules with one thing broken, and the complaint that must follow."""
    forward, backward = build(BY_NAME["zigzag"], 4, 4), build(BY_NAME["zigzag"], 4, 4, backward=True)
    helpers = build(BY_NAME["dist_flash"], 4, 4)
    step = forward.steps[1][2]
    yield "a task twice", with_step(forward, 1, 2, tasks=step.tasks * 2), "twice|carried"
    yield "a task missing", with_step(forward, 3, 1, tasks=()), "never computed"
    yield "a send missing", with_step(forward, 1, 2, sends=()), "which expects"
    yield "a receive too late", with_step(with_step(forward, 0, 1, receives=()), 0, 0, sends=()), "does not hold"
    moved = dataclasses.replace(step.receives[0], slot=step.tasks[0].key_slot)
    yield "one buffer for two", with_step(forward, 1, 2, receives=(moved,)), "received into while used"
    s, r, _, task = first_task(backward, lambda task: task.key_result.slot is not None and task.key_result.carried)
    fresh = dataclasses.replace(task, key_result=dataclasses.replace(task.key_result, carried=()))
    yield "a carried gradient overwritten", with_step(backward, s, r, tasks=(fresh,)), "carried"
    last = next(s for s, row in enumerate(helpers.steps) if row[3].merges)
    yield "a partial result dropped", with_step(helpers, last, 3, merges=()), "does not hold all|final"
    s, r, _, task = first_task(forward, lambda task: len(task.query_result.final) == 1)
    unfinished = dataclasses.replace(task, query_result=dataclasses.replace(task.query_result, final=()))
    yield "no final task", with_step(forward, s, r, tasks=(unfinished,)), "no final task"


@pytest.mark.parametrize("name,schedule,complaint", list(faults()), ids=lambda x: x if isinstance(x, str) else "")
def test_validation_finds_faults(name, schedule, complaint):
    with pytest.raises(ScheduleError, match=complaint):
        validate_schedule(schedule)


def test_bad_names():
    spans = get_layout("striped", 2).chunks(4)
    with pytest.raises(ValueError, match="expected method"):
        build_schedule("rong", spans, Mask(4))
    with pytest.raises(ValueError, match="expected transfer"):
        build_schedule("ring", spans, Mask(4), transfer="push")
    with pytest.raises(ValueError, match="two chunks per rank"):
        build_schedule("dist_flash", spans, Mask(4))


def test_format_shows_steps_and_ranks():
    text = format_schedule(build(BY_NAME["zigzag"], 2, 4))
    assert text.splitlines()[1].split() == ["step", "rank", "0", "rank", "1"]
    assert "q0,1 k0,1 c" in text and "kv0>1" in text
