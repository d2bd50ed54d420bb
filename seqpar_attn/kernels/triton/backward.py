"""Backward block kernels, deterministic: no program adds to what another one owns.

``dkdv``: a program owns a key tile of one key head and runs over the queries of all its query heads.
``dq``: a program owns a query tile of one head and runs over its keys. Both recompute the scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..base import BlockMask
from .common import (
    CAUSAL,
    CHANGING,
    FULL,
    INTERVAL,
    KIND_NUMBER,
    LOG2E,
    cdiv,
    heads_at_once,
    key_boxes,
    key_ranges,
    key_sizes,
    load_key_tile,
    load_own_rows,
    load_own_tile,
    load_rows,
    load_tile,
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
    tile_bounds,
    tile_offsets,
    visible,
)
from .config import Tile
from .plans import Plan, fits_tma, launch, without_tma


@triton.jit
def _as_peak(lse):
    """lse in powers of two; rows without a key (-inf) get +inf, so that their p = exp2(s - inf) is 0 and never NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _add_tile(
    target, value, batch, head, row, stride_b, stride_s, stride_h, seqlen, headdim,
    carry, ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """target [ROWS, DIM] = value, or += value with ``carry``.

    ``carry`` is no constant: so one kernel serves both, and without the load ptxas makes the tensor cores of dkdv's
    loop wait for each product (a sixth slower). It predicates the load: a branch would spill, and undo specialisation.
    """
    pointers = row_pointer(target, batch, head, row, stride_b, stride_s, stride_h)
    pointers += tile_offsets(stride_s, ROWS, DIM)
    if EVEN_S and EVEN_D:
        value += tl.load(pointers, mask=carry != 0, other=0.0)
    else:
        value += tl.load(pointers, mask=tile_bounds(row, seqlen, headdim, ROWS, DIM) & (carry != 0), other=0.0)
    store_tile(pointers, value, row, seqlen, headdim, ROWS, DIM, EVEN_S, EVEN_D)


@triton.jit
def _query_ranges(
    row, seqlen_q, seqlen_k, offset, query_lo, query_hi, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """``key_ranges`` seen from the key tile at ``row``. Queries past the end read as zeros and add nothing, so the
    full range may hang over it."""
    keys = row + tl.arange(0, BLOCK_N)
    last = tl.minimum(row + BLOCK_N, seqlen_k) - 1
    query_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    lo = tl.zeros([BLOCK_N], tl.int32)
    hi = lo + seqlen_q
    begin = row * 0
    full_begin = row * 0
    full_end = query_tiles * BLOCK_M
    end = full_end
    if KIND == CAUSAL:
        lo = keys - offset
        begin = tl.minimum(tl.maximum(row - offset, 0) // BLOCK_M, query_tiles) * BLOCK_M
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last - offset, 0), BLOCK_M), query_tiles) * BLOCK_M
    elif KIND == INTERVAL:
        lo = tl.load(query_lo + keys, mask=keys < seqlen_k, other=0)
        hi = tl.load(query_hi + keys, mask=keys < seqlen_k, other=0)
        end = tl.load(query_hi + last)
        begin = tl.minimum(tl.load(query_lo + row), end) // BLOCK_M * BLOCK_M
        full_begin = tl.minimum(tl.cdiv(tl.load(query_lo + last), BLOCK_M), tl.cdiv(end, BLOCK_M)) * BLOCK_M
        full_end = tl.maximum(tl.load(query_hi + row) // BLOCK_M * BLOCK_M, full_begin)
    return lo, hi, begin, full_begin, full_end, end


@triton.jit
def _over_queries(
    dk, dv, k_tile, v_tile, q, dout, lse, delta, batch, head_kv, group, lo, hi, begin, left_tiles, full_end, tiles,
    stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_eb, stride_eh,
    seqlen_q, headdim, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """dk, dv [BLOCK_N, DIM] over ``tiles`` query tiles of each of the ``group`` heads, as one loop so that loads of
    the next head are in flight while the last head computes. Scores are transposed (keys are rows): P^T and dS^T
    then feed the tensor cores from registers."""
    for step in tl.range(0, tiles * group, warp_specialize=SPECIALIZED):
        head = head_kv * group + step // tiles
        start = tl.multiple_of(masked_start(step % tiles, begin, left_tiles, full_end, BLOCK_M), BLOCK_M)
        # q: [BLOCK_M, DIM]
        q_tile = load_tile(q, batch, head, start, stride_qb, stride_qs, stride_qh, seqlen_q, headdim,
                           BLOCK_M, DIM, EVEN_M, EVEN_D, TMA)  # fmt: skip
        s = tl.dot(k_tile, q_tile.T, input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * pre_scale)
        # lse: [BLOCK_M]
        peak = _as_peak(
            load_rows(lse, batch, head, start, stride_lb, stride_lh, seqlen_q, BLOCK_M, EVEN_M, SPECIALIZED)
        )
        p = tl.exp2(s * post_scale - peak[None, :])
        if MASKED:
            queries = start + tl.arange(0, BLOCK_M)
            seen = queries[None, :] >= lo[:, None]
            if KIND == INTERVAL:
                seen = seen & (queries[None, :] < hi[:, None])
            p = tl.where(seen, p, 0.0)
        # dout: [BLOCK_M, DIM]
        dout_tile = load_tile(dout, batch, head, start, stride_ob, stride_os, stride_oh, seqlen_q, headdim,
                              BLOCK_M, DIM, EVEN_M, EVEN_D, TMA)  # fmt: skip
        dv = tl.dot(p.to(q_tile.dtype), dout_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
        # delta: [BLOCK_M]
        d = load_rows(delta, batch, head, start, stride_eb, stride_eh, seqlen_q, BLOCK_M, EVEN_M, SPECIALIZED)
        ds = p * (dp - d[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=CHANGING)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, query_lo, query_hi,
    stride_qb, stride_qs, stride_qh,
    stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_eb, stride_eh,
    stride_dkp, stride_dkb, stride_dks, stride_dkh, stride_dvp, stride_dvb, stride_dvs, stride_dvh,
    seqlen_q, seqlen_k, parts, headdim, nheads, group, heads_total, heads_at_once, carry, offset,
    softmax_scale, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """``nheads, heads_total`` count key heads here. Early keys are seen by most queries: they start first."""
    tiles = tl.cdiv(seqlen_k, BLOCK_N)
    index, head_index = program_tile(tiles * parts, heads_total, heads_at_once, False)
    batch = head_index // nheads
    head_kv = head_index % nheads
    part, tile = part_and_tile(index, tiles, KIND)
    row = tile * BLOCK_N
    if KIND == FULL:
        part = tl.cast(part, tl.int64)
        k += part * stride_kp
        v += part * stride_vp
        dk += part * stride_dkp
        dv += part * stride_dvp
    # k, v: [BLOCK_N, DIM]
    k_tile = load_own_tile(k, batch, head_kv, row, stride_kb, stride_ks, stride_kh, seqlen_k, headdim,
                           BLOCK_N, DIM, EVEN_N, EVEN_D, SPECIALIZED)  # fmt: skip
    v_tile = load_own_tile(v, batch, head_kv, row, stride_vb, stride_vs, stride_vh, seqlen_k, headdim,
                           BLOCK_N, DIM, EVEN_N, EVEN_D, SPECIALIZED)  # fmt: skip
    # lo, hi: [BLOCK_N]
    lo, hi, begin, full_begin, full_end, end = _query_ranges(
        row, seqlen_q, seqlen_k, offset, query_lo, query_hi, BLOCK_M, BLOCK_N, KIND
    )
    dk_tile = tl.zeros([BLOCK_N, DIM], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, DIM], tl.float32)
    if SPECIALIZED:
        dk_tile, dv_tile = _over_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, batch, head_kv, group, lo, hi,
            begin, 0, begin, tl.cdiv(end - begin, BLOCK_M),
            stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
            stride_eb, stride_eh, seqlen_q, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, KIND != FULL, SOFTCAP, EVEN_M, EVEN_D, TMA, True,
        )  # fmt: skip
    else:
        if KIND != FULL:
            left_tiles = (full_begin - begin) // BLOCK_M
            masked_tiles = left_tiles + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_M)
            dk_tile, dv_tile = _over_queries(
                dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, batch, head_kv, group, lo, hi,
                begin, left_tiles, full_end, masked_tiles,
                stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
                stride_eb, stride_eh, seqlen_q, headdim, pre_scale, post_scale,
                BLOCK_M, BLOCK_N, DIM, KIND, True, SOFTCAP, EVEN_M, EVEN_D, TMA, False,
            )  # fmt: skip
        dk_tile, dv_tile = _over_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, batch, head_kv, group, lo, hi,
            full_begin, 0, full_begin, (full_end - full_begin) // BLOCK_M,
            stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
            stride_eb, stride_eh, seqlen_q, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, False, SOFTCAP, EVEN_M, EVEN_D, TMA, False,
        )  # fmt: skip
    _add_tile(dv, dv_tile, batch, head_kv, row, stride_dvb, stride_dvs, stride_dvh, seqlen_k, headdim,
              carry, BLOCK_N, DIM, EVEN_N, EVEN_D)  # fmt: skip
    _add_tile(dk, dk_tile * softmax_scale, batch, head_kv, row, stride_dkb, stride_dks, stride_dkh, seqlen_k, headdim,
              carry, BLOCK_N, DIM, EVEN_N, EVEN_D)  # fmt: skip


@triton.jit
def _over_keys(
    dq, q_tile, dout_tile, peak, d, k, v, batch, head_kv, lo, hi, begin, left_tiles, full_end,
    tiles, parts, stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
    seqlen_k, headdim, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, DIM] over ``tiles`` key tiles of each part."""
    for i in tl.range(0, tiles * parts, warp_specialize=SPECIALIZED):
        part, tile = part_and_tile(i, tiles, KIND)
        start = tl.multiple_of(masked_start(tile, begin, left_tiles, full_end, BLOCK_N), BLOCK_N)
        # k: [BLOCK_N, DIM]
        k_tile = load_key_tile(k, part, batch, head_kv, start, stride_kp, stride_kb, stride_ks, stride_kh,
                               seqlen_k, headdim, BLOCK_N, DIM, EVEN_N or not MASKED, EVEN_D, TMA)  # fmt: skip
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * pre_scale)
        p = tl.exp2(s * post_scale - peak[:, None])
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            p = tl.where(visible(keys[None, :], lo[:, None], hi[:, None], KIND), p, 0.0)
        # v: [BLOCK_N, DIM]
        v_tile = load_key_tile(v, part, batch, head_kv, start, stride_vp, stride_vb, stride_vs, stride_vh,
                               seqlen_k, headdim, BLOCK_N, DIM, EVEN_N or not MASKED, EVEN_D, TMA)  # fmt: skip
        dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
        ds = p * (dp - d[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=CHANGING)
def dq_kernel(
    q, k, v, dout, lse, delta, dq, key_lo, key_hi,
    stride_qb, stride_qs, stride_qh,
    stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_eb, stride_eh, stride_dqb, stride_dqs, stride_dqh,
    seqlen_q, seqlen_k, parts, headdim, nheads, group, heads_total, heads_at_once, carry, offset,
    softmax_scale, pre_scale, post_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    tile, head_index = program_tile(tl.cdiv(seqlen_q, BLOCK_M), heads_total, heads_at_once, KIND != FULL)
    batch = head_index // nheads
    head = head_index % nheads
    head_kv = head // group
    row = tile * BLOCK_M
    # q, dout: [BLOCK_M, DIM]
    q_tile = load_own_tile(q, batch, head, row, stride_qb, stride_qs, stride_qh, seqlen_q, headdim,
                           BLOCK_M, DIM, EVEN_M, EVEN_D, SPECIALIZED)  # fmt: skip
    dout_tile = load_own_tile(dout, batch, head, row, stride_ob, stride_os, stride_oh, seqlen_q, headdim,
                              BLOCK_M, DIM, EVEN_M, EVEN_D, SPECIALIZED)  # fmt: skip
    # lse, delta: [BLOCK_M]
    peak = _as_peak(load_own_rows(lse, batch, head, row, stride_lb, stride_lh, seqlen_q, BLOCK_M, EVEN_M, SPECIALIZED))
    d = load_own_rows(delta, batch, head, row, stride_eb, stride_eh, seqlen_q, BLOCK_M, EVEN_M, SPECIALIZED)
    # lo, hi: [BLOCK_M]
    lo, hi, begin, full_begin, full_end, end = key_ranges(
        row, seqlen_q, seqlen_k, offset, key_lo, key_hi, BLOCK_M, BLOCK_N, KIND
    )
    dq_tile = tl.zeros([BLOCK_M, DIM], tl.float32)
    NEEDS_MASK: tl.constexpr = KIND != FULL or not EVEN_N
    if SPECIALIZED:
        dq_tile = _over_keys(
            dq_tile, q_tile, dout_tile, peak, d, k, v, batch, head_kv, lo, hi,
            begin, 0, begin, tl.cdiv(end - begin, BLOCK_N), parts,
            stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
            seqlen_k, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, NEEDS_MASK, SOFTCAP, EVEN_N, EVEN_D, TMA, True,
        )  # fmt: skip
    else:
        if NEEDS_MASK:
            left_tiles = (full_begin - begin) // BLOCK_N
            masked_tiles = left_tiles + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_N)
            dq_tile = _over_keys(
                dq_tile, q_tile, dout_tile, peak, d, k, v, batch, head_kv, lo, hi,
                begin, left_tiles, full_end, masked_tiles, parts,
                stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
                seqlen_k, headdim, pre_scale, post_scale,
                BLOCK_M, BLOCK_N, DIM, KIND, True, SOFTCAP, EVEN_N, EVEN_D, TMA, False,
            )  # fmt: skip
        dq_tile = _over_keys(
            dq_tile, q_tile, dout_tile, peak, d, k, v, batch, head_kv, lo, hi,
            full_begin, 0, full_begin, (full_end - full_begin) // BLOCK_N, parts,
            stride_kp, stride_kb, stride_ks, stride_kh, stride_vp, stride_vb, stride_vs, stride_vh,
            seqlen_k, headdim, pre_scale, post_scale,
            BLOCK_M, BLOCK_N, DIM, KIND, False, SOFTCAP, EVEN_N, EVEN_D, TMA, False,
        )  # fmt: skip
    _add_tile(dq, dq_tile * softmax_scale, batch, head, row, stride_dqb, stride_dqs, stride_dqh, seqlen_q, headdim,
              carry, BLOCK_M, DIM, EVEN_M, EVEN_D)  # fmt: skip


def launch_dkdv(
    tile: Tile,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    mask: BlockMask,
    softmax_scale: float,
    softcap: float | None,
    carry: bool,
) -> None:
    def plan() -> Plan:
        batch, seqlen_q, nheads, headdim = q.shape
        parts, seqlen_k, nheads_kv = key_sizes(k)
        group = nheads // nheads_kv
        dim = padded_headdim(headdim)
        ragged = seqlen_q % tile.block_m or seqlen_k % tile.block_n or headdim != dim
        chosen = tile.ragged if ragged and tile.ragged is not None and fits_tma(q, dout) else tile
        if chosen.tma and not fits_tma(q, k, v, dout, *((lse, delta) if chosen.specialized else ())):
            chosen = without_tma(chosen)
        block_m, block_n = chosen.block_m, chosen.block_n
        heads_total = batch * nheads_kv
        return Plan(
            cdiv(seqlen_k, block_n) * parts * heads_total,
            (
                *strides_bsh(q), *strides_pbsh(k), *strides_pbsh(v), *strides_bsh(dout), *lse.stride()[:2],
                *delta.stride()[:2], *strides_pbsh(dk), *strides_pbsh(dv),
                seqlen_q, seqlen_k, parts, headdim, nheads_kv, group, heads_total,
                heads_at_once(mask.kind, heads_total, seqlen_q * headdim * q.element_size()),
            ),
            {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "DIM": dim, "KIND": KIND_NUMBER[mask.kind],
                "SOFTCAP": softcap is not None, "EVEN_M": seqlen_q % block_m == 0, "EVEN_N": seqlen_k % block_n == 0,
                "EVEN_D": headdim == dim, "TMA": chosen.tma, "SPECIALIZED": chosen.specialized,
            },
            chosen,
            _query_boxes(chosen, dim),
            chosen.specialized,
        )  # fmt: skip

    arrays = (q, k, v, dout, lse, delta, dk, dv, mask.query_lo, mask.query_hi)
    variables = (int(carry), mask.offset, softmax_scale, *score_scales(softmax_scale, softcap))
    launch(dkdv_kernel, (tile, mask.kind, softcap is None, dk.dtype), arrays, variables, plan)


def _query_boxes(tile: Tile, dim: int) -> dict[int, list[int]]:
    """q, dout and, where pointers would not do, lse and delta."""
    rows = tile.block_m
    boxes = {0: [1, 1, rows, dim], 3: [1, 1, rows, dim]} if tile.tma else {}
    return boxes | {4: [1, 1, rows], 5: [1, 1, rows]} if tile.specialized else boxes


def launch_dq(
    tile: Tile,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    mask: BlockMask,
    softmax_scale: float,
    softcap: float | None,
    carry: bool,
) -> None:
    def plan() -> Plan:
        batch, seqlen_q, nheads, headdim = q.shape
        parts, seqlen_k, nheads_kv = key_sizes(k)
        group = nheads // nheads_kv
        addressable = not tile.tma or (fits_tma(q, k, v, dout) and (not tile.specialized or fits_tma(lse, delta)))
        chosen = tile if addressable else without_tma(tile)
        block_m, block_n, dim = chosen.block_m, chosen.block_n, padded_headdim(headdim)
        heads_total = batch * nheads
        return Plan(
            cdiv(seqlen_q, block_m) * heads_total,
            (
                *strides_bsh(q), *strides_pbsh(k), *strides_pbsh(v), *strides_bsh(dout), *lse.stride()[:2],
                *delta.stride()[:2], *strides_bsh(dq),
                seqlen_q, seqlen_k, parts, headdim, nheads, group, heads_total,
                heads_at_once(mask.kind, heads_total, seqlen_k * headdim * k.element_size()),
            ),
            {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "DIM": dim, "KIND": KIND_NUMBER[mask.kind],
                "SOFTCAP": softcap is not None, "EVEN_M": seqlen_q % block_m == 0, "EVEN_N": seqlen_k % block_n == 0,
                "EVEN_D": headdim == dim, "TMA": chosen.tma, "SPECIALIZED": chosen.specialized,
            },
            chosen,
            key_boxes(block_n, dim) if chosen.tma else {},
            chosen.specialized,
        )  # fmt: skip

    arrays = (q, k, v, dout, lse, delta, dq, mask.key_lo, mask.key_hi)
    variables = (int(carry), mask.offset, softmax_scale, *score_scales(softmax_scale, softcap))
    launch(dq_kernel, (tile, mask.kind, softcap is None), arrays, variables, plan)
