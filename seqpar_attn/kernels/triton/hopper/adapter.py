"""Gluon's names, which differ between the Triton versions that this package meets (3.6 to 3.9), and what Gluon has no
name for. Importing this fails where Triton has no Gluon for Hopper, with the error that says what is missing.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "halves",
    "held_back",
    "mbarrier",
    "named_barrier",
    "pack",
    "reinterpret",
    "tanh",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_wait",
    "unpack",
    "warpgroup_barrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

# 3.8 renamed them, 3.9 dropped the old names.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_wait = tma.store_wait
# 3.7 renamed it.
warpgroup_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# 3.9 took the underscore off.
_REINTERPRET = "reinterpret" if hasattr(gl.shared_memory_descriptor, "reinterpret") else "_reinterpret"


@builtin
def reinterpret(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory as a tile of another dtype, shape and layout."""
    return getattr(memory, _REINTERPRET)(dtype, shape, layout, _semantic=_semantic)


if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    _ADD = ir.DESCRIPTOR_REDUCE_KIND.ADD

    @builtin
    def tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile of shared memory to global memory: before 3.8 only Gluon's builder has the operation."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(_ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def named_barrier(OP: gl.constexpr, ID: gl.constexpr):
    """``bar.sync`` or ``bar.arrive`` number ID, of two warpgroups. Triton itself uses 0, 1 and one per partition."""
    threads = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    CODE: gl.constexpr = "mov.b32 $0, $1; bar." + OP + " " + ID + ", 256;"
    gl.inline_asm_elementwise(CODE, "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tanh(x):
    """Good to a few ulp everywhere: 1 - 2 / (e^2x + 1) cancels for small x, so those take a polynomial."""
    magnitude = gl.abs(x)
    far = 1.0 - 2.0 / (gl.exp2(magnitude * 2.8853900817779268) + 1.0)
    square = x * x
    near = 1.57394409e-2 * square - 5.23025580e-2
    near = near * square + 1.33152470e-1
    near = near * square - 3.33327681e-1
    near = near * square * x + x
    return gl.where(magnitude < 0.55, near, gl.where(x < 0, -far, far))


@gluon.jit
def pack(x, DTYPE: gl.constexpr):
    """[M, N] fp32 -> [M, N / 2] int32, two neighbours as bf16 or fp16 in each. As a tensor of 16-bit numbers it would
    take a register for each of them where it lives across a loop's edge."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack(x, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse, in LAYOUT."""
    even = (x & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (x >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    x = gl.reshape(gl.join(even, odd), [x.shape[0], x.shape[1] * 2])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def halves(x, LAYOUT: gl.constexpr):
    """[64, 128] -> two of [64, 64] in LAYOUT, where that takes no exchange: its columns below 64 and the others."""
    left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, 64]), [0, 2, 1]))
    return (
        gl.convert_layout(left, LAYOUT, assert_trivial=True),
        gl.convert_layout(right, LAYOUT, assert_trivial=True),
    )


@gluon.jit
def held_back(x):
    """int32 ``x``, as if it were not known before this place: else what is made of it, here comparisons with every key
    of a tile, is made before a wait, and kept in more registers and instructions than it takes."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
