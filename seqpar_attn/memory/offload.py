"""Tensors that wait for the backward pass in host memory.

They leave on a stream of their own while the device computes on, and are fetched back while it works on what comes
before them. Order between streams is by events, never by waiting on the host, and memory belongs to the compute stream
alone: a tensor is let go of when that stream has been told to wait for its copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PAGE = 4096
"""Bytes: cudaHostRegister pins whole pages, and none twice."""


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # not this kind of system, or "max": no limit
        return None


def available_host_memory() -> int | None:
    """Bytes that this process may still take, by the system's word and its control group's; None if unknown."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            found += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            found.append(max(most - now, 0))
    return min(found, default=None)


class _Buffer:
    """Page-locked host memory. Not from torch's pinned allocator, which rounds up to a power of two.

    It is unpinned by ``release``, or when the buffer goes, before its memory does: memory that is freed while it is
    pinned comes back from malloc as memory that CUDA will not pin again.
    """

    def __init__(self, nbytes: int, pinned: bool):
        self.nbytes = nbytes
        pages = -(-nbytes // _PAGE) * _PAGE  # whole ones, which no other buffer has a part of
        memory = torch.empty(pages + _PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % _PAGE
        self.bytes = memory[start : start + nbytes]
        self._uses: list[torch.cuda.Event] = []
        self._finish: weakref.finalize | None = None
        if pinned:
            code = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), pages, 0))
            if code:
                raise RuntimeError(f"cudaHostRegister could not pin {nbytes / 2**30:.2f} GiB (error {code})")
            self._finish = weakref.finalize(self, _unpin, self.bytes, self._uses)
            self._finish.atexit = False  # the process' end unpins everything

    def release(self) -> None:
        if self._finish is not None:
            self._finish()

    @property
    def last_use(self) -> torch.cuda.Event | None:
        return self._uses[0] if self._uses else None

    @last_use.setter
    def last_use(self, event: torch.cuda.Event) -> None:
        self._uses[:] = [event]

    def view(self, like: torch.Tensor) -> torch.Tensor:
        return self.bytes.view(like.dtype).view(like.shape)


def _unpin(memory: torch.Tensor, uses: list[torch.cuda.Event]) -> None:
    for event in uses:
        event.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Offloaded:
    """One tensor on its way to host memory, there, or on its way back."""

    def __init__(self, engine: Offloader, tensor: torch.Tensor):
        self.engine = engine
        self.requires_grad = tensor.requires_grad
        self.here: torch.Tensor | None = tensor.detach().contiguous()
        self.like = torch.empty_like(self.here, device="meta")
        self.buffer: _Buffer | None = engine._buffer(self.here.nbytes)
        self._arrived: torch.cuda.Event | None = None
        with engine._side("out", self.buffer) as there:
            self.buffer.view(self.like).copy_(self.here, non_blocking=True)
        self._left = there
        """When the host has it."""

    def let_go(self) -> None:
        """Free the device's copy: what the compute stream does from now on comes after the copy to the host."""
        if self.here is not None:
            self._wait(self._left)
            self.here = None

    def fetch(self) -> None:
        """Start the way back, unless it is here."""
        if self.here is None:
            assert self.buffer is not None, "used after release"
            self.here = torch.empty_like(self.like, device=self.engine.device)
            with self.engine._side("in", self.buffer) as arrived:
                self.here.copy_(self.buffer.view(self.like), non_blocking=True)
            self._arrived = arrived

    def get(self, stays: bool = False) -> torch.Tensor:
        """The tensor, on the device; the caller's copy is the last one there, unless it ``stays`` for a later call."""
        self.fetch()
        tensor = self.here
        assert tensor is not None
        self._wait(self._left if self._arrived is None else self._arrived)
        if not stays:
            self.here = self._arrived = None
        return tensor.detach().requires_grad_(self.requires_grad)

    def release(self) -> None:
        """Give the host memory back."""
        if self.buffer is not None:
            self.here = None
            self.engine._free.setdefault(self.buffer.nbytes, []).append(self.buffer)
            self.buffer = None

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.engine.device).wait_event(event)


class Offloader:
    """Streams and host buffers of one device. Buffers are reused from step to step; ``close`` frees them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._free: dict[int, list[_Buffer]] = {}
        self._all: list[_Buffer] = []

    @property
    def host_bytes(self) -> int:
        """Host memory held, in use or free."""
        return sum(buffer.nbytes for buffer in self._all)

    def check_room(self, nbytes: int) -> None:
        """ValueError if ``nbytes`` more, besides what is held, do not fit into host memory."""
        available = available_host_memory()
        if available is not None and nbytes > 0.95 * available:
            raise ValueError(
                f"expected host memory for {nbytes / 2**30:.1f} GiB of offloaded tensors, got "
                f"{available / 2**30:.1f} GiB available: keep more on the device, or shorten the sequence"
            )

    def close(self) -> None:
        for buffer in self._all:
            buffer.release()
        self._all, self._free = [], {}

    def _buffer(self, nbytes: int) -> _Buffer:
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        self.check_room(nbytes)
        buffer = _Buffer(nbytes, pinned=self.device.type == "cuda" and nbytes > 0)
        self._all.append(buffer)
        return buffer

    @contextmanager
    def _side(self, direction: str, buffer: _Buffer) -> Iterator[torch.cuda.Event | None]:
        """A copy to or from ``buffer``, after what the compute stream has been given and the buffer's last copy."""
        if self.device.type != "cuda":
            yield None
            return
        stream = self._streams.get(direction)
        if stream is None:
            stream = self._streams[direction] = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if buffer.last_use is not None:
            stream.wait_event(buffer.last_use)
        done = torch.cuda.Event()
        with torch.cuda.stream(stream):
            yield done
            done.record()
        buffer.last_use = done
