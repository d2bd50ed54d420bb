"""The fabric of processes on one host's CPU: arenas and flags are files that all of them map.

It plays the protocol of :mod:`.symmetric` without GPUs; copies happen when the exchange is waited for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .base import CommunicationError
from .flags import is_other_call
from .handshake import Handshake
from .p2p import P2P


class _Work:
    def __init__(self, queue: list[Callable[[], None]]):
        self.queue = queue

    def wait(self) -> None:
        for call in self.queue:
            call()
        self.queue = []


def shared_tensors(handshake: Handshake, name: str, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor of zeros per rank, on one host, that every rank sees. All ranks call it together."""

    def make_folder() -> str | None:
        return tempfile.mkdtemp(prefix="seqpar_attn-") if handshake.rank == 0 else None

    own = handshake.together("make a folder for shared memory", make_folder)
    folder = Path(handshake.share({"step": "the folder of shared memory"}, None, own)[0])

    def make() -> None:
        file = folder / f"{name}-{handshake.rank}"
        file.write_bytes(b"")
        os.truncate(file, length * dtype.itemsize)

    def open_all() -> list[torch.Tensor]:
        return [
            torch.from_file(str(folder / f"{name}-{peer}"), shared=True, size=length, dtype=dtype)
            for peer in range(handshake.world_size)
        ]

    try:
        handshake.together("make a file for shared memory", make)
        return handshake.together("map its peers' files", open_all)
    finally:
        if handshake.rank == 0:  # all have mapped them, or nobody will
            shutil.rmtree(folder, ignore_errors=True)


class SharedMemory:
    def __init__(self, base: P2P, device: torch.device):
        self._handshake, self.timeout = base.handshake, base.timeout.total_seconds()
        self.rank, self.world_size = base.rank, base.world_size
        self._arenas: list[torch.Tensor] = []
        self._queue: list[Callable[[], None]] = []
        self._flags = shared_tensors(self._handshake, "flags", 4 * self.world_size, torch.int64)

    def allocate(self, size: int) -> torch.Tensor:
        self.close()
        self._arenas = shared_tensors(self._handshake, "arena", size, torch.uint8)
        return self._arenas[self.rank]

    def close(self) -> None:
        self._arenas = []

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
                    other = (
                        ", which is in the backward pass of another call,"
                        if is_other_call(int(own[flag]), value)
                        else ""
                    )
                    raise CommunicationError(
                        f"rank {self.rank}: rank {peer}{other} did not come within {self.timeout:g} s"
                    )
                time.sleep(0)

        self._queue.append(read)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._queue.append(lambda: target.copy_(source))  # type: ignore[arg-type]

    def end(self) -> _Work:
        return _Work(self._queue)
