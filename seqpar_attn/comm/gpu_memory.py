"""The fabric of GPUs of one host that map each other's memory.

Memory is torch's symmetric memory, NVLink's multicast stays off. Flags are written and waited for by the streams
themselves, and data is pushed by copy engines (:mod:`.gpu_driver`): no multiprocessor takes part. Processes that share
a GPU can use it, too; their copies are the driver's kernels, and right all the same.

A peer that does not come within the group's timeout, or gives up, ends in a CommunicationError in the thread that made
the fabric, and in every later exchange (:mod:`.watch`). What was computed from data that did not come is NaN.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import torch

from .base import CommunicationError
from .flags import is_behind, is_other_call
from .gpu_driver import await_flag, copy_rows, fill, write_flag
from .p2p import P2P
from .shared_memory import shared_tensors
from .watch import watch

_CACHED = 4096
_REMEMBERED = 4096
_BEYOND = 1 << 30
"""Added to a flag, it is past all that is waited for."""


class _Queued:
    def __init__(self, device: torch.device, event: torch.cuda.Event):
        self.device, self.event = device, event

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


def _empty(size: int, device: torch.device) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        return symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError:  # it is no memory of the caching allocator's, which may hold all that is free
        torch.cuda.empty_cache()
        return symmetric_memory.empty(size, dtype=torch.uint8, device=device)


class GpuMemory:
    def __init__(self, base: P2P, device: torch.device):
        """All ranks call it together. SetUpError on every rank if one of them cannot."""
        group, timeout = base.group, base.timeout
        assert group is not None
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self._handshake, self.device = base.handshake, device
        self.rank, self.world_size = base.rank, base.world_size
        self._name = group.group_name
        # torch compares the numbers that processes have for their GPUs, which are all 0 where each sees only its own.
        if len(set(self._handshake.share({"step": "number of the GPU"}, None, device.index))) < self.world_size:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        self._stream, self._aside = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
        self._queue = self._stream.cuda_stream
        self._last: torch.cuda.Stream | None = None
        self._begun = torch.cuda.Event()
        self._arena_handle: Any = None
        self._arena, self._arena_bases = torch.empty(0, dtype=torch.uint8, device=device), [0] * self.world_size
        self._flags_handle: Any = None
        self._flags, self._flag_bases, self._flags_handle = self._mapped(16 * self.world_size)
        self._there: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # The exchanges that the stream began and ended, as it says itself.
        self._progress = torch.zeros(2, dtype=torch.int32).pin_memory()
        self._progress_base, self._exchanges = self._progress.data_ptr(), 0
        self._waits: deque[tuple[int, str, list[tuple[int, int, int]]]] = deque(maxlen=_REMEMBERED)
        self._awaited = [0] * (4 * self.world_size)
        """What each flag has been waited for last."""
        self._given_up = shared_tensors(self._handshake, "given-up", 1, torch.int32)
        self._error: str | None = None
        watch(self, timeout.total_seconds())

    def _mapped(self, size: int) -> tuple[torch.Tensor, list[int], Any]:
        """``size`` bytes of zeros, where this rank sees every rank's, and what keeps them."""
        import torch.distributed._symmetric_memory as symmetric_memory

        # Apart, because who fails while torch maps keeps the others waiting there for a timeout.
        owner = self._handshake.together(f"allocate {size} bytes", lambda: _empty(size, self.device))

        def map_all() -> Any:
            handle = symmetric_memory.rendezvous(owner, self._name)
            owner.zero_()
            torch.cuda.synchronize(self.device)
            return handle

        handle = self._handshake.together("map the memory of its peers' GPUs", map_all)
        offset = int(getattr(handle, "offset", 0))
        # Of a tensor that does not own it: views that somebody keeps must not keep the memory.
        memory = handle.get_buffer(self.rank, (size,), torch.uint8)
        bases = [int(x) + offset for x in handle.buffer_ptrs]
        assert memory.data_ptr() == bases[self.rank]
        return memory, bases, (owner, handle)

    def allocate(self, size: int) -> torch.Tensor:
        self._check()
        self.close()
        self._arena, self._arena_bases, self._arena_handle = self._mapped(size)
        return self._arena

    def close(self) -> None:
        torch.cuda.synchronize(self.device)  # all that this rank was told to expect has come
        self._there.clear()
        self._arena, self._arena_handle = self._arena[:0], None

    def there(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        key = (peer, id(tensor))
        known = self._there.get(key)
        if known is None or known[0] is not tensor:
            offset = tensor.data_ptr() - self._arena_bases[self.rank]
            assert 0 <= offset < self._arena.numel(), "a target outside of the arena"
            whole = self._arena_handle[1].get_buffer(
                peer, (self._arena.numel() // tensor.dtype.itemsize,), tensor.dtype
            )
            other = whole.as_strided(tensor.shape, tensor.stride(), offset // tensor.dtype.itemsize)
            if len(self._there) >= _CACHED:
                self._there.clear()
            known = self._there[key] = tensor, other
        return known[1]

    def _check(self) -> None:
        if self._error is not None:
            raise CommunicationError(f"an earlier exchange failed: {self._error}")

    def turn(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            # The flags' values go up with every exchange; a graph would write the same ones again and wait for nothing.
            raise RuntimeError(
                "expected no CUDA graph around the symmetric transport: call set_transport(group, 'p2p') first, and "
                "NCCL's transfers are captured"
            )
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def begin(self, where: str) -> None:
        self._check()
        self._exchanges += 1
        self._waits.append((self._exchanges, where, []))
        self._begun.record(torch.cuda.current_stream(self.device))
        self._stream.wait_event(self._begun)
        write_flag(self._queue, self._progress_base, self._exchanges)

    def tell(self, peer: int, flag: int, value: int) -> None:
        write_flag(self._queue, self._flag_bases[peer] + 4 * flag, value)

    def await_own(self, flag: int, value: int, peer: int) -> None:
        self._waits[-1][2].append((flag, value, peer))
        self._awaited[flag] = value
        await_flag(self._queue, self._flag_bases[self.rank] + 4 * flag, value)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not copy_rows(self._queue, target, source):
            with torch.cuda.stream(self._stream):  # by a kernel: rows of other lengths than the target's
                target.copy_(source, non_blocking=True)

    def end(self) -> _Queued:
        write_flag(self._queue, self._progress_base + 4, self._exchanges)
        done = torch.cuda.Event()
        done.record(self._stream)
        return _Queued(self.device, done)

    def progress(self) -> tuple[int, int]:
        begun, done = self._progress.tolist()
        return begun, done

    def failed_peer(self) -> int | None:
        return next((rank for rank, x in enumerate(self._given_up) if rank != self.rank and x.item()), None)

    def explain(self, exchange: int) -> str:
        with torch.cuda.stream(self._aside):
            flags = self._flags.view(torch.int32).tolist()
        for number, where, waits in reversed(self._waits):
            if number == exchange:
                behind = [(flags[flag], value, peer) for flag, value, peer in waits if is_behind(flags[flag], value)]
                others = sorted({peer for flag, value, peer in behind if is_other_call(flag, value)})
                why = f", of which {others} are in the backward pass of another call," if others else ""
                ranks = sorted({peer for *_, peer in behind})
                return f"rank {self.rank}: ranks {ranks}{why} in {where} (exchange {exchange})"
        return f"rank {self.rank}: exchange {exchange}"

    def give_up(self, why: str) -> None:
        self._error = why
        self._given_up[self.rank].fill_(1)
        aside = self._aside.cuda_stream
        if self._arena.numel():
            fill(aside, self._arena_bases[self.rank], self._arena.numel(), 0xFF)  # NaN as any float
        for flag, value in enumerate(self._awaited):
            write_flag(aside, self._flag_bases[self.rank] + 4 * flag, value + _BEYOND)
