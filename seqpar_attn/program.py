"""A schedule as one process plays it: every block resolved to a piece of a tensor, once per plan and not per call.

Host time per step matters (no kernel may wait for Python), so all look-ups of chunks, slots and flags happen here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from .schedule import Block, Kind, Merge, Result, Schedule, Step, Task, Transfer, consecutive


class View(NamedTuple):
    """``length`` tokens from ``start`` of a slot, or, with slot None, of what the process holds itself.

    ``local`` is the index of the rank among the local ones. More than one in ``slots``: the same tokens of that many
    slots from ``slot`` on.
    """

    local: int
    kind: Kind
    slot: int | None
    start: int
    length: int
    slots: int = 1


class Compute(NamedTuple):
    """One launch: a task, or several whose keys lie in consecutive slots; ``task`` is the first of them.

    Numbers are indices of views. ``query_fresh`` and ``key_fresh`` must be blanked before it.
    """

    task: Task
    query: int
    key: int
    query_result: int
    key_result: int
    query_fresh: tuple[int, ...]
    key_fresh: tuple[int, ...]
    carry_query: bool
    carry_key: bool
    keep: bool
    """Forward: something will be added later, or the result travels, so the accumulator has to be written."""
    finish: bool
    """Forward: some chunk is complete, so the output has to be written."""


class Add(NamedTuple):
    """A merge: the view ``part`` into the view ``into``; gradients of several slots at once."""

    kind: Kind
    into: int
    part: int
    finish: bool


class Exchange(NamedTuple):
    """Transfers that begin and end together: per local rank (peer, view) to send and to receive."""

    sends: tuple[tuple[tuple[int, int], ...], ...]
    receives: tuple[tuple[tuple[int, int], ...], ...]
    end: int
    """The moment at whose end they are waited for."""
    slow: bool
    """They take several moments."""
    targets: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Per local rank and send (peer, view): where in the peer's slots the message belongs, for who writes there."""


class Moment(NamedTuple):
    """One step: what begins to move, then what runs meanwhile."""

    exchanges: tuple[Exchange, ...]
    adds: tuple[Add, ...]
    computes: tuple[Compute, ...]

    @property
    def moves(self) -> bool:
        """Whether anything begins to move."""
        return bool(self.exchanges)


def _same_sum(merge: Merge, following: Merge) -> bool:
    """Whether two merges add to the same block from consecutive slots; partial outputs are merged one by one."""
    if merge.kind is Kind.OUT:
        return False
    alike = (merge.kind, merge.block, merge.into) == (following.kind, following.block, following.into)
    return alike and following.slot == merge.slot + 1


class Program:
    """The steps of ``schedule`` for the ranks ``local_ranks`` of this process.

    ``alike``: every rank has the same slots, the most that one needs, so that a place in them is one on every rank, and
    moments have ``targets``.
    """

    def __init__(self, schedule: Schedule, local_ranks: Sequence[int], alike: bool = False):
        self.schedule = schedule
        self.passes: dict[Hashable, list[Any]] = {}
        """Those that have been made (see :mod:`.passes`) and are not being played."""
        self.shard = sum(span.length for span in schedule.spans[0])
        self.views: list[View] = []
        self._index: dict[View, int] = {}
        self._query_result = Kind.DQ if schedule.backward else Kind.OUT
        ranks = list(enumerate(local_ranks))
        self.moments = []
        for step, row in enumerate(schedule.steps):
            durations = {t.steps for _, rank in ranks for t in (*row[rank].sends, *row[rank].receives)}
            exchanges = [self._exchange(ranks, step, row, duration, alike) for duration in sorted(durations)]
            adds = [self._add(i, merges) for i, rank in ranks for merges in consecutive(row[rank].merges, _same_sum)]
            computes = [self._compute(i, tasks) for i, rank in ranks for tasks in schedule.launches(step, rank)]
            self.moments.append(Moment(tuple(exchanges), tuple(adds), tuple(computes)))
        self.slots: dict[tuple[int, Kind], int] = {}
        """Buffers per (local rank, kind)."""
        for view in self.views:
            if view.slot is not None:
                key = (view.local, view.kind)
                self.slots[key] = max(self.slots.get(key, 0), view.slot + view.slots)
        if alike:
            counts = {kind: schedule.slots(kind) for kind in Kind}
            self.slots = {(i, kind): count for i, _ in ranks for kind, count in counts.items() if count}
        self.single = all(
            not compute.keep and not compute.carry_query for moment in self.moments for compute in moment.computes
        ) and not any(moment.adds for moment in self.moments)
        """Forward: no accumulator is needed, every output row is finished by one task."""
        self.slow = any(t.steps > 1 for row in schedule.steps for cell in row for t in cell.sends)
        """Whether any rank has slow exchanges."""
        computes = [compute for moment in self.moments for compute in moment.computes]
        self.keys_once = not any(
            compute.carry_key or compute.key_fresh or self.views[compute.key_result].slot is not None
            for compute in computes
        ) and not any(add.kind is Kind.DKV for moment in self.moments for add in moment.adds)
        """Backward: no accumulator is needed for dk and dv, every key's gradient comes from one task."""

    def _view(self, local: int, kind: Kind, block: Block, slot: int | None, slots: int = 1) -> int:
        start, length = self.schedule.start(block), self.schedule.length(block)
        view = View(local, kind, slot, start + (local * self.shard if slot is None else 0), length, slots)
        if view not in self._index:
            self._index[view] = len(self.views)
            self.views.append(view)
        return self._index[view]

    def _add(self, local: int, merges: Sequence[Merge]) -> Add:
        first = merges[0]
        into = self._view(local, first.kind, first.block, first.into)
        part = self._view(local, first.kind, first.block, first.slot, len(merges))
        return Add(first.kind, into, part, any(merge.final for merge in merges))

    def _exchange(
        self, ranks: Sequence[tuple[int, int]], step: int, row: Sequence[Step], duration: int, alike: bool
    ) -> Exchange:
        """The transfers that take so many steps."""
        sends, receives = (
            tuple(
                tuple((t.peer, self._transfer(i, t)) for t in getattr(row[rank], side) if t.steps == duration)
                for i, rank in ranks
            )
            for side in ("sends", "receives")
        )
        targets = tuple(self._targets(i, rank, row, duration) for i, rank in ranks) if alike else ()
        return Exchange(sends, receives, step + duration - 1, duration > 1, targets)

    def _transfer(self, local: int, transfer: Transfer) -> int:
        return self._view(local, transfer.kind, transfer.block, transfer.slot)

    def _targets(self, local: int, rank: int, row: Sequence[Step], duration: int) -> tuple[tuple[int, int], ...]:
        """Between two ranks messages match in order."""
        sends = [t for t in row[rank].sends if t.steps == duration]
        incoming = {
            t.peer: iter([x for x in row[t.peer].receives if x.peer == rank and x.steps == duration]) for t in sends
        }
        return tuple((t.peer, self._transfer(local, next(incoming[t.peer]))) for t in sends)

    def _fresh(self, local: int, kind: Kind, blocks: list[tuple[Block, Result]]) -> tuple[int, ...]:
        """A kernel carries its blocks as a whole: where some chunks carry, the new ones need something to carry."""
        if not any(result.carried for _, result in blocks):
            return ()
        return tuple(
            self._view(local, kind, Block(block.owner, (chunk,)), result.slot)
            for block, result in blocks
            for chunk in block.chunks
            if chunk not in result.carried
        )

    def _compute(self, local: int, tasks: Sequence[Task]) -> Compute:
        first, last, count = tasks[0], tasks[-1], len(tasks)
        query_kind, result = self._query_result, first.query_result
        backward = self.schedule.backward
        return Compute(
            first,
            self._view(local, Kind.QUERY, first.query, first.query_slot),
            self._view(local, Kind.KV, first.key, first.key_slot, count),
            self._view(local, query_kind, first.query, result.slot),
            self._view(local, Kind.DKV, first.key, first.key_result.slot, count) if backward else -1,
            self._fresh(local, query_kind, [(first.query, result)]),
            self._fresh(local, Kind.DKV, [(task.key, task.key_result) for task in tasks]) if backward else (),
            bool(result.carried),
            any(task.key_result.carried for task in tasks),
            result.slot is not None or len(last.query_result.final) < len(last.query.chunks),
            result.slot is None and bool(last.query_result.final),
        )
