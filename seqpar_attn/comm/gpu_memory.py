"""The fabric of GPUs that map each other's memory: torch's symmetric memory, copy engines, stream memory operations.

NVLink's multicast stays off. Flags are written and waited for by the streams themselves (cuStreamWriteValue32,
cuStreamWaitValue32 of the CUDA driver API), data moves by cuMemcpy between two GPUs, which copy engines do.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist

_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ, a cyclic comparison
_CACHED = 4096


_COPY_FIELDS: Any = (
    ("srcXInBytes", ctypes.c_size_t),
    ("srcY", ctypes.c_size_t),
    ("srcMemoryType", ctypes.c_int),
    ("srcHost", ctypes.c_void_p),
    ("srcDevice", ctypes.c_uint64),
    ("srcArray", ctypes.c_void_p),
    ("srcPitch", ctypes.c_size_t),
    ("dstXInBytes", ctypes.c_size_t),
    ("dstY", ctypes.c_size_t),
    ("dstMemoryType", ctypes.c_int),
    ("dstHost", ctypes.c_void_p),
    ("dstDevice", ctypes.c_uint64),
    ("dstArray", ctypes.c_void_p),
    ("dstPitch", ctypes.c_size_t),
    ("WidthInBytes", ctypes.c_size_t),
    ("Height", ctypes.c_size_t),
)


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D; memory type 4 is "unified", found from the address."""

    _fields_ = _COPY_FIELDS


def _driver() -> Any:
    cuda = ctypes.CDLL("libcuda.so.1")
    flag: Any = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    cuda.cuStreamWriteValue32_v2.argtypes = cuda.cuStreamWaitValue32_v2.argtypes = flag
    cuda.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    cuda.cuMemcpy2DAsync_v2.argtypes = [ctypes.POINTER(_Copy2D), ctypes.c_void_p]
    return cuda


def _checked(what: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{what} failed with CUDA driver error {status}")


def rows_of(x: torch.Tensor) -> tuple[int, int, int] | None:
    """``(rows, elements of a row, elements from row to row)``, if ``x`` is rows of consecutive elements."""
    inner = 1
    for dim in reversed(range(x.ndim)):
        if x.shape[dim] != 1 and x.stride(dim) != inner:
            rows, apart = x.shape[dim], x.stride(dim)
            for outer in reversed(range(dim)):
                if x.shape[outer] != 1 and x.stride(outer) != apart * rows:
                    return None
                rows *= x.shape[outer]
            return rows, inner, apart
        inner *= x.shape[dim]
    return 1, inner, inner


class _Queued:
    def __init__(self, device: torch.device, event: torch.cuda.Event):
        self.device, self.event = device, event

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class GpuMemory:
    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self._group, self.device = weakref.ref(group), device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._name = group.group_name
        self._cuda = _driver()
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._queue = self._stream.cuda_stream
        self._begun, self._done = torch.cuda.Event(), torch.cuda.Event()
        self._arena, self._bases = torch.empty(0, dtype=torch.uint8, device=device), [0] * self.world_size
        self._flags, self._flag_bases = self._mapped(8 * self.world_size)
        self._there: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _mapped(self, size: int) -> tuple[torch.Tensor, list[int]]:
        """``size`` bytes of zeros and, per rank, where this rank sees them."""
        import torch.distributed._symmetric_memory as symmetric_memory

        memory = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        handle = symmetric_memory.rendezvous(memory, self._name)
        memory.zero_()
        torch.cuda.synchronize(self.device)
        dist.barrier(self._group(), device_ids=[self.device.index])
        self._handle = handle
        return memory, [int(x) + int(getattr(handle, "offset", 0)) for x in handle.buffer_ptrs]

    def allocate(self, size: int) -> torch.Tensor:
        torch.cuda.synchronize(self.device)  # all that this rank was told to expect has come
        self._there.clear()
        self._arena, self._bases = self._mapped(size)
        self._arena_handle = self._handle  # whose buffers ``there`` hands out
        return self._arena

    def there(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        key = (peer, id(tensor))
        known = self._there.get(key)
        if known is None or known[0] is not tensor:
            offset = tensor.data_ptr() - self._arena.data_ptr()
            assert 0 <= offset < self._arena.numel(), "a target outside of the arena"
            whole = self._arena_handle.get_buffer(peer, (self._arena.numel() // tensor.dtype.itemsize,), tensor.dtype)
            other = whole.as_strided(tensor.shape, tensor.stride(), offset // tensor.dtype.itemsize)
            if len(self._there) >= _CACHED:
                self._there.clear()
            known = self._there[key] = tensor, other
        return known[1]

    def begin(self) -> None:
        self._begun.record(torch.cuda.current_stream(self.device))
        self._stream.wait_event(self._begun)

    def tell(self, peer: int, flag: int, value: int) -> None:
        address = self._flag_bases[peer] + 4 * flag
        _checked(
            "cuStreamWriteValue32", self._cuda.cuStreamWriteValue32_v2(self._queue, address, value & 0xFFFFFFFF, 0)
        )

    def await_own(self, flag: int, value: int, peer: int) -> None:
        address = self._flag_bases[self.rank] + 4 * flag
        _checked(
            "cuStreamWaitValue32", self._cuda.cuStreamWaitValue32_v2(self._queue, address, value & 0xFFFFFFFF, _GEQ)
        )

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        to, of, size = rows_of(target), rows_of(source), source.element_size()
        if to is None or of is None or to[:2] != of[:2]:
            with torch.cuda.stream(self._stream):  # by a kernel: rows of other lengths than the target's
                target.copy_(source, non_blocking=True)
            return
        rows, length, _ = to
        if rows == 1:
            status = self._cuda.cuMemcpyAsync(target.data_ptr(), source.data_ptr(), length * size, self._queue)
        else:
            job = _Copy2D(
                srcMemoryType=4, srcDevice=source.data_ptr(), srcPitch=of[2] * size,
                dstMemoryType=4, dstDevice=target.data_ptr(), dstPitch=to[2] * size,
                WidthInBytes=length * size, Height=rows,
            )  # fmt: skip
            status = self._cuda.cuMemcpy2DAsync_v2(ctypes.byref(job), self._queue)
        _checked("cuMemcpyAsync", status)

    def end(self) -> _Queued:
        self._done.record(self._stream)
        return _Queued(self.device, self._done)
