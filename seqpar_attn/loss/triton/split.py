"""A float32 sum of which the high half is a bfloat16 tensor and the low half a tensor of its own.

bfloat16 is the upper half of float32. So a gradient that will be bfloat16 can be summed in its own memory, with the
bits that it lacks beside it: no float32 copy of a weight's gradient exists when the sum is rounded. ``LOW_BITS`` is 16
(all of float32) or 8 (significands of 16 bits, rounded to nearest at each addition). The low half is signed: the high
one is the sum rounded to nearest, ties away from zero, and needs no further pass unless a factor is to be applied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...kernels.triton.common import cdiv
from .launching import launch

BLOCK = 4096
FINISH_PROGRAMS = 2048
"""As where logits are scaled: mostly they find that there is nothing to do."""


@triton.jit
def _join(high, low, LOW_BITS: tl.constexpr):
    SIGN: tl.constexpr = 1 << (LOW_BITS - 1)
    missing = ((low.to(tl.int32) & (2 * SIGN - 1)) ^ SIGN) - SIGN
    bits = (high.to(tl.int32) << 16) + (missing << (16 - LOW_BITS))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, DROPPED: tl.constexpr, EVEN: tl.constexpr):
    """The bits of float32 ``x``, to nearest at the bit ``DROPPED``, ties to even or away from zero; NaN stays NaN, with
    no low bits."""
    bits = x.to(tl.int32, bitcast=True)
    if DROPPED > 0:
        bits += ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1) if EVEN else 1 << (DROPPED - 1)
    return tl.where(x == x, bits, 0x7FC00000)


@triton.jit
def add_split_kernel(high, low, addend, count, FIRST: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """``(high, low) += addend``, or ``= addend`` if FIRST."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < count
    # addend: [BLOCK] float32
    total = tl.load(addend + index, mask=exists, other=0.0)
    if not FIRST:
        # high: [BLOCK] int16; low: [BLOCK] int16 or uint8
        old_high = tl.load(high + index, mask=exists, other=0)
        old_low = tl.load(low + index, mask=exists, other=0)
        total += _join(old_high, old_low, LOW_BITS)
    bits = _rounded(total, 16 - LOW_BITS, False)  # as in the kernel that multiplies, too
    tl.store(high + index, ((bits + 0x8000) >> 16).to(tl.int16), mask=exists)
    tl.store(low + index, (bits >> (16 - LOW_BITS)).to(low.dtype.element_ty), mask=exists)


@triton.jit
def finish_split_kernel(high, low, factor, count, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """``high = bfloat16((high, low) * factor)``, rounded once; it is that already if ``factor`` is 1."""
    f = tl.load(factor)
    if f != 1.0:
        for block in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            index = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            exists = index < count
            # high: [BLOCK] int16; low: [BLOCK] int16 or uint8
            old_high = tl.load(high + index, mask=exists, other=0)
            old_low = tl.load(low + index, mask=exists, other=0)
            value = _join(old_high, old_low, LOW_BITS) * f
            tl.store(high + index, (_rounded(value, 16, True) >> 16).to(tl.int16), mask=exists)


def _bits(high: torch.Tensor, low: torch.Tensor) -> int:
    assert high.dtype == torch.int16 and low.dtype in (torch.int16, torch.uint8)
    assert high.is_contiguous() and low.is_contiguous() and high.shape == low.shape
    return 8 * low.element_size()


def launch_add(high: torch.Tensor, low: torch.Tensor, addend: torch.Tensor, first: bool) -> None:
    """``high``: int16, ``low``: int16 or uint8, ``addend``: float32; contiguous, of one shape."""
    assert addend.is_contiguous() and addend.shape == high.shape
    count = high.numel()
    programs, bits = cdiv(count, BLOCK), _bits(high, low)
    launch(add_split_kernel, programs, (high, low, addend), (count,), (), (first, bits, BLOCK), num_warps=8)


def launch_finish(high: torch.Tensor, low: torch.Tensor, factor: torch.Tensor) -> None:
    """``factor``: one float32 number on the device."""
    count = high.numel()
    programs = min(cdiv(count, BLOCK), FINISH_PROGRAMS)
    launch(finish_split_kernel, programs, (high, low, factor), (count,), (), (_bits(high, low), BLOCK), num_warps=8)
