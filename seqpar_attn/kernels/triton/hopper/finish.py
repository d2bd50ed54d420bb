"""What stands around the backward kernel: dq starts at zero, and becomes the gradient of q in the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import row_pointer, strides_bsh, tile_bounds, tile_offsets
from ..elementwise import own_rows, row_plan
from ..plans import launch
from .config import permuted, shift


@triton.jit
def dq_position(d, PERMUTED: tl.constexpr):
    """Where column ``d`` of dq is: of 32 columns 8 j + 2 t + {0, 1}, the eight of one t, which is a thread of four in
    the tensor cores' layout of accumulators, are neighbours."""
    if PERMUTED:
        return d // 32 * 32 + d // 2 % 4 * 8 + d // 8 % 4 * 2 + d % 2
    else:
        return d


@triton.jit(do_not_specialize=["seqlen", "nheads"])
def zero_kernel(
    dq, dq_again, stride_b, stride_s, stride_h, seqlen, nheads, headdim, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    batch, head, row = own_rows(seqlen, nheads, ROWS)
    pointers = row_pointer(dq, batch, head, row, stride_b, stride_s, stride_h) + tile_offsets(stride_s, ROWS, DIM)
    tl.store(pointers, tl.zeros([ROWS, DIM], tl.float32), mask=tile_bounds(row, seqlen, headdim, ROWS, DIM))


def launch_zero(dq: torch.Tensor) -> None:
    launch(zero_kernel, None, (dq, dq), (), lambda: row_plan(dq, strides_bsh(dq)))


@triton.jit(do_not_specialize=["seqlen", "nheads"])
def finish_kernel(
    dq, grad, stride_b, stride_s, stride_h, stride_gb, stride_gs, stride_gh, seqlen, nheads, headdim, factor,
    PERMUTED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head, row = own_rows(seqlen, nheads, ROWS)
    bounds = tile_bounds(row, seqlen, headdim, ROWS, DIM)
    pointers = row_pointer(dq, batch, head, row, stride_b, stride_s, stride_h)
    columns = dq_position(tl.arange(0, DIM), PERMUTED)
    x = tl.load(pointers + tl.arange(0, ROWS)[:, None] * stride_s + columns[None, :], mask=bounds, other=0.0) * factor
    pointers = row_pointer(grad, batch, head, row, stride_gb, stride_gs, stride_gh)
    tl.store(pointers + tile_offsets(stride_gs, ROWS, DIM), x.to(grad.dtype.element_ty), mask=bounds)


def launch_finish(dq: torch.Tensor, grad: torch.Tensor, softmax_scale: float) -> None:
    constants = {"PERMUTED": permuted(dq.shape[3])}
    factor = softmax_scale * 2.0 ** -shift(grad.dtype)
    launch(
        finish_kernel, grad.dtype, (dq, grad), (factor,),
        lambda: row_plan(dq, (*strides_bsh(dq), *strides_bsh(grad)), constants),
    )  # fmt: skip
