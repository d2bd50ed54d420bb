"""The fabric of processes on one host's CPU: arenas and flags are files that all of them map.

It plays the protocol of :mod:`.symmetric` without GPUs; copies happen when the exchange is waited for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .base import CommunicationError


class _Work:
    def __init__(self, queue: list[Callable[[], None]]):
        self.queue = queue

    def wait(self) -> None:
        for call in self.queue:
            call()
        self.queue = []


def shared_tensors(group: dist.ProcessGroup, name: str, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor of zeros per rank of ``group``, on one host, that every rank sees. All ranks call it together."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    made = [tempfile.mkdtemp(prefix="seqpar_attn-") if rank == 0 else None]
    dist.broadcast_object_list(made, group=group, group_src=0)
    assert made[0] is not None
    folder = Path(made[0])
    own = folder / f"{name}-{rank}"
    own.write_bytes(b"")
    os.truncate(own, length * dtype.itemsize)
    dist.barrier(group)
    found = [
        torch.from_file(str(folder / f"{name}-{peer}"), shared=True, size=length, dtype=dtype)
        for peer in range(world_size)
    ]
    dist.barrier(group)
    if rank == 0:  # all have mapped them
        shutil.rmtree(folder)
    return found


class SharedMemory:
    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta):
        self._group, self.timeout = weakref.ref(group), timeout.total_seconds()
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._arenas: list[torch.Tensor] = []
        self._queue: list[Callable[[], None]] = []
        self._flags = shared_tensors(group, "flags", 4 * self.world_size, torch.int32)

    def allocate(self, size: int) -> torch.Tensor:
        group = self._group()
        assert group is not None
        self._arenas = shared_tensors(group, "arena", size, torch.uint8)
        return self._arenas[self.rank]

    def there(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        offset = tensor.data_ptr() - self._arenas[self.rank].data_ptr()
        assert 0 <= offset < self._arenas[self.rank].numel(), "a target outside of the arena"
        other = self._arenas[peer].view(tensor.dtype)
        return other.as_strided(tensor.shape, tensor.stride(), offset // tensor.dtype.itemsize)

    def turn(self) -> None:
        pass

    def begin(self, where: str) -> None:
        self._queue = []  # errors come from an exchange's wait, where the caller knows which it was

    def tell(self, peer: int, flag: int, value: int) -> None:
        def write() -> None:
            self._flags[peer][flag] = value

        self._queue.append(write)

    def await_own(self, flag: int, value: int, peer: int) -> None:
        own = self._flags[self.rank]

        def read() -> None:
            deadline = time.monotonic() + self.timeout
            while own[flag] < value:
                if time.monotonic() > deadline:
                    raise CommunicationError(f"rank {self.rank}: rank {peer} did not come within {self.timeout:g} s")
                time.sleep(0)

        self._queue.append(read)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._queue.append(lambda: target.copy_(source))  # type: ignore[arg-type]

    def end(self) -> _Work:
        return _Work(self._queue)
