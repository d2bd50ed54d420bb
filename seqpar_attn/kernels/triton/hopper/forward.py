"""Forward block kernel for Hopper: persistent, one producer warp, two or three consumer warpgroups of 64 query rows.

The producer has the copy engine bring queries, keys, values and the carried accumulator. A consumer multiplies the
scores of a tile of keys beside the values of the tile before, so that exponentials are taken while tensor cores work.
Tiles that a mask cuts come first, in a loop of their own: those inside pay nothing for masks.
"""

from __future__ import annotations

from ..common import CAUSAL, CHANGING, FULL, INTERVAL, LN2, LOG2E
from .adapter import (
    fence_async_shared,
    gl,
    gluon,
    held_back,
    mbarrier,
    named_barrier,
    pack,
    reinterpret,
    tanh,
    tma_load,
    tma_wait,
    unpack,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .forward_results import leave, leave_wide, load_wide_carry


@gluon.jit
def _tiles_of_program(total):
    """How many query tiles this program has."""
    programs = gl.num_programs(0)
    full = total // programs
    return full + gl.where(_place_in_round(full) < total - full * programs, 1, 0)


@gluon.jit
def _place_in_round(r):
    """Programs take turns there and back again: tiles come longest first, so sums of rounds become even."""
    return gl.where(r % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def _tile(r, tiles, heads_total, at_once, ROWS: gl.constexpr):
    """(head over all batches, first query) of this program's tile ``r``. ``at_once`` heads take turns, so that their
    keys share the L2. Of these groups of heads the last one begins with its last queries, which a causal mask lets see
    most, the one before it with its first, and so on: neighbours in the order are then of about the same length."""
    index = r * gl.num_programs(0) + _place_in_round(r)
    group = index // (tiles * at_once)
    rest = index - group * (tiles * at_once)
    width = gl.minimum(at_once, heads_total - group * at_once)
    tile = rest // width
    ascends = ((heads_total - 1) // at_once - group) % 2 != 0
    return group * at_once + rest - tile * width, gl.where(ascends, tile, tiles - 1 - tile) * ROWS


@gluon.jit
def _key_tiles(
    row, seqlen_q, seqlen_k, parts, offset, key_lo, key_hi, ROWS: gl.constexpr, KEYS: gl.constexpr, KIND: gl.constexpr
):
    """What the query tile at ``row`` sees, over all parts: (masked tiles, tiles that every row sees in full); and where
    they are, in keys: the first ``left`` masked ones from ``begin`` on, the others from ``full_end`` on, the full ones
    between ``full_begin`` and ``full_end``. Both bounds of intervals never decrease along the rows, so the first and
    the last row decide for the whole tile."""
    begin = row * 0
    left = row * 0
    full_begin = row * 0
    if KIND == FULL:
        full_end = seqlen_k // KEYS * KEYS
        end = seqlen_k
    else:
        last = gl.minimum(row + ROWS, seqlen_q) - 1
        if KIND == CAUSAL:
            full_end = gl.maximum(gl.minimum(row + offset + 1, seqlen_k), 0) // KEYS * KEYS
            end = gl.maximum(gl.minimum(last + offset + 1, seqlen_k), full_end)
        else:
            end = gl.load(key_hi + last)
            begin = gl.minimum(gl.load(key_lo + row), end) // KEYS * KEYS
            full_begin = gl.minimum((gl.load(key_lo + last) + KEYS - 1) // KEYS, (end + KEYS - 1) // KEYS) * KEYS
            full_end = gl.maximum(gl.load(key_hi + row) // KEYS * KEYS, full_begin)
            left = (full_begin - begin) // KEYS
    masked = left + (gl.maximum(end - full_end, 0) + KEYS - 1) // KEYS
    full = (full_end - full_begin) // KEYS
    # A query tile that sees nothing gets a tile of keys that is hidden from it: no special case for its pipeline.
    masked = gl.where(masked + full == 0, 1, masked)
    return masked * parts, full * parts, begin, left, full_begin, full_end


@gluon.jit
def _masked_start(i, begin, left, full_end, KEYS: gl.constexpr, KIND: gl.constexpr):
    """First key of masked tile ``i``."""
    if KIND == FULL:
        return full_end  # of part i
    elif KIND == CAUSAL:
        return full_end + i * KEYS
    else:
        return gl.where(i < left, begin + i * KEYS, full_end + (i - left) * KEYS)


@gluon.jit
def _load_carry(
    out_acc, batch, head, row, r, stage_s, stage_full, stage_empty, DIM: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(stage_empty.index(c), (r & 1) ^ 1)
        mbarrier.expect(stage_full.index(c), 64 * DIM * 4)
        tma_load(out_acc, [batch, head, row + 64 * c, 0], stage_full.index(c), stage_s.index(c))


@gluon.jit
def _producer(
    q, k, v, out_acc, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stage_full, stage_empty, seqlen_q, seqlen_k, parts, nheads, group, heads_total, at_once, offset,
    KIND: gl.constexpr, CARRY: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 64 * CONSUMERS
    tiles = (seqlen_q + ROWS - 1) // ROWS
    i = 0
    for r in range(0, _tiles_of_program(tiles * heads_total)):
        head_index, row = _tile(r, tiles, heads_total, at_once, ROWS)
        batch = head_index // nheads
        head = head_index % nheads
        head_kv = head // group
        masked, full, begin, left, full_begin, full_end = _key_tiles(
            row, seqlen_q, seqlen_k, parts, offset, key_lo, key_hi, ROWS, KEYS, KIND
        )
        full_here = full // parts
        for j in range(0, masked + full):
            part = j * 0
            if KIND == FULL:
                f = gl.maximum(j - masked, 0)
                part = gl.where(j < masked, j, f // gl.maximum(full_here, 1))
                start = gl.where(j < masked, full_end, (f - part * full_here) * KEYS)
            else:
                start = gl.where(
                    j < masked,
                    _masked_start(j, begin, left, full_end, KEYS, KIND),
                    full_begin + (masked + full - 1 - j) * KEYS,
                )
            slot = i % STAGES
            phase = ((i // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), KEYS * DIM * 2)
            tma_load(k, [part, batch, head_kv, start, 0], k_full.index(slot), k_s.index(slot))
            if j == 0:
                for c in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(c), (r & 1) ^ 1)
                    mbarrier.expect(q_full.index(c), 64 * DIM * 2)
                    tma_load(q, [batch, head, row + 64 * c, 0], q_full.index(c), q_s.index(c))
            if CARRY and DIM <= 128:  # noqa: SIM102
                if j == STAGES:  # the consumers have come to this tile: they give the stage up for it
                    _load_carry(out_acc, batch, head, row, r, stage_s, stage_full, stage_empty, DIM, CONSUMERS)
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), KEYS * DIM * 2)
            tma_load(v, [part, batch, head_kv, start, 0], v_full.index(slot), v_s.index(slot))
            i += 1
        if CARRY and DIM <= 128:  # noqa: SIM102
            if masked + full <= STAGES:
                _load_carry(out_acc, batch, head, row, r, stage_s, stage_full, stage_empty, DIM, CONSUMERS)


@gluon.jit
def _softmax(
    s, peak, total, lo, hi, key, pre_scale, post_scale,
    MASKED: gl.constexpr, KIND: gl.constexpr, SOFTCAP: gl.constexpr, KEYS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over scores s [64, KEYS]: probabilities, and the new peak, total and the factor of
    what was summed before, [64]."""
    if SOFTCAP:
        s = tanh(s * pre_scale)
    if MASKED:
        keys = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))[None, :]
        s = gl.where(keys < held_back(hi - key)[:, None], s, float("-inf"))
        if KIND == INTERVAL:
            s = gl.where(keys >= held_back(lo - key)[:, None], s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1) * post_scale)
    base = new_peak
    if MASKED:
        # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf - -inf) would be NaN.
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = gl.exp2(s * post_scale - base[:, None])
    rescale = gl.exp2(peak - base)
    return p, new_peak, total * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _scores(q_c, k_s, slot, KEYS: gl.constexpr, BEYOND: gl.constexpr, SCORES: gl.constexpr):
    """[64, KEYS], on their way."""
    k_tile = k_s.index(slot).reshape([k_s.shape[4], k_s.shape[5]])
    s = gl.zeros([64, KEYS], gl.float32, SCORES)
    if BEYOND == 64:
        keys = k_tile.slice(0, 128, dim=1).permute((1, 0))
        s = warpgroup_mma(q_c.slice(0, 128, dim=1), keys, s, use_acc=False, is_async=True)
        keys = k_tile.slice(128, 64, dim=1).permute((1, 0))
        return warpgroup_mma(q_c.slice(128, 64, dim=1), keys, s, is_async=True)
    else:
        return warpgroup_mma(q_c, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _values(
    p, v_s, slot, acc, acc_beyond, BEYOND: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
    SUMS_BEYOND: gl.constexpr,
):  # fmt: skip
    """``acc``, and ``acc_beyond`` of the columns from 128 on, with the packed probabilities' values, on their way."""
    v_tile = v_s.index(slot).reshape([v_s.shape[4], v_s.shape[5]])
    p = unpack(p, v_s.dtype, SCORES)
    operand = gl.convert_layout(p, gl.DotOperandLayout(0, SUMS, 2))
    if BEYOND:
        acc = warpgroup_mma(operand, v_tile.slice(0, 128, dim=1), acc, is_async=True)
        operand = gl.convert_layout(p, gl.DotOperandLayout(0, SUMS_BEYOND, 2))
        acc_beyond = warpgroup_mma(operand, v_tile.slice(128, BEYOND, dim=1), acc_beyond, is_async=True)
    else:
        acc = warpgroup_mma(operand, v_tile, acc, is_async=True)
    return acc, acc_beyond


@gluon.jit
def _awaited(acc, acc_beyond, BEYOND: gl.constexpr):
    if BEYOND:
        return warpgroup_mma_wait(0, [acc, acc_beyond])
    else:
        return warpgroup_mma_wait(0, [acc]), acc_beyond


@gluon.jit
def _scaled(
    acc, acc_beyond, factor, BEYOND: gl.constexpr, SUMS: gl.constexpr, SUMS_BEYOND: gl.constexpr
):  # fmt: skip
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None]
    if BEYOND:
        acc_beyond = acc_beyond * gl.convert_layout(factor, gl.SliceLayout(1, SUMS_BEYOND))[:, None]
    return acc, acc_beyond


@gluon.jit
def _step(
    i, key, q_c, k_s, v_s, k_full, k_empty, v_full, v_empty, acc, acc_beyond, peak, total, p, lo, hi,
    pre_scale, post_scale,
    c: gl.constexpr, MASKED: gl.constexpr, KIND: gl.constexpr, SOFTCAP: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, BEYOND: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
    SUMS_BEYOND: gl.constexpr,
):  # fmt: skip
    """Scores of key tile i beside the product of the tile before, whose probabilities are ``p``."""
    slot = i % STAGES
    before = (i - 1) % STAGES
    PRODUCTS: gl.constexpr = 2 if BEYOND else 1
    mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
    if PINGPONG:
        named_barrier("sync", "9" if c else "8")
    s = _scores(q_c, k_s, slot, KEYS, BEYOND, SCORES)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc, acc_beyond = _values(p, v_s, before, acc, acc_beyond, BEYOND, SCORES, SUMS, SUMS_BEYOND)
    if PINGPONG:
        named_barrier("arrive", "8" if c else "9")
    s = warpgroup_mma_wait(PRODUCTS, [s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, peak, total, rescale = _softmax(
        s, peak, total, lo, hi, key, pre_scale, post_scale, MASKED, KIND, SOFTCAP, KEYS, SCORES
    )
    acc, acc_beyond = _awaited(acc, acc_beyond, BEYOND)
    mbarrier.arrive(v_empty.index(before), count=1)
    acc, acc_beyond = _scaled(acc, acc_beyond, rescale, BEYOND, SUMS, SUMS_BEYOND)
    return acc, acc_beyond, peak, total, pack(p, v_s.dtype)


@gluon.jit
def _consumer(
    lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total, at_once, offset,
    pre_scale, post_scale,
    c: gl.constexpr, KIND: gl.constexpr, EVEN: gl.constexpr, CARRY: gl.constexpr, KEEP: gl.constexpr,
    SOFTCAP: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PINGPONG: gl.constexpr, BEYOND: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    FIRST: gl.constexpr = 128 if BEYOND else DIM
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    SUMS_BEYOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BEYOND if BEYOND else 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROWS: gl.constexpr = 64 * CONSUMERS
    MASKS: gl.constexpr = KIND != FULL or not EVEN
    tiles = (seqlen_q + ROWS - 1) // ROWS
    q_c = q_s.index(c).reshape([64, DIM])
    i = 0
    if PINGPONG and c == 1:
        named_barrier("arrive", "8")
    for r in range(0, _tiles_of_program(tiles * heads_total)):
        head_index, row = _tile(r, tiles, heads_total, at_once, ROWS)
        batch = head_index // nheads
        head = head_index % nheads
        masked, full, begin, left, full_begin, full_end = _key_tiles(
            row, seqlen_q, seqlen_k, parts, offset, key_lo, key_hi, ROWS, KEYS, KIND
        )
        rows = row + 64 * c + gl.arange(0, 64, ROW)
        lse_pointers = lse + batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh + rows
        if CARRY:
            old_peak = gl.load(lse_pointers, mask=rows < seqlen_q, other=float("-inf")) * LOG2E
        lo = gl.zeros([64], gl.int32, ROW)
        if KIND == FULL:
            hi = lo + seqlen_k
        elif KIND == CAUSAL:
            hi = gl.minimum(rows + offset + 1, seqlen_k)
        else:
            lo = gl.load(key_lo + rows, mask=rows < seqlen_q, other=0)
            hi = gl.load(key_hi + rows, mask=rows < seqlen_q, other=0)
        peak = gl.full([64], float("-inf"), gl.float32, ROW)
        total = gl.zeros([64], gl.float32, ROW)
        acc = gl.zeros([64, FIRST], gl.float32, SUMS)
        acc_beyond = row
        if BEYOND:
            acc_beyond = gl.zeros([64, BEYOND], gl.float32, SUMS_BEYOND)

        mbarrier.wait(q_full.index(c), r & 1)
        slot = i % STAGES
        mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
        if PINGPONG:
            named_barrier("sync", "9" if c else "8")
        s = _scores(q_c, k_s, slot, KEYS, BEYOND, SCORES)
        if PINGPONG:
            named_barrier("arrive", "8" if c else "9")
        if CARRY and not BEYOND:  # noqa: SIM102 - known when compiling, the other only when running
            if r > 0:  # the tile before has left the memory that this one's carry comes to
                tma_wait(0)
                mbarrier.arrive(stage_empty.index(c), count=1)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        key = full_end
        if KIND != FULL:
            key = gl.where(
                masked > 0, _masked_start(0, begin, left, full_end, KEYS, KIND), full_begin + (full - 1) * KEYS
            )
        elif MASKS:
            key = gl.where(masked > 0, full_end, 0)
        p, peak, total, rescale = _softmax(
            s, peak, total, lo, hi, key, pre_scale, post_scale, MASKS, KIND, SOFTCAP, KEYS, SCORES
        )
        p = pack(p, v_s.dtype)
        j0 = 1
        if MASKS:
            for j in range(1, masked):
                acc, acc_beyond, peak, total, p = _step(
                    i + j, _masked_start(j, begin, left, full_end, KEYS, KIND), q_c, k_s, v_s, k_full, k_empty, v_full,
                    v_empty, acc, acc_beyond, peak, total, p, lo, hi, pre_scale, post_scale,
                    c, True, KIND, SOFTCAP, KEYS, STAGES, PINGPONG, BEYOND, SCORES, SUMS, SUMS_BEYOND,
                )  # fmt: skip
            j0 = gl.maximum(masked, 1)
        for j in range(j0, masked + full):
            acc, acc_beyond, peak, total, p = _step(
                i + j, 0, q_c, k_s, v_s, k_full, k_empty, v_full, v_empty, acc, acc_beyond, peak, total, p, lo, hi,
                pre_scale, post_scale, c, False, KIND, SOFTCAP, KEYS, STAGES, PINGPONG, BEYOND, SCORES, SUMS,
                SUMS_BEYOND,
            )  # fmt: skip
        if not BEYOND:
            mbarrier.arrive(q_empty.index(c), count=1)
        elif CARRY:
            staged = reinterpret(q_s.index(c), gl.float32, [2, 1, 1, 64, 64], gl.NVMMASharedLayout(128, 32, 4))
            load_wide_carry(out_acc, batch, head, row + 64 * c, 0, 2, stage_full.index(c), staged)
        i += masked + full
        before = (i - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc, acc_beyond = _values(p, v_s, before, acc, acc_beyond, BEYOND, SCORES, SUMS, SUMS_BEYOND)

        if CARRY:
            # The result so far is one more key with score lse and value out_acc.
            new_peak = gl.maximum(peak, old_peak)
            base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
            old_weight = gl.exp2(old_peak - base)
            rescale = gl.exp2(peak - base)
            total = total * rescale + old_weight
            peak = new_peak
        # Rows without a key have total 0: out 0 and lse = -inf + log2(1). A NaN stays one.
        total = gl.where(total == 0.0, 1.0, total)
        gl.store(lse_pointers, (peak + gl.log2(total)) * LN2, mask=rows < seqlen_q)
        weight = 1.0 / total
        old_weight_now = weight
        if CARRY:
            old_weight *= weight
            old_weight_now = old_weight
            weight *= rescale
        acc, acc_beyond = _awaited(acc, acc_beyond, BEYOND)
        mbarrier.arrive(v_empty.index(before), count=1)
        acc, acc_beyond = _scaled(acc, acc_beyond, weight, BEYOND, SUMS, SUMS_BEYOND)
        if BEYOND:
            leave_wide(
                acc, acc_beyond, old_weight_now, out_acc, out, batch, head, row + 64 * c, q_s.index(c),
                stage_full.index(c), BEYOND, CARRY, KEEP,
            )  # fmt: skip
            mbarrier.arrive(q_empty.index(c), count=1)
        else:
            leave(
                acc, old_weight_now, out_acc, out, batch, head, row + 64 * c, r, q_s, stage_s.index(c),
                stage_full.index(c), DIM, CARRY, KEEP, SUMS,
            )  # fmt: skip
    tma_wait(0)
    if PINGPONG and c == 0:
        named_barrier("sync", "8")


@gluon.jit(do_not_specialize=[*CHANGING, "seqlen_q", "stride_lb", "stride_lh"])
def forward_kernel(
    q, k, v, lse, out_acc, out, key_lo, key_hi,
    stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, group, heads_total, heads_at_once, offset,
    pre_scale, post_scale,
    KIND: gl.constexpr, EVEN: gl.constexpr, CARRY: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PINGPONG: gl.constexpr,
    BEYOND: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``q, k, v, out_acc, out`` are tensor descriptors: [batch, nheads, seqlen, headdim], keys with parts in front, in
    tiles of 64 rows (keys: KEYS). Scores are kept in powers of two, see the portable kernel."""
    STAGE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 32, 4)
    ROUNDED_ONLY: gl.constexpr = not (CARRY or KEEP)
    q_s = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, 64, DIM], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, 1, KEYS, DIM], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, 1, KEYS, DIM], v.layout)
    if BEYOND:
        stage_s = q_s
    elif ROUNDED_ONLY:
        stage_s = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, 64, DIM], q.layout)
    else:
        stage_s = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, 1, 64, DIM], STAGE_LAYOUT)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    stage_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    stage_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(stage_full.index(c), count=1)
        mbarrier.init(stage_empty.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=CONSUMERS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (
                lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total,
                heads_at_once, offset, pre_scale, post_scale,
                0, KIND, EVEN, CARRY, KEEP, SOFTCAP, KEYS, DIM, STAGES, CONSUMERS, PINGPONG, BEYOND,
            )),
            (_consumer, (
                lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total,
                heads_at_once, offset, pre_scale, post_scale,
                1, KIND, EVEN, CARRY, KEEP, SOFTCAP, KEYS, DIM, STAGES, CONSUMERS, PINGPONG, BEYOND,
            )),
            (_producer, (
                q, k, v, out_acc, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, seqlen_q, seqlen_k, parts, nheads, group, heads_total, heads_at_once,
                offset, KIND, CARRY, KEYS, DIM, STAGES, CONSUMERS,
            )),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total,
                heads_at_once, offset, pre_scale, post_scale,
                0, KIND, EVEN, CARRY, KEEP, SOFTCAP, KEYS, DIM, STAGES, CONSUMERS, PINGPONG, BEYOND,
            )),
            (_consumer, (
                lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total,
                heads_at_once, offset, pre_scale, post_scale,
                1, KIND, EVEN, CARRY, KEEP, SOFTCAP, KEYS, DIM, STAGES, CONSUMERS, PINGPONG, BEYOND,
            )),
            (_consumer, (
                lse, out_acc, out, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, stride_lb, stride_lh, seqlen_q, seqlen_k, parts, nheads, heads_total,
                heads_at_once, offset, pre_scale, post_scale,
                2, KIND, EVEN, CARRY, KEEP, SOFTCAP, KEYS, DIM, STAGES, CONSUMERS, PINGPONG, BEYOND,
            )),
            (_producer, (
                q, k, v, out_acc, key_lo, key_hi, q_s, k_s, v_s, stage_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, stage_full, stage_empty, seqlen_q, seqlen_k, parts, nheads, group, heads_total, heads_at_once,
                offset, KIND, CARRY, KEYS, DIM, STAGES, CONSUMERS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
