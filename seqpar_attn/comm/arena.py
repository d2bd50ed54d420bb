"""The memory that peers write into: who may use it and when, how much of it there may be, how it is cut up."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from .base import Arena, Communicator, SetUpError

_ALIGNED = 256
_generations = itertools.count()


class Allocator(Protocol):
    """The part of a fabric that an arena needs; see :class:`.symmetric.Fabric`."""

    def allocate(self, size: int) -> torch.Tensor: ...

    def turn(self) -> None: ...


class ArenaLimit(ValueError):
    """A pass needs more than an arena may have."""


class GrowingArena:
    """An allocator's memory. It grows as needed, on all ranks together, and only then do they talk.

    ``limit``: of its bytes. All ranks have the same, so one that is too small is found by all of them at once.
    """

    def __init__(self, allocator: Allocator, limit: int | None = None):
        self.allocator, self.limit = allocator, limit
        self.generation = next(_generations)
        self._memory: torch.Tensor | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock:
            self.allocator.turn()
            yield

    def reserve(self, size: int) -> torch.Tensor:
        if self.limit is not None and size > self.limit:
            raise ArenaLimit(
                f"expected a limit of at least {size} bytes for what this call's peers write, got {self.limit}: raise "
                "it, or use set_transport(group, 'p2p'), which needs no such memory"
            )
        if self._memory is None or self._memory.numel() < size:
            # Before it can fail: passes that were made for the old memory must not come upon nothing.
            self._memory, self.generation = None, next(_generations)
            self._memory = self.allocator.allocate(max(size, 1))
        return self._memory[:size]


T = TypeVar("T")


def in_turn(comm: Communicator, play: Callable[[Arena | None], T]) -> T:
    """``play`` with the arena of ``comm`` to itself, or with None where there is none.

    What it reserves, it reserves before anything moves. If that is more than can be had, and ``comm`` has another way,
    then ``comm`` goes that way from here on, and so does this. Turns have one order on every rank, so all ranks change
    at the same call.
    """
    arena = comm.arena
    if arena is not None:
        with arena.turn():
            if comm.arena is not None:  # or it has changed while this waited for its turn
                try:
                    return play(arena)
                except (ArenaLimit, SetUpError) as error:
                    if not comm.give_way(str(error)):
                        raise
    return play(None)


Shape = tuple[Sequence[int], torch.dtype]


def _aligned(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def bytes_of(shapes: Sequence[Shape]) -> int:
    """What a :class:`Cutter` uses for them."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes)


class Cutter:
    """Tensors one after the other from given bytes."""

    def __init__(self, memory: torch.Tensor):
        self.memory, self.used = memory, 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        x = self.memory[self.used : self.used + size].view(dtype).view(list(shape))
        self.used += _aligned(size)
        return x
