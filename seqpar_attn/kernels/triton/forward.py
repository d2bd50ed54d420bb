"""Forward block kernel: a program owns one query tile of one head and runs over the keys that it sees."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..base import BlockMask
from .common import (
    CHANGING,
    FULL,
    KIND_NUMBER,
    LN2,
    LOG2E,
    cdiv,
    heads_at_once,
    key_boxes,
    key_ranges,
    key_sizes,
    load_accumulator,
    load_key_tile,
    load_own_tile,
    masked_start,
    padded_headdim,
    part_and_tile,
    program_tile,
    row_pointer,
    score_scales,
    store_tile,
    strides_bsh,
    strides_pbsh,
    tanh,
    tile_offsets,
    visible,
)
from .config import Tile
from .plans import Plan, fits_tma, launch, without_tma


@triton.jit
def _attend(
    acc, total, peak, q, k, v, batch, head_kv, lo, hi, begin, left_tiles, full_end, tiles, parts,
    stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
    seqlen_k, headdim, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``tiles`` key tiles of each part; ``acc`` is not yet divided by ``total``."""
    for i in tl.range(0, tiles * parts, warp_specialize=SPECIALIZED):
        part, tile = part_and_tile(i, tiles, KIND)
        start = tl.multiple_of(masked_start(tile, begin, left_tiles, full_end, BLOCK_N), BLOCK_N)
        # Tiles of the full range lie inside the tensor; only masked ones may hang over its end.
        # k: [BLOCK_N, DIM]
        k_tile = load_key_tile(k, part, batch, head_kv, start, stride_kp, stride_kb, stride_ks, stride_kh,
                               seqlen_k, headdim, BLOCK_N, DIM, EVEN_N or not MASKED, EVEN_D, TMA)  # fmt: skip
        s = tl.dot(q, k_tile.T, input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * pre_scale)
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            s = tl.where(visible(keys[None, :], lo[:, None], hi[:, None], KIND), s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * post_scale)
        base = new_peak
        if MASKED:
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf - -inf) would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s * post_scale - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(p, 1)
        # v: [BLOCK_N, DIM]
        v_tile = load_key_tile(v, part, batch, head_kv, start, stride_vp, stride_vb, stride_vs, stride_vh,
                               seqlen_k, headdim, BLOCK_N, DIM, EVEN_N or not MASKED, EVEN_D, TMA)  # fmt: skip
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q, k, v, lse, out_acc, out, key_lo, key_hi,
    stride_qb, stride_qs, stride_qh,
    stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
    stride_lb, stride_lh, stride_ab, stride_as, stride_ah, stride_ob, stride_os, stride_oh,
    seqlen_q, seqlen_k, parts, headdim, nheads, group, heads_total, heads_at_once, offset, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``q, k, v`` are pointers, or tensor descriptors with TMA. Scores are kept in powers of two:
    ``post_scale = softmax_scale * log2(e)``, or with a soft cap ``softcap * log2(e)`` after tanh(s * pre_scale)."""
    # Later query tiles see more keys under a causal mask: the longest programs start first.
    tile, head_index = program_tile(tl.cdiv(seqlen_q, BLOCK_M), heads_total, heads_at_once, KIND != FULL)
    batch = head_index // nheads
    head = head_index % nheads
    head_kv = head // group
    row = tile * BLOCK_M
    # q: [BLOCK_M, DIM]
    q_tile = load_own_tile(q, batch, head, row, stride_qb, stride_qs, stride_qh, seqlen_q, headdim,
                           BLOCK_M, DIM, EVEN_M, EVEN_D, SPECIALIZED)  # fmt: skip
    # lo, hi: [BLOCK_M]
    lo, hi, begin, full_begin, full_end, end = key_ranges(
        row, seqlen_q, seqlen_k, offset, key_lo, key_hi, BLOCK_M, BLOCK_N, KIND
    )
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    NEEDS_MASK: tl.constexpr = KIND != FULL or not EVEN_N
    if SPECIALIZED:
        # Triton 3.6 splits exactly one loop among warp groups, so this one masks every tile if it masks any.
        acc, total, peak = _attend(
            acc, total, peak, q_tile, k, v, batch, head_kv, lo, hi,
            begin, 0, begin, tl.cdiv(end - begin, BLOCK_N), parts,
            stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
            seqlen_k, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, NEEDS_MASK, SOFTCAP, EVEN_N, EVEN_D, TMA, True,
        )  # fmt: skip
    else:
        if NEEDS_MASK:
            left_tiles = (full_begin - begin) // BLOCK_N
            masked_tiles = left_tiles + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_N)
            acc, total, peak = _attend(
                acc, total, peak, q_tile, k, v, batch, head_kv, lo, hi, begin, left_tiles, full_end, masked_tiles,
                parts, stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
                seqlen_k, headdim, pre_scale, post_scale,
                BLOCK_M, BLOCK_N, DIM, KIND, True, SOFTCAP, EVEN_N, EVEN_D, TMA, False,
            )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, q_tile, k, v, batch, head_kv, lo, hi, full_begin, 0, full_begin,
            (full_end - full_begin) // BLOCK_N, parts,
            stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
            seqlen_k, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, False, SOFTCAP, EVEN_N, EVEN_D, TMA, False,
        )  # fmt: skip

    rows = row + tl.arange(0, BLOCK_M)
    # lse: [BLOCK_M]
    lse_pointers = row_pointer(lse, batch, head, row, stride_lb, 1, stride_lh) + tl.arange(0, BLOCK_M)
    if CARRY:
        # The result so far is one more key with score lse and value out_acc. Taking it in at the end instead of at the
        # start keeps its tile out of the loop.
        old_peak = tl.load(lse_pointers, mask=rows < seqlen_q, other=float("-inf")) * LOG2E
        new_peak = tl.maximum(peak, old_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        old_weight = tl.exp2(old_peak - base)
        rescale = tl.exp2(peak - base)
        total = total * rescale + old_weight
        peak = new_peak
    # Rows without a key have total 0: out 0 and lse = -inf + log2(1). A NaN stays one.
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_pointers, (peak + tl.log2(total)) * LN2, mask=rows < seqlen_q)
    weight = 1.0 / total
    if CARRY:
        old_weight *= weight
        weight *= rescale
    acc *= weight[:, None]
    if out_acc is not None:
        # out_acc: [BLOCK_M, DIM]
        acc_pointers = row_pointer(out_acc, batch, head, row, stride_ab, stride_as, stride_ah)
        acc_pointers += tile_offsets(stride_as, BLOCK_M, DIM)
        if CARRY:
            old = load_accumulator(acc_pointers, row, seqlen_q, headdim, BLOCK_M, DIM, EVEN_M, EVEN_D)
            acc += old * old_weight[:, None]
        if KEEP:
            store_tile(acc_pointers, acc, row, seqlen_q, headdim, BLOCK_M, DIM, EVEN_M, EVEN_D)
    if out is not None:
        # out: [BLOCK_M, DIM]
        out_pointers = row_pointer(out, batch, head, row, stride_ob, stride_os, stride_oh)
        out_pointers += tile_offsets(stride_os, BLOCK_M, DIM)
        store_tile(out_pointers, acc, row, seqlen_q, headdim, BLOCK_M, DIM, EVEN_M, EVEN_D)


def launch_forward(
    tile: Tile,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    out_acc: torch.Tensor | None,
    out: torch.Tensor | None,
    mask: BlockMask,
    softmax_scale: float,
    softcap: float | None,
    carry: bool,
    keep: bool,
) -> None:
    def plan() -> Plan:
        batch, seqlen_q, nheads, headdim = q.shape
        parts, seqlen_k, nheads_kv = key_sizes(k)
        chosen = tile if not tile.tma or fits_tma(q, k, v) else without_tma(tile)
        block_m, block_n, dim = chosen.block_m, chosen.block_n, padded_headdim(headdim)
        heads_total = batch * nheads
        return Plan(
            cdiv(seqlen_q, block_m) * heads_total,
            (
                *strides_bsh(q), *strides_pbsh(k), *strides_pbsh(v), *lse.stride()[:2], *strides_bsh(out_acc),
                *strides_bsh(out), seqlen_q, seqlen_k, parts, headdim, nheads, nheads // nheads_kv, heads_total,
                heads_at_once(mask.kind, heads_total, seqlen_k * headdim * k.element_size()),
            ),
            {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "DIM": dim, "KIND": KIND_NUMBER[mask.kind], "CARRY": carry,
                "SOFTCAP": softcap is not None, "EVEN_M": seqlen_q % block_m == 0, "EVEN_N": seqlen_k % block_n == 0,
                "EVEN_D": headdim == dim, "TMA": chosen.tma, "SPECIALIZED": chosen.specialized,
                "KEEP": keep,
            },
            chosen,
            key_boxes(block_n, dim) if chosen.tma else {},
            chosen.specialized,
        )  # fmt: skip

    arrays = (q, k, v, lse, out_acc, out, mask.key_lo, mask.key_hi)
    variables = (mask.offset, *score_scales(softmax_scale, softcap))
    launch(forward_kernel, (tile, mask.kind, softcap is None, carry, keep), arrays, variables, plan)
