"""Proof that a schedule keeps its promises, by playing it symbolically."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from .data import RESULTS, Block, Kind, Result, Schedule, ScheduleError, Step, Task, Transfer

Pairs = frozenset[tuple[int, int]]
SlotKey = tuple[Kind, int]


@dataclass
class _Rank:
    """What one rank holds: per slot the chunks in it and, for results, the pairs accumulated per chunk."""

    slots: dict[SlotKey, dict[int, Pairs]] = field(default_factory=dict)
    own: dict[Kind, dict[int, Pairs]] = field(default_factory=dict)
    final: dict[Kind, set[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Flight:
    """A transfer on its way: what it carries, and the step at whose end it lands."""

    end: int
    source: int
    target: int
    send: Transfer
    receive: Transfer
    part: dict[int, Pairs]


class _Player:
    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.ranks = [_Rank() for _ in range(schedule.world_size)]
        self.query_kind = Kind.DQ if schedule.backward else Kind.OUT
        self.flying: list[_Flight] = []
        self.sending: list[set[SlotKey]] = []
        self.receiving: list[set[SlotKey]] = []
        """Per rank the slots that are being sent, and received into."""

    def fail(self, step: int, rank: int, what: str) -> None:
        raise ScheduleError(f"{self.schedule.method} W={self.schedule.world_size} step {step} rank {rank}: {what}")

    def check_block(self, step: int, rank: int, block: Block) -> None:
        per_rank = self.schedule.chunks_per_rank
        first = block.chunks[0] if block.chunks else -1
        in_order = block.chunks == tuple(range(first, first + len(block.chunks)))
        if not block.chunks or not in_order or any(c // per_rank != block.owner for c in block.chunks):
            self.fail(step, rank, f"{block} is not consecutive chunks of its owner")

    def content(self, step: int, rank: int, kind: Kind, block: Block, slot: int | None) -> dict[int, Pairs]:
        self.check_block(step, rank, block)
        if slot is None:
            if kind in RESULTS or block.owner != rank:
                self.fail(step, rank, f"sends or reads {kind.value} {block} that is not its own")
            return {chunk: frozenset() for chunk in block.chunks}
        held = self.ranks[rank].slots.get((kind, slot), {})
        missing = [chunk for chunk in block.chunks if chunk not in held]
        if missing:
            self.fail(step, rank, f"{kind.value} slot {slot} does not hold chunks {missing}")
        return {chunk: held[chunk] for chunk in block.chunks}

    def exchange(self, step: int, row: tuple[Step, ...]) -> None:
        """Match sends with receives, which then are on their way; results leave the sender's slot."""
        sent: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        expected: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for rank, cell in enumerate(row):
            for transfer in cell.sends:
                sent[rank, transfer.peer].append(transfer)
            for transfer in cell.receives:
                expected[transfer.peer, rank].append(transfer)
        posted: list[_Flight] = []
        ends = {(x.source, x.target): x.end for x in self.flying}  # the last one's, as none overtakes another
        landing = {(x.target, _place(x.receive)) for x in self.flying}
        for source, target in sent.keys() | expected.keys():
            ours, theirs = sent[source, target], expected[source, target]
            if [(t.kind, t.block, t.steps) for t in ours] != [(t.kind, t.block, t.steps) for t in theirs]:
                self.fail(step, source, f"sends {ours} to {target}, which expects {theirs}")
            if source == target:
                self.fail(step, source, "sends to itself")
            for send, receive in zip(ours, theirs):
                if receive.slot is None:
                    self.fail(step, target, "receives into its own shard")
                end = step + send.steps - 1
                if not step <= end < len(self.schedule.steps):
                    self.fail(step, source, f"{send} does not end with a step")
                if ends.get((source, target), end) > end > step:
                    self.fail(step, source, f"{send} overtakes another one to {target}")
                if (target, _place(receive)) in landing:
                    self.fail(step, target, f"{receive} lands where another one does")
                part = self.content(step, source, send.kind, send.block, send.slot)
                posted.append(_Flight(end, source, target, send, receive, part))
        for rank, state in enumerate(self.ranks):
            for send in row[rank].sends:
                if send.kind in RESULTS and send.slot is not None:
                    for chunk in send.block.chunks:
                        del state.slots[send.kind, send.slot][chunk]
        self.flying += posted
        self.sending, self.receiving = [set() for _ in row], [set() for _ in row]
        for flight in self.flying:
            self.receiving[flight.target].add(_place(flight.receive))
            if flight.send.slot is not None:
                self.sending[flight.source].add(_place(flight.send))

    def check_conflicts(self, step: int, rank: int, row: Step) -> None:
        """While a transfer is in flight nobody may write what is sent, nor touch what is received."""
        sent, received = self.sending[rank], self.receiving[rank]
        read, written = set(), set()
        for task in row.tasks:
            read |= {(Kind.QUERY, task.query_slot), (Kind.KV, task.key_slot)}
            written |= {(self.query_kind, task.query_result.slot), (Kind.DKV, task.key_result.slot)}
        read |= {(merge.kind, merge.slot) for merge in row.merges}
        written |= {(merge.kind, merge.into) for merge in row.merges if merge.into is not None}
        for name, conflict in (
            ("written while sent", sent & written),
            ("received into while sent", sent & received),
            ("received into while used", received & (read | written)),
            ("read as input and written as result", read & written - {(Kind.QUERY, None), (Kind.KV, None)}),
        ):
            if conflict:
                self.fail(step, rank, f"slots {conflict} {name}")

    def accumulate(self, step: int, rank: int, kind: Kind, block: Block, result: Result, new: dict[int, Pairs]) -> None:
        state = self.ranks[rank]
        if result.slot is None:
            if block.owner != rank:
                self.fail(step, rank, f"accumulates {block} without a slot")
            held, done = state.own.setdefault(kind, {}), state.final.setdefault(kind, set())
        else:
            held, done = state.slots.setdefault((kind, result.slot), {}), set()
        for chunk in block.chunks:
            if (chunk in held) != (chunk in result.carried):
                self.fail(step, rank, f"{kind.value} of chunk {chunk}: carried is {chunk in result.carried}")
            if chunk in done:
                self.fail(step, rank, f"{kind.value} of chunk {chunk} is added to after its final task")
            before = held.get(chunk, frozenset())
            if before & new[chunk]:
                self.fail(step, rank, f"pairs {set(before & new[chunk])} twice in {kind.value}")
            held[chunk] = before | new[chunk]
        done.update(result.final)

    def compute(self, step: int, rank: int, task: Task, needed: Pairs) -> Pairs:
        self.content(step, rank, Kind.QUERY, task.query, task.query_slot)
        self.content(step, rank, Kind.KV, task.key, task.key_slot)
        pairs = frozenset((i, j) for i in task.query.chunks for j in task.key.chunks if (i, j) in needed)
        if not pairs:
            self.fail(step, rank, f"empty task {task}")
        by_query = {i: frozenset(p for p in pairs if p[0] == i) for i in task.query.chunks}
        by_key = {j: frozenset(p for p in pairs if p[1] == j) for j in task.key.chunks}
        self.accumulate(step, rank, self.query_kind, task.query, task.query_result, by_query)
        if self.schedule.backward:
            self.accumulate(step, rank, Kind.DKV, task.key, task.key_result, by_key)
        return pairs

    def play(self) -> None:
        schedule = self.schedule
        chunks = range(schedule.world_size * schedule.chunks_per_rank)
        areas = {(i, j): schedule.mask.area(schedule.span(i), schedule.span(j)) for i in chunks for j in chunks}
        needed = frozenset(pair for pair, area in areas.items() if area)
        computed: set[tuple[int, int]] = set()
        for step, row in enumerate(schedule.steps):
            self.exchange(step, row)
            for rank, cell in enumerate(row):
                self.check_conflicts(step, rank, cell)
                for merge in cell.merges:
                    part = self.content(step, rank, merge.kind, merge.block, merge.slot)
                    result = Result(merge.into, merge.block.chunks, merge.final)
                    self.accumulate(step, rank, merge.kind, merge.block, result, part)
                for task in cell.tasks:
                    pairs = self.compute(step, rank, task, needed)
                    if pairs & computed:
                        self.fail(step, rank, f"pairs {pairs & computed} are computed twice")
                    computed |= pairs
                    if task.area != sum(areas[pair] for pair in pairs):
                        self.fail(step, rank, f"area of {task}")
            fresh: set[tuple[int, SlotKey]] = set()
            for flight in self.flying:
                if flight.end == step:
                    rank, key = flight.target, _place(flight.receive)
                    if (rank, key) not in fresh:
                        self.ranks[rank].slots[key] = {}
                        fresh.add((rank, key))
                    self.ranks[rank].slots[key].update(flight.part)
            self.flying = [flight for flight in self.flying if flight.end > step]
        if computed != needed:
            self.fail(len(schedule.steps), -1, f"pairs {set(needed - computed)} are never computed")
        self.check_results(needed)

    def check_results(self, needed: Pairs) -> None:
        end, per_rank = len(self.schedule.steps), self.schedule.chunks_per_rank
        for kind in (Kind.DQ, Kind.DKV) if self.schedule.backward else (Kind.OUT,):
            wanted: dict[int, set[tuple[int, int]]] = defaultdict(set)
            for pair in needed:
                wanted[pair[1 if kind is Kind.DKV else 0]].add(pair)
            for rank, state in enumerate(self.ranks):
                for chunk in range(rank * per_rank, (rank + 1) * per_rank):
                    if state.own.get(kind, {}).get(chunk, frozenset()) != wanted[chunk]:
                        self.fail(end, rank, f"{kind.value} of chunk {chunk} does not hold all of its pairs")
                    if wanted[chunk] and chunk not in state.final.get(kind, set()):
                        self.fail(end, rank, f"{kind.value} of chunk {chunk} has no final task")


def _place(transfer: Transfer) -> SlotKey:
    assert transfer.slot is not None
    return transfer.kind, transfer.slot


def validate_schedule(schedule: Schedule) -> None:
    """Raise ScheduleError unless the schedule is right.

    Right means: every non-empty (query chunk, key chunk) pair is computed exactly once and reaches the accumulators of
    its owners; sends match receives in kind, block, order and duration, step by step, so no rank waits for a message
    that nobody sends, and none that takes several steps ends before an earlier one between the same ranks; everything
    is at hand when it is read; no buffer is written while it is sent, read or received into.
    """
    _Player(schedule).play()
