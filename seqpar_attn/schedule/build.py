"""Schedules from a method, a layout's spans and a mask.

A method is a *placement*: for each step and rank, which (query block, key block) pairs it computes. Everything else
is derived from it: blocks of zero area are dropped, transfers are routed, accumulators are chained, slots are
assigned. So a method is a short function, and no method is a new code path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..mask import Mask, Span
from .blocks import Blocks
from .data import Block, Kind, Merge, Result, Schedule, Step, Task, Transfer, consecutive, joinable
from .placement import Placement, dist_flash_placement, own_work_last, ring_placement

METHODS = ("ring", "dist_flash")
TRANSFERS = ("pull", "ring", "all_gather", "double")
MOST_OWNERS_OF_DOUBLE = 2
"""With more per step a turn of the inner ring would be too short for chains of partial sums: more of them would be
added by kernels of their own, from more buffers, and simulation has that slower or no faster."""


@dataclass
class _Slot:
    """A buffer's life on one rank, from the step in which it is first written to the one in which it is last used."""

    rank: int
    kind: Kind
    first: int
    last: int
    index: int = -1

    def use(self, step: int) -> None:
        self.first, self.last = min(self.first, step), max(self.last, step)


@dataclass(frozen=True, eq=False)
class _End:
    """The last one so far of those that add to a partial result: complete after ``step``, in ``slot``."""

    step: int
    slot: _Slot


@dataclass
class _Message:
    step: int
    kind: Kind
    owner: int
    chunk: int
    source: int
    target: int
    source_slot: _Slot | None
    target_slot: _Slot
    steps: int


class _Builder:
    """Routes one placement. What crosses between hosts takes up to ``slack`` steps."""

    def __init__(
        self,
        spans: tuple[tuple[Span, ...], ...],
        mask: Mask,
        placement: Placement,
        backward: bool,
        ranks_per_host: int,
        slack: int,
    ):
        self.world_size, self.ranks_per_host, self.slack = len(spans), ranks_per_host, slack
        self.result_kinds = (Kind.DQ, Kind.DKV) if backward else (Kind.OUT,)
        """The first is what queries accumulate, the second what keys do."""
        self.blocks = Blocks(mask, spans)
        self.messages: list[_Message] = []
        self.slots: list[_Slot] = []
        self.runs: list[list[_Slot]] = []
        """Slots that must follow each other, so that one launch can take what several ranks sent."""
        self.slot_of: dict[tuple[int, int, int, Kind], _Slot] = {}
        """(step, rank, task index, kind) -> slot of that task's operand or result."""
        self.carried: dict[tuple[int, int, int, Kind], set[int]] = defaultdict(set)
        self.merges: dict[tuple[int, int], list[tuple[Kind, int, int, _Slot, _Slot | None]]] = defaultdict(list)
        """(step, rank) -> (kind, owner, chunk, slot) to merge, into another slot or the rank's own accumulator."""
        self.tasks: list[list[list[Task]]] = []
        for row in placement:
            pruned = [[self.blocks.prune(q, k) for q, k in cell] for cell in row]
            self.tasks.append([[self.blocks.task(*pair) for pair in cell if pair is not None] for cell in pruned])

    def drop_idle_steps(self) -> None:
        self.tasks = [row for row in self.tasks if any(row)] or [[[] for _ in range(self.world_size)]]

    def all_tasks(self) -> Iterable[tuple[int, int, int, Task]]:
        for step, row in enumerate(self.tasks):
            for rank, cell in enumerate(row):
                for index, task in enumerate(cell):
                    yield step, rank, index, task

    def new_slot(self, rank: int, kind: Kind, step: int) -> _Slot:
        slot = _Slot(rank, kind, step, step)
        self.slots.append(slot)
        return slot

    def host(self, rank: int) -> int:
        return rank // self.ranks_per_host

    def send(
        self, step: int, kind: Kind, block: Block, source: int, source_slot: _Slot | None, slot: _Slot, steps: int = 1
    ) -> None:
        for used in (slot, source_slot):
            if used is not None:
                used.use(step)
                used.use(step + steps - 1)
        for chunk in block.chunks:
            self.messages.append(_Message(step, kind, block.owner, chunk, source, slot.rank, source_slot, slot, steps))

    # Operands ---------------------------------------------------------------------------------------------------

    def pull(self, kind: Kind) -> None:
        """Every operand in the step before its use: from its owner, or from who fetched it for all of this host."""
        wanted: dict[tuple[int, int, int], list[tuple[int, Block]]] = defaultdict(list)
        for step, rank, index, task in self.all_tasks():
            block = task.key if kind is Kind.KV else task.query
            if block.owner != rank:
                wanted[step, rank, block.owner].append((index, block))
        unions = {key: {chunk for _, block in uses for chunk in block.chunks} for key, uses in wanted.items()}
        fetched = self.fetch(kind, unions)
        for (step, rank, owner), uses in wanted.items():
            slot = source_slot = fetched.get((owner, self.host(rank)))
            if step == 1 and (slot is None or slot.rank != rank):
                source_slot = None  # nobody has fetched it yet
            if slot is None or slot.rank != rank:
                source = owner if source_slot is None else source_slot.rank
                slot = self.new_slot(rank, kind, step - 1)
                block = Block(owner, tuple(sorted(unions[step, rank, owner])))
                self.send(step - 1, kind, block, source, source_slot, slot)
            slot.use(step)
            for index, _ in uses:
                self.slot_of[step, rank, index, kind] = slot

    def fetch(self, kind: Kind, wanted: dict[tuple[int, int, int], set[int]]) -> dict[tuple[int, int], _Slot]:
        """What ranks read of another host's rank crosses to their host once: to the one of them that has the owner's
        number, so that all of a host's adapters share the work, or to the only one that reads it.

        ``wanted``: (step, rank, owner) -> chunks. Returns (owner, reading host) -> where it is.
        """
        reads: dict[tuple[int, int], list[tuple[int, int, set[int]]]] = defaultdict(list)
        for (step, rank, owner), chunks in wanted.items():
            if self.host(rank) != self.host(owner):
                reads[owner, self.host(rank)].append((step, rank, chunks))
        fetched = {}
        for (owner, host), found in reads.items():
            readers = {rank for _, rank, _ in found}
            entry = host * self.ranks_per_host + owner % self.ranks_per_host if len(readers) > 1 else readers.pop()
            served = [(step - (rank != entry), chunks) for step, rank, chunks in found if step > 1 or rank == entry]
            if served:
                needed = min(step for step, _ in served)
                begin = max(0, needed - self.slack)
                slot = fetched[owner, host] = self.new_slot(entry, kind, begin)
                block = Block(owner, tuple(sorted(set().union(*(chunks for _, chunks in served)))))
                self.send(begin, kind, block, owner, None, slot, needed - begin)
        return fetched

    def pass_around(self) -> None:
        """Keys from rank to rank: b + t gets those of b from its neighbour in step t - 1, as far as anyone reads on."""
        for owner in range(self.world_size):
            reads: list[set[int]] = []
            for step, row in enumerate(self.tasks):
                cell = row[(owner + step) % self.world_size] if step else []
                reads.append({c for task in cell if task.key.owner == owner for c in task.key.chunks})
            slot: _Slot | None = None
            for step in range(1, len(self.tasks)):
                ahead = tuple(sorted(set().union(*reads[step:])))
                if not ahead:
                    break
                rank = (owner + step) % self.world_size
                target = self.new_slot(rank, Kind.KV, step - 1)
                target.use(step)
                self.send(step - 1, Kind.KV, Block(owner, ahead), (rank - 1) % self.world_size, slot, target)
                for index, task in enumerate(self.tasks[step][rank]):
                    if task.key.owner == owner:
                        self.slot_of[step, rank, index, Kind.KV] = target
                slot = target

    # Results ----------------------------------------------------------------------------------------------------

    def return_results(self, kind: Kind) -> None:
        """Chain partial results over the ranks that add to them, then bring the ends of the chains home.

        What a rank computed in step t travels during t + 1, so a task of step t + 2 or later can start from it: two
        interleaved chains per chunk hide every transfer, and no separate addition runs until the owner's last one.
        A host other than the owner's has chains of its own, whose ends it adds up: one sum of it crosses to the owner.
        """
        ends: dict[tuple[int, int], list[_End]] = defaultdict(list)
        owner_of: dict[int, int] = {}
        for step, rank, index, task in self.all_tasks():
            block = task.key if kind is Kind.DKV else task.query
            if block.owner == rank:
                continue
            slot = self.new_slot(rank, kind, step)
            self.slot_of[step, rank, index, kind] = slot
            new = _End(step, slot)
            for chunk in block.chunks:
                owner_of[chunk] = block.owner
                known = ends[chunk, self.host(rank)]
                loose = [end for end in known if end.step <= step - 2 and end.slot.rank != rank]
                if loose:
                    end = max(loose, key=lambda e: e.step)
                    known.remove(end)
                    self.send(step - 1, kind, Block(block.owner, (chunk,)), end.slot.rank, end.slot, slot)
                    self.carried[step, rank, index, kind].add(chunk)
                known.append(new)
        sums: dict[_End, list[int]] = defaultdict(list)
        for (chunk, host), loose in ends.items():
            if host != self.host(owner_of[chunk]):
                # The last one, or of several the one that has the owner's number, gets the others.
                number = owner_of[chunk] % self.ranks_per_host
                last = max(loose, key=lambda e: (e.step, e.slot.rank % self.ranks_per_host == number))
                sums[last].append(chunk)
        moved: dict[tuple[_End, int], tuple[_Slot, list[int]]] = {}
        parts: list[tuple[_End, _End, int, _Slot]] = []
        for (chunk, _), loose in ends.items():
            owner = owner_of[chunk]
            into = next((end for end in loose if chunk in sums.get(end, ())), None)
            for end in loose:
                if into is None:
                    self.bring_home(kind, owner, chunk, end, end.step, 1, moved)
                elif end is not into:
                    slot = self.move(kind, owner, chunk, end, into.slot.rank, end.step, 1, moved)
                    parts.append((into, end, chunk, slot))
        # Other chunks in the slot of such a sum may travel on from it: nothing is added while they do.
        done = {into: into.slot.last for into, *_ in parts}
        complete = {end: end.step for end in sums}
        for into, end, chunk, slot in parts:
            step = max(end.step + 1, done[into]) + 1
            complete[into] = max(complete[into], step)
            for used in (slot, into.slot):
                used.use(step)
            self.merges[step, into.slot.rank].append((kind, owner_of[chunk], chunk, slot, into.slot))
        for end, chunks in sums.items():
            # One step less than a turn, so that it is there before the next one begins: fewer buffers.
            steps = max(1, min(self.slack - 1, len(self.tasks) - 1 - complete[end]))
            for chunk in chunks:
                self.bring_home(kind, owner_of[chunk], chunk, end, complete[end], steps, moved)
        if kind is not Kind.OUT:  # sums of several parts at once; partial outputs are merged one by one
            alike: dict[tuple[int, int, tuple[int, ...]], list[_Slot]] = defaultdict(list)
            for (end, rank), (slot, chunks) in moved.items():
                alike[end.step, rank, tuple(sorted(chunks))].append(slot)
            self.runs += alike.values()

    def move(
        self,
        kind: Kind,
        owner: int,
        chunk: int,
        end: _End,
        rank: int,
        complete: int,
        steps: int,
        moved: dict[tuple[_End, int], tuple[_Slot, list[int]]],
    ) -> _Slot:
        """Send a chunk of the end of a chain to a rank in the step after ``complete``; where it arrives.

        ``moved``: (end, rank) -> slot and chunks of those that have been moved; chunks of one end share a slot.
        """
        if (end, rank) not in moved:
            moved[end, rank] = self.new_slot(rank, kind, complete + 1), []
        slot, chunks = moved[end, rank]
        chunks.append(chunk)
        self.send(complete + 1, kind, Block(owner, (chunk,)), end.slot.rank, end.slot, slot, steps)
        return slot

    def bring_home(
        self,
        kind: Kind,
        owner: int,
        chunk: int,
        end: _End,
        complete: int,
        steps: int,
        moved: dict[tuple[_End, int], tuple[_Slot, list[int]]],
    ) -> None:
        """``move`` to the owner, which adds it to its own accumulator."""
        home = self.move(kind, owner, chunk, end, owner, complete, steps, moved)
        home.use(complete + steps + 1)
        self.merges[complete + steps + 1, owner].append((kind, owner, chunk, home, None))

    # Assembly ---------------------------------------------------------------------------------------------------

    def join_tasks(self) -> None:
        """The keys (and their gradients) of tasks that may share a launch go into consecutive slots."""
        per_rank = len(self.blocks.span) // self.world_size
        for step, row in enumerate(self.tasks):
            for rank, cell in enumerate(row):
                own = [(index, task) for index, task in enumerate(cell) if task.query.owner == rank]
                for run in consecutive(own, lambda a, b: joinable(a[1], b[1], per_rank)):
                    if len(run) > 1:
                        for kind in (Kind.KV, *self.result_kinds[1:]):
                            self.runs.append([self.slot_of[step, rank, index, kind] for index, _ in run])

    def assign_slots(self) -> None:
        """Interval colouring: a slot is free again in the step after its last use."""
        busy: dict[tuple[int, Kind], list[int]] = defaultdict(list)
        together = {id(slot) for run in self.runs for slot in run}
        runs = self.runs + [[slot] for slot in self.slots if id(slot) not in together]
        lives = [(min(s.first for s in run), max(s.last for s in run), run) for run in runs]
        for first, _, run in sorted(lives, key=lambda life: life[:2]):
            until = busy[run[0].rank, run[0].kind]
            base = next(b for b in range(len(until) + 1) if all(last < first for last in until[b : b + len(run)]))
            for index, slot in enumerate(run, base):
                slot.index = index
                until[index : index + 1] = [slot.last]

    def transfers(self, steps: int) -> tuple[list[list[list[Transfer]]], list[list[list[Transfer]]]]:
        """Sends and receives per step and rank, chunks of one message joined, both sides in the same order."""
        sends: list[list[list[Transfer]]] = [[[] for _ in range(self.world_size)] for _ in range(steps)]
        receives: list[list[list[Transfer]]] = [[[] for _ in range(self.world_size)] for _ in range(steps)]
        joined: dict[tuple[int, Kind, int, int, int, int | None, int, int], list[int]] = defaultdict(list)
        for m in self.messages:
            source_slot = None if m.source_slot is None else m.source_slot.index
            key = m.step, m.kind, m.owner, m.source, m.target, source_slot, m.target_slot.index, m.steps
            joined[key].append(m.chunk)
        order = {kind: position for position, kind in enumerate(Kind)}
        for key in sorted(joined, key=lambda k: (k[0], k[3], k[4], order[k[1]], k[2], k[6])):
            step, kind, owner, source, target, source_slot, target_slot, duration = key
            block = Block(owner, tuple(sorted(joined[key])))
            sends[step][source].append(Transfer(kind, block, target, source_slot, duration))
            receives[step][target].append(Transfer(kind, block, source, target_slot, duration))
        return sends, receives

    def joined_merges(self, step: int, rank: int) -> list[Merge]:
        chunks: dict[tuple[Kind, int, int, int | None], list[int]] = defaultdict(list)
        for kind, owner, chunk, slot, into in self.merges.get((step, rank), ()):
            chunks[kind, owner, slot.index, None if into is None else into.index].append(chunk)
        merges = [
            Merge(kind, Block(owner, tuple(sorted(c))), slot, into=into)
            for (kind, owner, slot, into), c in chunks.items()
        ]
        return sorted(merges, key=lambda m: (m.kind.value, m.block.chunks, m.slot))

    def own_results(self, task: Task, rank: int) -> Iterable[tuple[Kind, Block]]:
        """The rank's own accumulators that a task adds to."""
        for kind, block in zip(self.result_kinds, (task.query, task.key)):
            if block.owner == rank:
                yield kind, block

    def steps(self) -> tuple[tuple[Step, ...], ...]:
        self.assign_slots()
        ends = [m.step + m.steps - 1 for m in self.messages]
        count = 1 + max([len(self.tasks) - 1, *ends, *(step for step, _ in self.merges)])
        sends, receives = self.transfers(count)
        merges = {key: self.joined_merges(*key) for key in self.merges}
        # Everything that adds to a rank's own accumulators, in order: (step, merges before tasks, index).
        order: dict[tuple[Kind, int], list[tuple[int, int, int]]] = defaultdict(list)
        for (step, _), cell in merges.items():
            for index, merge in enumerate(cell):
                for chunk in merge.block.chunks if merge.into is None else ():
                    order[merge.kind, chunk].append((step, 0, index))
        for step, rank, index, task in self.all_tasks():
            for kind, block in self.own_results(task, rank):
                for chunk in block.chunks:
                    order[kind, chunk].append((step, 1, index))
        first = {key: min(events) for key, events in order.items()}
        last = {key: max(events) for key, events in order.items()}

        def final(kind: Kind, block: Block, event: tuple[int, int, int]) -> tuple[int, ...]:
            return tuple(chunk for chunk in block.chunks if last[kind, chunk] == event)

        def result(step: int, rank: int, index: int, kind: Kind, block: Block) -> Result:
            if block.owner == rank:
                event = (step, 1, index)
                carried = tuple(chunk for chunk in block.chunks if first[kind, chunk] != event)
                return Result(None, carried, final(kind, block, event))
            where = (step, rank, index, kind)
            return Result(self.slot_of[where].index, tuple(sorted(self.carried[where])))

        def complete(step: int, rank: int, index: int, task: Task) -> Task:
            query_slot, key_slot = (self.slot_of.get((step, rank, index, kind)) for kind in (Kind.QUERY, Kind.KV))
            results = [
                result(step, rank, index, kind, block) for kind, block in zip(self.result_kinds, (task.query, task.key))
            ]
            return replace(
                task,
                query_slot=query_slot.index if query_slot else None,
                key_slot=key_slot.index if key_slot else None,
                query_result=results[0],
                key_result=results[1] if len(results) > 1 else Result(),
            )

        rows = []
        for step in range(count):
            cells = self.tasks[step] if step < len(self.tasks) else [[]] * self.world_size
            rows.append(
                tuple(
                    Step(
                        tuple(complete(step, rank, index, task) for index, task in enumerate(cells[rank])),
                        tuple(
                            merge
                            if merge.into is not None
                            else replace(merge, final=final(merge.kind, merge.block, (step, 0, index)))
                            for index, merge in enumerate(merges.get((step, rank), ()))
                        ),
                        tuple(sends[step][rank]),
                        tuple(receives[step][rank]),
                    )
                    for rank in range(self.world_size)
                )
            )
        return tuple(rows)


def build_schedule(
    method: str,
    spans: tuple[tuple[Span, ...], ...],
    mask: Mask,
    *,
    backward: bool = False,
    transfer: str = "pull",
    owners_per_step: int = 1,
    own_last: bool = False,
    ranks_per_host: int | None = None,
) -> Schedule:
    """The schedule of ``method`` for a layout's ``spans`` (per rank, in shard order) and a mask.

    ``method`` is "ring" (zigzag, contiguous and striped rings differ by layout only) or "dist_flash" (contiguous
    layout; without causality there is nothing to balance and it is a ring). ``transfer``: "pull" (every operand
    straight from its owner), "ring" (keys passed from neighbour to neighbour), "all_gather" (all keys in one exchange)
    or "double" (a ring over hosts around a ring inside each of them, see below). A pulling ring attends the keys of
    ``owners_per_step`` ranks in each step ("double" of two at most): fewer and larger kernels, for twice as many
    buffers. ``own_last`` (causal, two chunks per rank) keeps half of the own work for the last step.
    Raises ValueError for other names.

    "double" wants ``ranks_per_host``, with ranks numbered host by host; several divide the world size. What any rank of
    a host reads of another host's rank then crosses to it once, to the rank of the same number, one turn of the inner
    ring before it is first needed, and the others get it from there. The gradients of keys are added up within each
    host, and one sum of them returns in the same way, with a turn's time for it.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if transfer not in TRANSFERS:
        raise ValueError(f"expected transfer to be one of {', '.join(TRANSFERS)}, got {transfer!r}")
    world_size, per_rank = len(spans), len(spans[0])
    check_hosts(method, transfer, ranks_per_host, world_size)
    balanced = method == "dist_flash" and mask.causal
    if balanced and transfer == "all_gather":
        raise ValueError("expected transfer 'pull' or 'ring' for method 'dist_flash', got 'all_gather'")
    if balanced and any(len(rank) != 2 for rank in spans):
        raise ValueError("expected a layout with two chunks per rank for method 'dist_flash', got another")
    shards = [Block(r, tuple(range(r * per_rank, (r + 1) * per_rank))) for r in range(world_size)]
    host = world_size if ranks_per_host is None else ranks_per_host
    owners = {"pull": owners_per_step, "ring": 1, "all_gather": world_size}
    owners["double"] = min(owners_per_step, host, MOST_OWNERS_OF_DOUBLE)
    if balanced:
        placement = dist_flash_placement(shards)
    else:
        # Backward's sums of a host then end at the rank whose adapter they take.
        few_last = backward and transfer == "pull" and not own_last
        placement = ring_placement(shards, owners[transfer], host, own_number_last=backward, few_last=few_last)
    if own_last:
        assert not balanced and transfer == "pull" and per_rank == 2 and mask.causal
        placement = own_work_last(placement, shards)
    builder = _Builder(spans, mask, placement, backward, host, -(-host // owners[transfer]))
    if transfer == "ring":
        builder.pass_around()
    else:
        builder.drop_idle_steps()
        builder.pull(Kind.KV)
    builder.pull(Kind.QUERY)
    for kind in builder.result_kinds:
        builder.return_results(kind)
    builder.join_tasks()
    return Schedule(method if balanced else "ring", backward, mask, spans, builder.steps())


def check_hosts(method: str, transfer: str, ranks_per_host: int | None, world_size: int) -> None:
    """ValueError unless ``ranks_per_host`` fits the rest."""
    if (transfer == "double") != (ranks_per_host is not None):
        raise ValueError(
            "expected ranks_per_host with transfer 'double' and only then, got transfer "
            f"{transfer!r} with ranks_per_host {ranks_per_host!r}"
        )
    if ranks_per_host is None:
        return
    if method != "ring":
        raise ValueError(f"expected method 'ring' for transfer 'double', got {method!r}")
    if ranks_per_host < 1 or world_size % ranks_per_host:
        raise ValueError(f"expected ranks_per_host to divide world_size {world_size}, got {ranks_per_host}")
