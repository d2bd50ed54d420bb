"""What the attention kernels share: tile loads and stores, the range of tiles a mask leaves, an accurate tanh."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...mask import MaskKind

FULL = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
INTERVAL = tl.constexpr(2)
KIND_NUMBER = {MaskKind.FULL: 0, MaskKind.CAUSAL: 1, MaskKind.INTERVAL: 2}

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that change from step to step of a ring: specialising kernels on them would only compile more of them.
CHANGING = ["seqlen_q", "seqlen_k", "parts", "offset", "carry", "heads_total", "heads_at_once", "nheads", "group"]

L2_BYTES_FOR_KEYS = 64 << 20


@triton.jit
def program_tile(tiles, heads_total, heads_at_once, REVERSED: tl.constexpr):
    """Which (tile, head) this program owns: ``heads_at_once`` heads interleave so that their keys share the L2."""
    pid = tl.program_id(0)
    group = pid // (tiles * heads_at_once)
    rest = pid % (tiles * heads_at_once)
    width = tl.minimum(heads_at_once, heads_total - group * heads_at_once)
    tile = rest // width
    if REVERSED:
        tile = tiles - 1 - tile
    return tile, group * heads_at_once + rest % width


@triton.jit
def tile_offsets(stride_s, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[ROWS, DIM] offsets inside one tile; 32 bits suffice there (the launcher checks)."""
    return tl.arange(0, ROWS)[:, None] * stride_s + tl.arange(0, DIM)[None, :]


@triton.jit
def tile_bounds(row, seqlen, headdim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[ROWS, DIM] which elements of the tile exist."""
    return ((row + tl.arange(0, ROWS)) < seqlen)[:, None] & (tl.arange(0, DIM) < headdim)[None, :]


@triton.jit
def row_pointer(source, batch, head, row, stride_b, stride_s, stride_h):
    """64-bit on purpose: millions of tokens times heads times dim pass 2^31 elements."""
    return source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(row, tl.int64) * stride_s


@triton.jit
def load_tile(
    source, batch, head, row, stride_b, stride_s, stride_h, seqlen, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, DIM] rows ``row ...`` of one head, zero outside the tensor (the copy engine fills zeros by itself)."""
    if TMA:
        return source.load([batch, head, row, 0]).reshape(ROWS, DIM)
    else:
        pointers = row_pointer(source, batch, head, row, stride_b, stride_s, stride_h)
        pointers = pointers + tile_offsets(stride_s, ROWS, DIM)
        if EVEN_S and EVEN_D:
            return tl.load(pointers)
        elif EVEN_S:
            return tl.load(pointers, mask=(tl.arange(0, DIM) < headdim)[None, :], other=0.0)
        elif EVEN_D:
            return tl.load(pointers, mask=((row + tl.arange(0, ROWS)) < seqlen)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=tile_bounds(row, seqlen, headdim, ROWS, DIM), other=0.0)


@triton.jit
def load_key_tile(
    source, part, batch, head, row, stride_p, stride_b, stride_s, stride_h, seqlen, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``load_tile`` of keys or values, which come in parts."""
    if TMA:
        return source.load([part, batch, head, row, 0]).reshape(ROWS, DIM)
    else:
        source += tl.cast(part, tl.int64) * stride_p
        return load_tile(source, batch, head, row, stride_b, stride_s, stride_h, seqlen, headdim,
                         ROWS, DIM, EVEN_S, EVEN_D, False)  # fmt: skip


@triton.jit
def load_own_tile(
    source, batch, head, row, stride_b, stride_s, stride_h, seqlen, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """``load_tile`` through a pointer, for the tile that a program keeps."""
    if SPECIALIZED:
        # Triton 3.6 splits this tile between two compute groups, and gets it wrong without a word unless the descriptor
        # is made here (it halves its box), has rank 2 (it moves coordinate 0), and is indexed with a value that no
        # vector is made of (it moves those as well): hence program_id(1), which is 0.
        base = row_pointer(source, batch, head, 0, stride_b, stride_s, stride_h)
        descriptor = tl.make_tensor_descriptor(base, [seqlen, headdim], [stride_s, 1], [ROWS, DIM])
        return descriptor.load([row + tl.program_id(1), 0])
    else:
        return load_tile(source, batch, head, row, stride_b, stride_s, stride_h, seqlen, headdim,
                         ROWS, DIM, EVEN_S, EVEN_D, False)  # fmt: skip


@triton.jit
def load_rows(
    source, batch, head, row, stride_b, stride_h, seqlen,
    ROWS: tl.constexpr, EVEN_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS] values of a per-row vector such as lse, zero outside the tensor."""
    if TMA:
        return source.load([batch, head, row]).reshape(ROWS)
    else:
        pointers = row_pointer(source, batch, head, row, stride_b, 1, stride_h) + tl.arange(0, ROWS)
        if EVEN_S:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(row + tl.arange(0, ROWS)) < seqlen, other=0.0)


@triton.jit
def load_own_rows(
    source, batch, head, row, stride_b, stride_h, seqlen,
    ROWS: tl.constexpr, EVEN_S: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """``load_rows`` for the rows that a program keeps; see ``load_own_tile``."""
    if SPECIALIZED:
        base = row_pointer(source, batch, head, 0, stride_b, 1, stride_h)
        return tl.make_tensor_descriptor(base, [seqlen], [1], [ROWS]).load([row + tl.program_id(1)])
    else:
        return load_rows(source, batch, head, row, stride_b, stride_h, seqlen, ROWS, EVEN_S, False)


@triton.jit
def load_accumulator(
    pointers, row, seqlen, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """[ROWS, DIM]; nothing defined outside the tensor. No bounds where none are needed: a full fp32 tile beside the
    accumulators leaves few registers."""
    if EVEN_S and EVEN_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tile_bounds(row, seqlen, headdim, ROWS, DIM))


@triton.jit
def store_tile(
    pointers, value, row, seqlen, headdim,
    ROWS: tl.constexpr, DIM: tl.constexpr, EVEN_S: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """[ROWS, DIM] in the type of the target."""
    value = value.to(pointers.dtype.element_ty)
    if EVEN_S and EVEN_D:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=tile_bounds(row, seqlen, headdim, ROWS, DIM))


@triton.jit
def key_ranges(
    row, seqlen_q, seqlen_k, offset, key_lo, key_hi, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr
):
    """What the query tile at ``row`` sees: ``(lo, hi)`` per row [BLOCK_M] and, in multiples of BLOCK_N, the ranges
    ``[begin, full_begin)`` masked, ``[full_begin, full_end)`` seen by every row, ``[full_end, end)`` masked.

    Both bounds never decrease along the rows, so the first and the last row decide for the whole tile.
    """
    rows = row + tl.arange(0, BLOCK_M)
    last = tl.minimum(row + BLOCK_M, seqlen_q) - 1
    lo = tl.zeros([BLOCK_M], tl.int32)
    begin = row * 0
    full_begin = row * 0
    if KIND == FULL:
        hi = lo + seqlen_k
        full_end = seqlen_k // BLOCK_N * BLOCK_N
        end = seqlen_k
    elif KIND == CAUSAL:
        hi = tl.minimum(rows + offset + 1, seqlen_k)
        full_end = tl.maximum(tl.minimum(row + offset + 1, seqlen_k), 0) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(last + offset + 1, seqlen_k), full_end)
    else:
        lo = tl.load(key_lo + rows, mask=rows < seqlen_q, other=0)
        hi = tl.load(key_hi + rows, mask=rows < seqlen_q, other=0)
        end = tl.load(key_hi + last)
        begin = tl.minimum(tl.load(key_lo + row), end) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(tl.cdiv(tl.load(key_lo + last), BLOCK_N), tl.cdiv(end, BLOCK_N)) * BLOCK_N
        full_end = tl.maximum(tl.load(key_hi + row) // BLOCK_N * BLOCK_N, full_begin)
    return lo, hi, begin, full_begin, full_end, end


@triton.jit
def part_and_tile(i, tiles, KIND: tl.constexpr):
    """The i-th tile of all parts, each of ``tiles`` tiles, as (part, tile of that part). Masked keys are one part."""
    if KIND == FULL:
        return i // tiles, i % tiles
    else:
        return i * 0, i


@triton.jit
def visible(index, lo, hi, KIND: tl.constexpr):
    """Elementwise ``lo <= index < hi``; only intervals have a lower bound."""
    if KIND == INTERVAL:
        return (index >= lo) & (index < hi)
    else:
        return index < hi


@triton.jit
def masked_start(i, begin, left_tiles, full_end, BLOCK: tl.constexpr):
    """Start of the i-th masked tile: those left of the full range come first, then those right of it."""
    return tl.where(i < left_tiles, begin + i * BLOCK, full_end + (i - left_tiles) * BLOCK)


@triton.jit
def tanh(x):
    """Good to a few ulp everywhere: 1 - 2 / (e^2x + 1) cancels for small x, so those take a polynomial."""
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * 2.8853900817779268) + 1.0)
    square = x * x
    near = 1.57394409e-2 * square - 5.23025580e-2
    near = near * square + 1.33152470e-1
    near = near * square - 3.33327681e-1
    near = near * square * x + x
    return tl.where(magnitude < 0.55, near, tl.where(x < 0, -far, far))


# --- the launchers' side -----------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded_headdim(headdim: int) -> int:
    """Triton tiles are powers of two, and a tensor core multiplies at least 16 deep."""
    return max(16, 1 << (headdim - 1).bit_length())


def heads_at_once(kind: MaskKind, heads_total: int, bytes_per_head: int) -> int:
    """How many heads to interleave. Without a mask every program costs the same, so one head after the other reads its
    keys from the L2; with one, the more heads the better the longest-first order balances."""
    if kind is MaskKind.FULL:
        return 1
    return max(1, min(heads_total, L2_BYTES_FOR_KEYS // max(1, 2 * bytes_per_head)))


def score_scales(softmax_scale: float, softcap: float | None) -> tuple[float, float]:
    """``(pre, post)``: scores in powers of two are ``s * post``, or ``tanh(s * pre) * post`` with a soft cap."""
    if softcap is None:
        return 1.0, softmax_scale * LOG2E.value
    return softmax_scale / softcap, softcap * LOG2E.value


def strides_bsh(x: torch.Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    assert x.stride(1) < 1 << 23, f"offsets inside a tile of 256 rows need 32 bits, got stride {x.stride(1)}"
    return x.stride()[:3]


def strides_pbsh(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of keys or values, with or without a leading dimension of parts."""
    return (x.stride(0), *strides_bsh(x[0])) if x.ndim == 5 else (0, *strides_bsh(x))


def key_sizes(k: torch.Tensor) -> tuple[int, int, int]:
    """``(parts, seqlen_k, nheads_kv)``."""
    return (k.shape[0] if k.ndim == 5 else 1, *k.shape[-3:-1])


def key_boxes(block_n: int, dim: int) -> dict[int, list[int]]:
    """Tiles of k and v, arguments 1 and 2, for the copy engine."""
    return {1: [1, 1, 1, block_n, dim], 2: [1, 1, 1, block_n, dim]}
