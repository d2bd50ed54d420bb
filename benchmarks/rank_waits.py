"""How long a rank's computation stands still for transfers: the time between two events around every wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch

from seqpar_attn import autograd

Log = list[Callable[[], float]]
"""Milliseconds of each wait, to be asked for when the device has done it."""


class _Timed:
    def __init__(self, handle: Any, log: Log, cuda: bool):
        self.handle, self.log, self.cuda = handle, log, cuda

    def wait(self) -> None:
        if not self.cuda:
            start = time.perf_counter()
            self.handle.wait()
            ms = (time.perf_counter() - start) * 1e3
            self.log.append(lambda: ms)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # on the compute stream, behind the step's work
        self.handle.wait()
        end.record()
        self.log.append(lambda: begin.elapsed_time(end))


class _Waits:
    """A communicator whose transfers say how long they were waited for."""

    def __init__(self, real: Any, log: Log, cuda: bool):
        self._real, self._log, self._cuda = real, log, cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def exchange(self, *args: Any, **more: Any) -> _Timed:
        return _Timed(self._real.exchange(*args, **more), self._log, self._cuda)


@contextlib.contextmanager
def waits() -> Iterator[Log]:
    """The waits of all passes of this process that are played inside, in their order."""
    real, log = autograd.communicator, []  # type: ignore[var-annotated]
    autograd.communicator = lambda name, device: _Waits(real(name, device), log, device.type == "cuda")  # type: ignore[assignment,return-value]
    try:
        yield log
    finally:
        autograd.communicator = real
