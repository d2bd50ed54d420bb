"""A schedule as frozen data: who computes which block of attention at which step, and what moves meanwhile.

One step of one rank, in order:

1. its ``sends`` and ``receives`` are posted; they carry what was ready before the step,
2. ``merges``, then ``tasks`` run while they are in flight,
3. the rank waits for them; received data can be used from the next step on. Those of more than one of ``steps`` are
   waited for so much later: they are what slow links have to begin early.

A *slot* is a buffer of the size of one shard; the chunks in it lie where they lie in their owner's shard.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ..mask import Mask, MaskKind, Span


class Kind(enum.Enum):
    """What a transfer or a slot holds."""

    __hash__ = object.__hash__  # members are single objects; enum's own hash is Python code

    KV = "kv"
    """Keys and values, in the input dtype."""
    QUERY = "query"
    """Queries; in a backward schedule also dout, lse and delta."""
    OUT = "out"
    """A partial forward result (out_acc, lse) on its way to the queries' owner."""
    DQ = "dq"
    """A partial gradient of queries."""
    DKV = "dkv"
    """A partial gradient of keys and values."""


RESULTS = (Kind.OUT, Kind.DQ, Kind.DKV)


@dataclass(frozen=True)
class Block:
    """Consecutive chunks of one rank's shard."""

    owner: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """Where a task accumulates. ``slot`` None is the rank's own accumulator.

    ``carried`` are the chunks whose accumulator already holds something; the others are overwritten. ``final``: the
    chunks for which nothing will be added to the rank's own accumulator afterwards.
    """

    slot: int | None = None
    carried: tuple[int, ...] = ()
    final: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """One block of attention. ``area`` counts its attended (query, key) pairs; slots are None for own data."""

    query: Block
    key: Block
    kind: MaskKind
    offset: int
    area: int
    query_slot: int | None = None
    key_slot: int | None = None
    query_result: Result = Result()
    key_result: Result = Result()


@dataclass(frozen=True)
class Transfer:
    """One message: ``block`` of ``kind``, to (a send) or from (a receive) ``peer``; ``slot`` None is own data.

    It is in flight during ``steps`` steps, that in which it is posted included: until then nobody touches where it
    lands or writes where it comes from.
    """

    kind: Kind
    block: Block
    peer: int
    slot: int | None
    steps: int = 1


@dataclass(frozen=True)
class Merge:
    """Add the partial result in ``slot`` to the one in the slot ``into``, None: to the rank's own accumulator."""

    kind: Kind
    block: Block
    slot: int
    final: tuple[int, ...] = ()
    into: int | None = None


@dataclass(frozen=True)
class Step:
    tasks: tuple[Task, ...] = ()
    merges: tuple[Merge, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """``steps[s][rank]``; ``spans[rank]`` are the chunks a rank holds, in the order of its shard.

    Rank r's chunks are numbered ``r * len(spans[r]) + i``.
    """

    method: str
    backward: bool
    mask: Mask
    spans: tuple[tuple[Span, ...], ...]
    steps: tuple[tuple[Step, ...], ...]

    @property
    def world_size(self) -> int:
        return len(self.spans)

    @property
    def chunks_per_rank(self) -> int:
        return len(self.spans[0])

    def span(self, chunk: int) -> Span:
        per_rank = self.chunks_per_rank
        return self.spans[chunk // per_rank][chunk % per_rank]

    def length(self, block: Block) -> int:
        """Tokens of a block."""
        return sum(self.span(chunk).length for chunk in block.chunks)

    def start(self, block: Block) -> int:
        """Where the block begins in its owner's shard, in tokens."""
        return sum(span.length for span in self.spans[block.owner][: block.chunks[0] % self.chunks_per_rank])

    def launches(self, step: int, rank: int) -> list[list[Task]]:
        """The tasks of a step, joined where one kernel launch can do several: their keys lie in consecutive slots."""
        tasks = self.steps[step][rank].tasks
        return consecutive(tasks, lambda a, b: joinable(a, b, self.chunks_per_rank) and _slots_follow(a, b))

    def slots(self, kind: Kind, rank: int | None = None) -> int:
        """Buffers of ``kind`` that a rank needs (the most of any rank by default)."""
        ranks = range(self.world_size) if rank is None else (rank,)
        used = [-1]
        for row in self.steps:
            for step in (row[r] for r in ranks):
                used += [t.slot for t in step.receives if t.kind is kind and t.slot is not None]
                for task in step.tasks:
                    query_kind = Kind.DQ if self.backward else Kind.OUT
                    if kind is query_kind and task.query_result.slot is not None:
                        used.append(task.query_result.slot)
                    if kind is Kind.DKV and task.key_result.slot is not None:
                        used.append(task.key_result.slot)
        return max(used) + 1


T = TypeVar("T")


def consecutive(items: Iterable[T], follows: Callable[[T, T], bool]) -> list[list[T]]:
    """``items`` in runs: an item that follows the one before it is in the same run."""
    runs: list[list[T]] = []
    for item in items:
        if runs and follows(runs[-1][-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def joinable(task: Task, following: Task, chunks_per_rank: int) -> bool:
    """Whether two tasks of a rank differ only in whose keys they attend, all of them seen by all queries."""
    first, second = ([c - block.owner * chunks_per_rank for c in block.chunks] for block in (task.key, following.key))
    return (
        task.kind is following.kind is MaskKind.FULL
        and task.query == following.query
        and first == second
        and task.query.owner not in (task.key.owner, following.key.owner)
    )


def _slots_follow(task: Task, following: Task) -> bool:
    """Whether the keys, and any gradients of them, of two tasks on own queries lie in consecutive slots."""
    if task.query_slot is not None or following.query_slot is not None:
        return False
    keys = task.key_slot, following.key_slot
    gradients = task.key_result.slot, following.key_result.slot
    pairs = [keys] if gradients == (None, None) else [keys, gradients]
    return all(a is not None and b == a + 1 for a, b in pairs)


class ScheduleError(AssertionError):
    """A schedule breaks one of its promises: a fault of this package, never of its user."""
