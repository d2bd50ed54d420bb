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
    "held_back",
    "mbarrier",
    "named_barrier",
    "pack",
    "pack_rounded",
    "reinterpret",
    "tanh",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_wait",
    "unpack",
    "unpack_rounded",
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
def pack(x, HALF: gl.constexpr):
    """[M, N] fp32 -> [M, N / 2] int32, two neighbours in 16 bits each. As a tensor of 16-bit numbers it would take a
    register for each of them where it lives across a loop's edge.

    HALF: as fp16. Else as numbers without sign from 2^-31 to 2 with 5 bits of exponent and 11 of mantissa, one more than
    fp16 has: smaller ones become 2^-31, larger ones and NaN the largest.
    """
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if HALF:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        # The exponent of 2^-31 is 96; half of the last place is added for rounding.
        CODE: gl.constexpr = """{
            .reg .s32 a, b;
            add.s32 a, $1, -805304320;
            add.s32 b, $2, -805304320;
            max.s32 a, a, 0;
            max.s32 b, b, 0;
            min.s32 a, a, 268435455;
            min.s32 b, b, 268435455;
            shr.u32 a, a, 12;
            shr.u32 b, b, 12;
            prmt.b32 $0, a, b, 0x5410;
        }"""
        even, odd = even.to(gl.int32, bitcast=True), odd.to(gl.int32, bitcast=True)
        return gl.inline_asm_elementwise(CODE, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(x, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of ``pack``, in LAYOUT."""
    if HALF:
        CODE: gl.constexpr = "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}"
        even, odd = gl.inline_asm_elementwise(
            CODE, "=f,=f,r", [x], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )  # fmt: skip
    else:
        even = (((x & 0xFFFF) << 12) + 805306368).to(gl.float32, bitcast=True)
        odd = (((x >> 4) & 0xFFFF000) + 805306368).to(gl.float32, bitcast=True)
    x = gl.reshape(gl.join(even, odd), [x.shape[0], x.shape[1] * 2])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def pack_rounded(x, DTYPE: gl.constexpr):
    """[M, N] fp32 -> [M, N / 2] int32, two neighbours in bf16 or fp16 each; see ``pack`` for why."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack_rounded(x, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse, in LAYOUT."""
    even = (x & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (x >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    x = gl.reshape(gl.join(even, odd), [x.shape[0], x.shape[1] * 2])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def held_back(x):
    """int32 ``x``, as if it were not known before this place: else what is made of it, here comparisons with every key
    of a tile, is made before a wait, and kept in more registers and instructions than it takes."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
