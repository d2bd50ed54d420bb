"""Statistics of rows of logits, and their gradients from statistics; one program per row.

For both at once there is :mod:`.resident`. Lanes keep running maxima of their own, which costs no barrier until the row
ends, and rescale once per vector of 16 bytes rather than once per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...kernels.triton.common import LN2, LOG2E, cdiv, tanh
from ..options import Options
from .launching import launch


@dataclass(frozen=True)
class Block:
    """What a program loads at once: ``lanes`` vectors of ``vector`` elements."""

    lanes: int
    vector: int
    num_warps: int


def choose(columns: int, itemsize: int) -> Block:
    """Not measured: more bytes in flight per program for longer rows."""
    bytes_per_row = columns * itemsize
    warps = 4 if bytes_per_row <= 16 << 10 else 8 if bytes_per_row <= 128 << 10 else 16
    return Block(lanes=64 * warps, vector=16 // itemsize, num_warps=warps)


@triton.jit
def offsets_of(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES, VECTOR] columns of one block; a thread's 16 bytes are one row of it."""
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def capped(x, softcap, cap_inverse, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * tanh(x * cap_inverse)
    else:
        return x


@triton.jit
def _observe(
    peak, total, drift, logits, start, columns, first, softcap, cap_inverse,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One block more in the running maximum, sum of exponentials and sum of differences to ``first``, per lane."""
    offsets = offsets_of(start, LANES, VECTOR)
    # logits: [LANES, VECTOR]
    if MASKED:
        x = tl.load(logits + offsets, mask=offsets < columns, other=float("-inf"), eviction_policy="evict_first")
    else:
        x = tl.load(logits + offsets, eviction_policy="evict_first")
    z = capped(x.to(tl.float32), softcap, cap_inverse, SOFTCAP)
    if MASKED:  # after the cap, which would make -inf finite
        z = tl.where(offsets < columns, z, float("-inf"))
    new = tl.maximum(peak, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2((peak - base) * LOG2E) + tl.sum(tl.exp2((z - base[:, None]) * LOG2E), 1)
    if SMOOTHING:
        difference = z - first
        if MASKED:
            difference = tl.where(offsets < columns, difference, 0.0)
        drift += tl.sum(difference, 1)
    return new, total, drift


@triton.jit
def _differentiate(
    logits, grad, start, columns, target, weight, base, inverse, steep, uniform, hit, softcap, cap_inverse,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of one block; ``grad`` may be ``logits``."""
    offsets = offsets_of(start, LANES, VECTOR)
    # logits: [LANES, VECTOR]
    if MASKED:
        x = tl.load(logits + offsets, mask=offsets < columns, other=float("-inf"), eviction_policy="evict_first")
    else:
        x = tl.load(logits + offsets, eviction_policy="evict_first")
    z = capped(x.to(tl.float32), softcap, cap_inverse, SOFTCAP)
    p = tl.exp2((z - base) * LOG2E) * inverse
    dz = p - uniform - tl.where(offsets == target, hit, 0.0)
    if Z_LOSS:  # apart, as p may all but cancel with what was subtracted
        dz += p * steep
    if SOFTCAP:
        bent = z * cap_inverse
        dz *= 1.0 - bent * bent
    # grad: [LANES, VECTOR]
    dx = (dz * weight).to(grad.dtype.element_ty)
    if MASKED:
        tl.store(grad + offsets, dx, mask=offsets < columns, eviction_policy="evict_first")
    else:
        tl.store(grad + offsets, dx, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["tokens"])
def statistics_kernel(
    logits, target, weight, statistics, stride_row, columns, tokens, softcap, cap_inverse,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    statistics += row
    many = tokens.to(tl.int64)
    BLOCK: tl.constexpr = LANES * VECTOR
    if tl.load(weight + row) == 0:
        tl.store(statistics, 0.0)
        tl.store(statistics + many, 1.0)
        tl.store(statistics + many * 2, 0.0)
        tl.store(statistics + many * 3, 0.0)
    else:
        label = tl.load(target + row)
        chosen = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
        chosen = tl.where(label >= 0, capped(chosen, softcap, cap_inverse, SOFTCAP), 0.0)
        first = 0.0
        if SMOOTHING:
            # Sums of differences to any element of the row do not cancel as sums of the elements would.
            first = capped(tl.load(logits).to(tl.float32), softcap, cap_inverse, SOFTCAP)
            first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        peaks = tl.full([LANES], float("-inf"), tl.float32)
        totals = tl.zeros([LANES], tl.float32)
        drifts = tl.zeros([LANES], tl.float32)
        whole = columns // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK):
            peaks, totals, drifts = _observe(
                peaks, totals, drifts, logits, start, columns, first, softcap, cap_inverse,
                False, SOFTCAP, SMOOTHING, LANES, VECTOR,
            )  # fmt: skip
        if whole < columns:
            peaks, totals, drifts = _observe(
                peaks, totals, drifts, logits, whole, columns, first, softcap, cap_inverse,
                True, SOFTCAP, SMOOTHING, LANES, VECTOR,
            )  # fmt: skip
        peak = tl.max(peaks, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        drift = 0.0
        if SMOOTHING:
            drift = tl.sum(drifts, 0) + columns * (first - base)
        tl.store(statistics, peak)
        tl.store(statistics + many, tl.sum(totals * tl.exp2((peaks - base) * LOG2E), 0))
        tl.store(statistics + many * 2, chosen)
        tl.store(statistics + many * 3, drift)


@triton.jit(do_not_specialize=["tokens"])
def gradient_kernel(
    logits, target, weight, statistics, grad, stride_row, stride_grad, columns, tokens,
    softcap, cap_inverse, uniform, hit, z_loss,
    SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    grad += row * stride_grad
    BLOCK: tl.constexpr = LANES * VECTOR
    row_weight = tl.load(weight + row)
    if row_weight == 0:
        zeros = tl.zeros([LANES, VECTOR], tl.float32).to(grad.dtype.element_ty)
        for start in tl.range(0, columns, BLOCK):
            offsets = offsets_of(start, LANES, VECTOR)
            tl.store(grad + offsets, zeros, mask=offsets < columns)
    else:
        label = tl.load(target + row)
        peak = tl.load(statistics + row)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.load(statistics + tokens.to(tl.int64) + row)
        inverse = 1.0 / total
        steep = 0.0
        if Z_LOSS:
            steep = 2.0 * z_loss * (peak + tl.log2(total) * LN2)
        whole = columns // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK):
            _differentiate(logits, grad, start, columns, label, row_weight, base, inverse, steep, uniform, hit,
                           softcap, cap_inverse, False, SOFTCAP, Z_LOSS, LANES, VECTOR)  # fmt: skip
        if whole < columns:
            _differentiate(logits, grad, whole, columns, label, row_weight, base, inverse, steep, uniform, hit,
                           softcap, cap_inverse, True, SOFTCAP, Z_LOSS, LANES, VECTOR)  # fmt: skip


def launch_statistics(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, statistics: torch.Tensor, options: Options
) -> None:
    tokens, columns = logits.shape
    block, cap = choose(columns, logits.element_size()), options.softcap
    scale = float(cap or 1.0)
    assert logits.stride(1) == 1 and statistics.stride() == (tokens, 1)
    launch(
        statistics_kernel,
        tokens,
        (logits, target, weight, statistics),
        (logits.stride(0), columns),
        (tokens, scale, 1.0 / scale),
        (cap is not None, options.label_smoothing > 0, block.lanes, block.vector),
        block.num_warps,
    )


def launch_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    out: torch.Tensor,
    options: Options,
) -> None:
    """``out`` may be ``logits``."""
    tokens, columns = logits.shape
    block, cap = choose(columns, logits.element_size()), options.softcap
    scale = float(cap or 1.0)
    assert logits.stride(1) == 1 and out.stride(1) == 1 and statistics.stride() == (tokens, 1)
    smoothing = options.label_smoothing
    launch(
        gradient_kernel,
        tokens,
        (logits, target, weight, statistics, out),
        (logits.stride(0), out.stride(0), columns),
        (tokens, scale, 1.0 / scale, options.uniform, 1.0 - smoothing, float(options.z_loss)),
        (cap is not None, options.z_loss > 0, block.lanes, block.vector),
        block.num_warps,
    )


SCALE_BLOCK = 4096
SCALE_PROGRAMS = 2048
"""Mostly there is nothing to scale; a program per block then took 8 to 11% of a copy's time to find that out."""


@triton.jit(do_not_specialize=["tiles"])
def scale_kernel(x, factor, stride_row, columns, tiles, BLOCK: tl.constexpr):
    """``x *= factor``, read on the device: nothing is done, and nobody waits, where it is 1. ``tiles`` of all rows."""
    f = tl.load(factor)
    if f != 1.0:
        per_row = tl.cdiv(columns, BLOCK)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            offsets = tile % per_row * BLOCK + tl.arange(0, BLOCK)
            pointers = x + (tile // per_row).to(tl.int64) * stride_row + offsets
            # x: [BLOCK]
            values = tl.load(pointers, mask=offsets < columns, other=0.0).to(tl.float32)
            tl.store(pointers, (values * f).to(x.dtype.element_ty), mask=offsets < columns)


def launch_scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    tokens, columns = x.shape
    tiles = tokens * cdiv(columns, SCALE_BLOCK)
    programs = min(tiles, SCALE_PROGRAMS)
    launch(scale_kernel, programs, (x, factor), (x.stride(0), columns), (tiles,), (SCALE_BLOCK,))
