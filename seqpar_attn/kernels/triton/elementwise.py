"""The memory-bound kernels around attention: delta = rowsum(dout * out), fp32 merges and sums of partial results."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import cdiv, padded_headdim, row_pointer, strides_bsh, tile_bounds, tile_offsets
from .config import Tile
from .plans import Plan, launch

ROWS_PER_PROGRAM = 32


@triton.jit
def own_rows(seqlen, nheads, ROWS: tl.constexpr):
    """Heads run fastest: neighbouring programs then read neighbouring memory. One grid axis, as the others end at
    65535."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen, ROWS)
    return pid // nheads // tiles, pid % nheads, pid // nheads % tiles * ROWS


@triton.jit(do_not_specialize=["seqlen", "nheads"])
def delta_kernel(
    out, dout, delta, stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, seqlen, nheads, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head, row = own_rows(seqlen, nheads, ROWS)
    bounds = tile_bounds(row, seqlen, headdim, ROWS, DIM)
    # out, dout: [ROWS, DIM]
    out_pointers = row_pointer(out, batch, head, row, stride_ob, stride_os, stride_oh)
    o = tl.load(out_pointers + tile_offsets(stride_os, ROWS, DIM), mask=bounds, other=0.0)
    dout_pointers = row_pointer(dout, batch, head, row, stride_gb, stride_gs, stride_gh)
    g = tl.load(dout_pointers + tile_offsets(stride_gs, ROWS, DIM), mask=bounds, other=0.0)
    sums = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    rows = row + tl.arange(0, ROWS)
    tl.store(delta + (batch.to(tl.int64) * nheads + head) * seqlen + rows, sums, mask=rows < seqlen)


def launch_delta(out: torch.Tensor, dout: torch.Tensor, delta: torch.Tensor) -> None:
    def plan() -> Plan:
        return row_plan(out, (*strides_bsh(out), *strides_bsh(dout)))

    launch(delta_kernel, dout.dtype, (out, dout, delta), (), plan)


@triton.jit(do_not_specialize=["seqlen", "nheads"])
def merge_kernel(
    lse, out_acc, lse_part, out_part, out,
    stride_lb, stride_lh, stride_ab, stride_as, stride_ah, stride_mb, stride_mh, stride_pb, stride_ps, stride_ph,
    stride_ob, stride_os, stride_oh, seqlen, nheads, headdim, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head, row = own_rows(seqlen, nheads, ROWS)
    exists = (row + tl.arange(0, ROWS)) < seqlen
    bounds = tile_bounds(row, seqlen, headdim, ROWS, DIM)
    # lse, lse_part: [ROWS]
    lse_pointers = row_pointer(lse, batch, head, row, stride_lb, 1, stride_lh) + tl.arange(0, ROWS)
    part_pointers = row_pointer(lse_part, batch, head, row, stride_mb, 1, stride_mh) + tl.arange(0, ROWS)
    old = tl.load(lse_pointers, mask=exists, other=float("-inf"))
    new = tl.load(part_pointers, mask=exists, other=float("-inf"))
    peak = tl.maximum(old, new)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = base + tl.log(tl.exp(old - base) + tl.exp(new - base))
    # Weights from the total, not from the two exponentials: a row without keys has total -inf and weights exp(-inf).
    base = tl.where(total == float("-inf"), 0.0, total)
    # out_acc, out_part: [ROWS, DIM]
    acc_pointers = row_pointer(out_acc, batch, head, row, stride_ab, stride_as, stride_ah)
    acc_pointers += tile_offsets(stride_as, ROWS, DIM)
    out_part_pointers = row_pointer(out_part, batch, head, row, stride_pb, stride_ps, stride_ph)
    out_part_pointers += tile_offsets(stride_ps, ROWS, DIM)
    merged = tl.load(acc_pointers, mask=bounds, other=0.0) * tl.exp(old - base)[:, None]
    merged += tl.load(out_part_pointers, mask=bounds, other=0.0).to(tl.float32) * tl.exp(new - base)[:, None]
    tl.store(acc_pointers, merged, mask=bounds)
    tl.store(lse_pointers, total, mask=exists)
    if out is not None:
        out_pointers = row_pointer(out, batch, head, row, stride_ob, stride_os, stride_oh)
        tl.store(out_pointers + tile_offsets(stride_os, ROWS, DIM), merged.to(out.dtype.element_ty), mask=bounds)


def launch_merge(
    lse: torch.Tensor,
    out_acc: torch.Tensor,
    lse_part: torch.Tensor,
    out_part: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    def plan() -> Plan:
        strides = (*lse.stride()[:2], *strides_bsh(out_acc), *lse_part.stride()[:2], *strides_bsh(out_part))
        return row_plan(out_acc, (*strides, *strides_bsh(out)))

    dtypes = (out_part.dtype, None if out is None else out.dtype)
    launch(merge_kernel, dtypes, (lse, out_acc, lse_part, out_part, out), (), plan)


ELEMENTS_PER_PROGRAM = 4096


@triton.jit(do_not_specialize=["count", "batch"])
def accumulate_kernel(
    target, parts, stride_tb, stride_pn, stride_pb, elements, count, batch, ELEMENTS: tl.constexpr
):  # fmt: skip
    """One pass over ``elements`` contiguous elements per batch index, instead of one per part."""
    pid = tl.program_id(0)
    index = (pid // batch).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    b = (pid % batch).to(tl.int64)
    exists = index < elements
    # target: [ELEMENTS]
    pointers = target + b * stride_tb + index
    total = tl.load(pointers, mask=exists, other=0.0)
    source = parts + b * stride_pb + index
    for n in range(count):
        total += tl.load(source + tl.cast(n, tl.int64) * stride_pn, mask=exists, other=0.0)
    tl.store(pointers, total, mask=exists)


def launch_accumulate(target: torch.Tensor, parts: torch.Tensor) -> None:
    def plan() -> Plan:
        batch, seqlen, nheads, headdim = target.shape
        dense = (nheads * headdim, headdim, 1)
        assert target.stride()[1:] == parts.stride()[-3:] == dense, f"{target.stride()}, {parts.stride()}"
        elements = seqlen * nheads * headdim
        count, stride_n = (parts.shape[0], parts.stride(0)) if parts.ndim > target.ndim else (1, 0)
        numbers = (target.stride(0), stride_n, parts.stride(-4), elements, count, batch)
        programs = cdiv(elements, ELEMENTS_PER_PROGRAM) * batch
        constants = {"ELEMENTS": ELEMENTS_PER_PROGRAM}
        return Plan(programs, numbers, constants, Tile(1, ELEMENTS_PER_PROGRAM, 4, 1), {})

    launch(accumulate_kernel, None, (target, parts), (), plan)


def row_plan(x: torch.Tensor, strides: tuple[int, ...], constants: dict[str, Any] | None = None) -> Plan:
    """For a kernel that takes ``strides``, the sizes of x ``[batch, seqlen, nheads, headdim]`` and ``constants``."""
    batch, seqlen, nheads, headdim = x.shape
    rows = ROWS_PER_PROGRAM
    constants = {**(constants or {}), "ROWS": rows, "DIM": padded_headdim(headdim)}
    programs = batch * nheads * cdiv(seqlen, rows)
    return Plan(programs, (*strides, seqlen, nheads, headdim), constants, Tile(rows, rows, 4, 1), {})
