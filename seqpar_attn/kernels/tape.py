"""Recording what a pass launches, so that when it is played again it launches it without looking again.

Between two passes over a schedule with inputs of the same shapes and strides nothing changes but addresses. A backend
that takes part (``Kernel.recordable``) hands every launch over as a function of those: host time per ring step is then
that of the launches, not of making views of tensors and looking at their strides.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

Place = tuple[int, int]
"""A base, and bytes after its start; base -1: an address that stays as it is."""
Launch = Callable[[Sequence[int]], None]
"""Launches on the current stream of the current device, given the addresses of the bases."""


class Tape:
    """The launches of one pass, in parts that have names. Replayed by one thread at a time.

    All that a launch touches must lie in one of the bases, the tensors that differ from pass to pass (``locate``), or
    outlive the tape (``hold``).
    """

    def __init__(self) -> None:
        self.complete = False
        self._parts: dict[Hashable, list[Launch]] = {}
        self._part: list[Launch] = []
        self._held: list[torch.Tensor] = []
        self._places: dict[int, Place] = {}

    def locate(self, tensor: torch.Tensor, base: int, start: torch.Tensor) -> None:
        """``tensor``, which must live until the recording ends, is a piece of base number ``base``, ``start``."""
        self._places[id(tensor)] = (base, tensor.data_ptr() - start.data_ptr())

    def hold(self, *tensors: torch.Tensor | None) -> None:
        """These are the same in every pass."""
        for tensor in tensors:
            if tensor is not None:
                self._held.append(tensor)
                self._places[id(tensor)] = (-1, tensor.data_ptr())

    def place(self, tensor: torch.Tensor | None) -> Place:
        if tensor is None:
            return (-1, 0)
        assert id(tensor) in self._places, "a launch uses a tensor that its pass has not made known to the tape"
        return self._places[id(tensor)]

    def append(self, launch: Launch) -> None:
        self._part.append(launch)

    @contextlib.contextmanager
    def recording(self, part: Hashable) -> Iterator[None]:
        """What is launched inside becomes this part."""
        self._part = self._parts[part] = []
        outer, _local.tape = _local.tape, self
        try:
            yield
        finally:
            _local.tape = outer

    def finish(self) -> None:
        self.complete = True
        self._places.clear()  # they name tensors that are about to go

    def replay(self, part: Hashable, addresses: Sequence[int]) -> bool:
        """Whether there was anything to launch."""
        launches = self._parts[part]
        for launch in launches:
            launch(addresses)
        return bool(launches)


class _Local(threading.local):
    """Autograd runs backward passes in threads of its own."""

    tape: Tape | None = None


_local = _Local()


def recording() -> Tape | None:
    """The tape that wants to know of this thread's launches, if any."""
    return _local.tape
