"""How long a rank's computation stands still for transfers: the time between two events around every wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch

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


class Waits:
    """A communicator whose transfers say in ``log`` how long they were waited for."""

    def __init__(self, real: Any, log: Log, device: torch.device):
        self._real, self._log, self._cuda = real, log, device.type == "cuda"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def exchange(self, *args: Any, **more: Any) -> _Timed:
        return _Timed(self._real.exchange(*args, **more), self._log, self._cuda)
