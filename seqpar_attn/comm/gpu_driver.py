"""What torch has no call for: a stream's copies of rows by copy engines, and flags that it writes and waits for.

By ctypes into the CUDA driver, which is there wherever torch sees a GPU. A call costs about a microsecond.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(*address - value) >= 0
_MAX_PITCH = 1 << 31
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address says where the memory is

_COPY_FIELDS: Any = [
    field
    for side in ("src", "dst")
    for field in (
        (f"{side}XInBytes", ctypes.c_size_t),
        (f"{side}Y", ctypes.c_size_t),
        (f"{side}MemoryType", ctypes.c_int),
        (f"{side}Host", ctypes.c_void_p),
        (f"{side}Device", ctypes.c_uint64),
        (f"{side}Array", ctypes.c_void_p),
        (f"{side}Pitch", ctypes.c_size_t),
    )
] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = _COPY_FIELDS


@functools.cache
def _driver() -> Any:
    cuda = ctypes.CDLL("libcuda.so.1")
    flag: Any = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    cuda.cuStreamWriteValue32_v2.argtypes = cuda.cuStreamWaitValue32_v2.argtypes = flag
    cuda.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    cuda.cuMemcpy2DAsync_v2.argtypes = [ctypes.POINTER(_Copy2D), ctypes.c_void_p]
    cuda.cuMemsetD8Async.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
    return cuda


def _checked(what: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{what} failed with CUDA driver error {status}")


def write_flag(stream: int, address: int, value: int) -> None:
    """Behind all before it in the stream, and seen by every GPU and the host only after what that has written."""
    _checked("cuStreamWriteValue32", _driver().cuStreamWriteValue32_v2(stream, address, value & 0xFFFFFFFF, 0))


def await_flag(stream: int, address: int, value: int) -> None:
    """Until the flag is at least ``value``, by a comparison that goes round."""
    _checked("cuStreamWaitValue32", _driver().cuStreamWaitValue32_v2(stream, address, value & 0xFFFFFFFF, _GEQ))


def fill(stream: int, address: int, size: int, byte: int) -> None:
    _checked("cuMemsetD8Async", _driver().cuMemsetD8Async(address, byte, size, stream))


Rows = tuple[int, int, int]


def rows_of(x: torch.Tensor) -> Rows | None:
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


def as_long(rows: Rows, length: int) -> Rows:
    """``rows`` cut into rows of ``length`` elements, if they are one."""
    count, size, apart = rows
    return (size // length, length, length) if count == 1 and length and size % length == 0 else (count, size, apart)


def copy_rows(stream: int, target: torch.Tensor, source: torch.Tensor) -> bool:
    """``target.copy_(source)`` without a kernel, between two GPUs; False, and nothing done, if they are not alike rows
    of consecutive elements that do not overlap; a tensor without gaps is like rows of any length. Within one GPU the
    driver may use a kernel all the same."""
    to, of, size = rows_of(target), rows_of(source), source.element_size()
    if to is None or of is None:
        return False
    to, of = as_long(to, of[1]), as_long(of, to[1])
    rows, length, _ = to
    apart = (to[2], of[2])
    if of[:2] != (rows, length) or (rows > 1 and (min(apart) < length or max(apart) * size >= _MAX_PITCH)):
        return False
    if rows == 1:
        status = _driver().cuMemcpyAsync(target.data_ptr(), source.data_ptr(), length * size, stream)
    else:
        job = _Copy2D(
            srcMemoryType=_UNIFIED, srcDevice=source.data_ptr(), srcPitch=of[2] * size,
            dstMemoryType=_UNIFIED, dstDevice=target.data_ptr(), dstPitch=to[2] * size,
            WidthInBytes=length * size, Height=rows,
        )  # fmt: skip
        status = _driver().cuMemcpy2DAsync_v2(ctypes.byref(job), stream)
    _checked("cuMemcpyAsync", status)
    return True
