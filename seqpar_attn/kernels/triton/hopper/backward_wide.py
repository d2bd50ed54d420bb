"""Backward block kernel for Hopper and head dimensions from 136 to 256: a program owns 64 keys and walks over the query
tiles that see them, for all query heads of their group.

What a warpgroup of ``backward`` sums does not fit its registers here, so each of three has one gradient and hands on
what the next one needs: the first forms P and sums dV, the second gets P through shared memory, forms dS and sums dK,
the third multiplies dQ = dS K by quarters of its columns and has the copy engine add them. Scores and dP are formed
transposed, and P, dS and dq are scaled and ordered, as in ``backward``. Of the 256 columns that there is memory for,
128 + BEYOND are multiplied.
"""

from __future__ import annotations

from ..common import CAUSAL, CHANGING, FULL, INTERVAL, LOG2E
from .adapter import (
    fence_async_shared,
    gl,
    gluon,
    halves,
    mbarrier,
    pack,
    reinterpret,
    tanh,
    tma_add,
    tma_load,
    tma_store,
    tma_wait,
    unpack,
    warpgroup_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .backward import kept, program_work, step_tile, store_dq, whole

_KEYS = gl.constexpr(64)
_QUERIES = gl.constexpr(64)
_HALVES = gl.constexpr(3)  # stages of half tiles of dout: one and a half tiles
_NEVER = gl.constexpr(1 << 30)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
# Of [64, 32] numbers that hold two neighbours of a tile in _SCORES each, in the order of _to_message: a thread's eight
# of a row come together, and are stored 16 bytes at a time without bank conflicts.
_MESSAGE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]
    )
)


@gluon.jit
def _tile_of_step(i, group, key, first, end, down, KIND: gl.constexpr):
    """``step_tile``; without a mask, neighbouring keys begin two tiles apart, not to add to the same rows of dq."""
    tile, h = step_tile(i, group, first, end, down)
    if KIND == FULL:
        tile = gl.where(group == 1, (tile + key // _KEYS * 2) % gl.maximum(end, 1), tile)
    return tile, h


@gluon.jit
def _producer(
    q, k, v, dout, query_lo, query_hi, q_s, k_s, v_s, dout_s, kv_full, q_full, q_empty, dout_full, dout_empty,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, KIND: gl.constexpr,
):  # fmt: skip
    head_index, part, key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, _QUERIES, _KEYS, KIND
    )
    batch = head_index // nheads_kv
    head_kv = head_index % nheads_kv
    steps = (end - first) * group
    if steps > 0:
        mbarrier.expect(kv_full.index(0), 2 * 64 * 256 * 2)
        tma_load(k, [part, batch, head_kv, key, 0], kv_full.index(0), k_s.index(0))
        tma_load(v, [part, batch, head_kv, key, 0], kv_full.index(0), v_s.index(0))
        for i in range(0, steps):
            tile, h = _tile_of_step(i, group, key, first, end, down, KIND)
            head = head_kv * group + h
            slot = i & 1
            mbarrier.wait(q_empty.index(slot), ((i >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), 64 * 256 * 2)
            tma_load(q, [batch, head, tile * _QUERIES, 0], q_full.index(slot), q_s.index(slot))
            for n in gl.static_range(2):
                half = 2 * i + n
                slot = half % _HALVES
                mbarrier.wait(dout_empty.index(slot), ((half // _HALVES) & 1) ^ 1)
                mbarrier.expect(dout_full.index(slot), 64 * 128 * 2)
                tma_load(dout, [batch, head, tile * _QUERIES, 128 * n], dout_full.index(slot), dout_s.index(slot))


@gluon.jit
def _loader(
    lse, delta, query_lo, query_hi, lse_s, delta_s, q_full, q_empty, stride_lb, stride_lh, stride_eb, stride_eh,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, lse_factor,
    KIND: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """lse and delta in the form that ``backward`` has them in."""
    head_index, _part, key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, _QUERIES, _KEYS, KIND
    )
    batch = (head_index // nheads_kv).to(gl.int64)
    head_kv = head_index % nheads_kv
    rows = gl.arange(0, _QUERIES, gl.BlockedLayout([2], [32], [1], [0]))
    for i in range(0, (end - first) * group):
        tile, h = _tile_of_step(i, group, key, first, end, down, KIND)
        head = (head_kv * group + h).to(gl.int64)
        row = tile * _QUERIES + rows
        exists = row < seqlen_q
        slot = i & 1
        mbarrier.wait(q_empty.index(slot), ((i >> 1) & 1) ^ 1)
        x = gl.load(lse + batch * stride_lb + head * stride_lh + row, mask=exists, other=float("-inf"))
        d = gl.load(delta + batch * stride_eb + head * stride_eh + row, mask=exists, other=0.0)
        lse_s.index(slot).store(gl.where(x == float("-inf"), x, (SHIFT - x * LOG2E) * lse_factor))
        delta_s.index(slot).store(-d)
        mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _first_product(a, b, x, BEYOND: gl.constexpr):
    """x += a [64, 128 + BEYOND] b^T, of which the memory has 256 columns; on its way."""
    if BEYOND == 64:
        x = warpgroup_mma(a.slice(0, 128, dim=1), b.slice(0, 128, dim=1).permute((1, 0)), x, is_async=True)
        return warpgroup_mma(a.slice(128, 64, dim=1), b.slice(128, 64, dim=1).permute((1, 0)), x, is_async=True)
    else:
        return warpgroup_mma(a, b.permute((1, 0)), x, is_async=True)


@gluon.jit
def _scores(k_tile, q_s, lse_s, slot, SOFTCAP: gl.constexpr, BEYOND: gl.constexpr):
    """[64 keys, 64 queries], on their way; they start at -lse, unless a cap comes in between."""
    x = gl.zeros([64, 64], gl.float32, _SCORES)
    if not SOFTCAP:
        x = x + lse_s.index(slot).load(gl.SliceLayout(0, _SCORES))[None, :]
    return _first_product(k_tile, q_s.index(slot).reshape([64, 256]), x, BEYOND)


@gluon.jit
def _to_message(x):
    """[64, 32], column 4 j + t -> column 8 t + j, in _MESSAGE."""
    x = gl.reshape(gl.permute(gl.reshape(x, [64, 8, 4]), [0, 2, 1]), [64, 32])
    return gl.convert_layout(x, _MESSAGE, assert_trivial=True)


@gluon.jit
def _from_message(x):
    return gl.reshape(gl.permute(gl.reshape(x, [64, 4, 8]), [0, 2, 1]), [64, 32])


@gluon.jit
def _form_p(
    s, lse_s, slot, query, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k, offset, pre_scale, post_scale,
    message_s, DTYPE: gl.constexpr, KIND: gl.constexpr, SOFTCAP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """P of the query tile at ``query``, packed for dV; and for dS, times the derivative of the cap, as a message, of
    two parts if SPLIT."""
    factor = 1.0
    if SOFTCAP:
        capped = tanh(s * pre_scale)
        p = gl.exp2(capped * post_scale + lse_s.index(slot).load(gl.SliceLayout(0, _SCORES))[None, :])
        factor = 1.0 - capped * capped
    else:
        p = gl.exp2(s * post_scale)
    if (query < inner_lo) | (query + _QUERIES > inner_hi):
        keys = key + gl.arange(0, 64, gl.SliceLayout(1, _SCORES))
        queries = (query + gl.arange(0, 64, gl.SliceLayout(0, _SCORES)))[None, :]
        if KIND == INTERVAL:
            lo = gl.load(query_lo + keys, mask=keys < seqlen_k, other=_NEVER)
            hi = gl.load(query_hi + keys, mask=keys < seqlen_k, other=0)
            p = gl.where((queries >= lo[:, None]) & (queries < hi[:, None]), p, 0.0)
        else:
            lo = keys - offset
            if KIND == FULL:
                lo = lo * 0
            lo = gl.where(keys < seqlen_k, lo, _NEVER)
            p = gl.where(queries >= lo[:, None], p, 0.0)
    high, low = kept(p * factor, SPLIT, _SCORES)
    message_s.index(0).store(_to_message(high))
    if SPLIT:
        message_s.index(1).store(_to_message(low))
    return pack(p, DTYPE)


@gluon.jit
def _write(target, part, batch, head_kv, key, column: gl.constexpr, x, memory, CARRY: gl.constexpr):
    """64 columns of dk or dv, on their way."""
    memory.reshape([64, 64]).store(x)
    fence_async_shared()
    warpgroup_barrier()
    if CARRY:
        tma_add(target, [part, batch, head_kv, key, column], memory)
    else:
        tma_store(target, [part, batch, head_kv, key, column], memory)


@gluon.jit
def _write_all(
    target, part, batch, head_kv, key, x, beyond, memory, PLACES: gl.constexpr,
    BEYOND: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """All columns of dk or dv, through ``memory`` with PLACES for 64 of them rounded, half as many for fp32."""
    a, b = halves(x, _SCORES)
    if ROUND:
        places = reinterpret(memory, memory.dtype, [PLACES, 1, 1, 1, 64, 64], gl.NVMMASharedLayout(128, 16, 5))
        a = a.to(memory.dtype)
        b = b.to(memory.dtype)
        beyond = beyond.to(memory.dtype)
    else:
        places = reinterpret(memory, gl.float32, [PLACES // 2, 1, 1, 1, 64, 64], gl.NVMMASharedLayout(128, 32, 5))
    THIRD: gl.constexpr = 2 if ROUND else 0
    _write(target, part, batch, head_kv, key, 0, a, places.index(0), CARRY)
    _write(target, part, batch, head_kv, key, 64, b, places.index(1), CARRY)
    if not ROUND:
        tma_wait(0)
        warpgroup_barrier()
    if BEYOND == 128:
        d, e = halves(beyond, _SCORES)
        _write(target, part, batch, head_kv, key, 128, d, places.index(THIRD), CARRY)
        _write(target, part, batch, head_kv, key, 192, e, places.index(THIRD + 1), CARRY)
    else:
        _write(target, part, batch, head_kv, key, 128, beyond, places.index(THIRD), CARRY)
    tma_wait(0)


@gluon.jit
def _values(
    dv, query_lo, query_hi, q_s, k_s, dout_s, lse_s, message_s, kv_full, q_full, q_empty, dout_full, dout_empty, p_full,
    p_empty, seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, pre_scale, post_scale,
    KIND: gl.constexpr, SOFTCAP: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr, SHIFT: gl.constexpr,
    BEYOND: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: P, and dV += P^T dout."""
    SPLIT: gl.constexpr = SHIFT == 0
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    SUMS_BEYOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BEYOND, 16])
    head_index, part, key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, _QUERIES, _KEYS, KIND
    )
    steps = (end - first) * group
    # Queries that see all 64 keys; none if some of the keys do not exist.
    inner_lo = key * 0
    inner_hi = inner_lo + _NEVER
    if KIND == CAUSAL:
        inner_lo = key + 63 - offset
    elif KIND == INTERVAL:
        inner_lo = gl.load(query_lo + gl.minimum(key + 63, seqlen_k - 1))
        inner_hi = gl.load(query_hi + gl.minimum(key, seqlen_k - 1))
    inner_lo = gl.where(key + 64 <= seqlen_k, inner_lo, _NEVER)
    total = gl.zeros([64, 128], gl.float32, SUMS)
    beyond = gl.zeros([64, BEYOND], gl.float32, SUMS_BEYOND)
    if steps > 0:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(q_full.index(0), 0)
        s = _scores(k_s.index(0).reshape([64, 256]), q_s, lse_s, 0, SOFTCAP, BEYOND)
        s = warpgroup_mma_wait(0, [s])
        tile, _h = _tile_of_step(0, group, key, first, end, down, KIND)
        p = _form_p(
            s, lse_s, 0, tile * _QUERIES, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k, offset, pre_scale,
            post_scale, message_s, q_s.dtype, KIND, SOFTCAP, SPLIT,
        )  # fmt: skip
        mbarrier.arrive(p_full.index(0), count=1)
        mbarrier.arrive(q_empty.index(0), count=1)
        for i in range(0, steps):
            zero = i >> 28  # always, but the compiler cannot know, see ``backward``
            more = i + 1 < steps
            unpacked = unpack(p, q_s.dtype, _SCORES)
            half = 2 * i
            slot0 = half % _HALVES
            mbarrier.wait(dout_full.index(slot0), (half // _HALVES) & 1)
            operand = gl.convert_layout(unpacked, gl.DotOperandLayout(0, SUMS, 2))
            total = warpgroup_mma(operand, dout_s.index(slot0).reshape([64, 128]), total, is_async=True)
            half += 1
            slot1 = half % _HALVES
            mbarrier.wait(dout_full.index(slot1), (half // _HALVES) & 1)
            operand = gl.convert_layout(unpacked, gl.DotOperandLayout(0, SUMS_BEYOND, 2))
            dout_tile = dout_s.index(slot1).reshape([64, 128]).slice(0, BEYOND, dim=1)
            beyond = warpgroup_mma(operand, dout_tile, beyond, is_async=True)
            # After the last tile: the scores of a stale one, which nobody reads.
            slot = (i + 1) & 1
            mbarrier.wait(q_full.index(slot), ((i + 1) >> 1) & 1, pred=more)
            s = _scores(k_s.index(zero).reshape([64, 256]), q_s, lse_s, slot, SOFTCAP, BEYOND)
            PRODUCTS: gl.constexpr = 2 if BEYOND == 64 else 1
            total = warpgroup_mma_wait(1 + PRODUCTS, [total])
            mbarrier.arrive(dout_empty.index(slot0), count=1)
            beyond = warpgroup_mma_wait(PRODUCTS, [beyond])
            mbarrier.arrive(dout_empty.index(slot1), count=1)
            total, beyond, s = warpgroup_mma_wait(0, [total, beyond, s])
            mbarrier.wait(p_empty.index(0), i & 1)
            tile, _h = _tile_of_step(i + 1, group, key, first, end, down, KIND)
            p = _form_p(
                s, lse_s, slot, tile * _QUERIES, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k, offset,
                pre_scale, post_scale, message_s, q_s.dtype, KIND, SOFTCAP, SPLIT,
            )  # fmt: skip
            mbarrier.arrive(p_full.index(0), count=1)
            mbarrier.arrive(q_empty.index(slot), count=1)
        # The memory of dout, which is taken for the results, is still read by the second warpgroup.
        for n in gl.static_range(1, 3):
            half = 2 * steps - n
            mbarrier.wait(dout_empty.index(half % _HALVES), (half // _HALVES) & 1)
        half = gl.maximum(2 * steps - 3, 0)
        mbarrier.wait(dout_empty.index(half % _HALVES), (half // _HALVES) & 1)
    if steps > 0 or not CARRY:
        UNSHIFT: gl.constexpr = 2.0**-SHIFT
        _write_all(
            dv, part, head_index // nheads_kv, head_index % nheads_kv, key, total * UNSHIFT, beyond * UNSHIFT,
            dout_s, 6, BEYOND, CARRY, ROUND,
        )  # fmt: skip


@gluon.jit
def _dp(v_tile, dout_s, delta_s, slot, i, dout_full, more, BEYOND: gl.constexpr):
    """dP - delta [64 keys, 64 queries] of step ``i``, on its way in two products; of a stale tile if not ``more``."""
    dp = gl.zeros([64, 64], gl.float32, _SCORES) + delta_s.index(slot).load(gl.SliceLayout(0, _SCORES))[None, :]
    for n in gl.static_range(2):
        half = 2 * i + n
        slot = half % _HALVES
        mbarrier.wait(dout_full.index(slot), (half // _HALVES) & 1, pred=more)
        dout_tile = dout_s.index(slot).reshape([64, 128]).slice(0, BEYOND if n else 128, dim=1)
        columns = v_tile.slice(128 * n, BEYOND if n else 128, dim=1)
        dp = warpgroup_mma(columns, dout_tile.permute((1, 0)), dp, is_async=True)
    return dp


@gluon.jit
def _keys(
    dk, query_lo, query_hi, q_s, v_s, dout_s, delta_s, message_s, ds_s, kv_full, q_full, q_empty, dout_full, dout_empty,
    p_full, p_empty, ds_full, ds_empty,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, softmax_scale,
    KIND: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr, SHIFT: gl.constexpr, BEYOND: gl.constexpr,
):  # fmt: skip
    """The second warpgroup: dS, and dK += dS^T Q."""
    SPLIT: gl.constexpr = SHIFT == 0
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    SUMS_BEYOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BEYOND, 16])
    head_index, part, key, first, end, _down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, _QUERIES, _KEYS, KIND
    )
    steps = (end - first) * group
    total = gl.zeros([64, 128], gl.float32, SUMS)
    beyond = gl.zeros([64, BEYOND], gl.float32, SUMS_BEYOND)
    if steps > 0:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(q_full.index(0), 0)
        dp = _dp(v_s.index(0).reshape([64, 256]), dout_s, delta_s, 0, 0, dout_full, True, BEYOND)
        dp = warpgroup_mma_wait(0, [dp])
        mbarrier.arrive(dout_empty.index(0), count=1)
        mbarrier.arrive(dout_empty.index(1), count=1)
        for i in range(0, steps):
            zero = i >> 28
            more = i + 1 < steps
            slot = i & 1
            mbarrier.wait(p_full.index(0), i & 1)
            high = _from_message(message_s.index(0).load(_MESSAGE))
            low = _from_message(message_s.index(message_s.shape[0] - 1).load(_MESSAGE))  # if not SPLIT, not looked at
            ds = (whole(high, low, SPLIT, _SCORES) * dp).to(q_s.dtype)
            mbarrier.arrive(p_empty.index(0), count=1)
            q_tile = q_s.index(slot).reshape([64, 256])
            operand = gl.convert_layout(ds, gl.DotOperandLayout(0, SUMS, 2))
            total = warpgroup_mma(operand, q_tile.slice(0, 128, dim=1), total, is_async=True)
            operand = gl.convert_layout(ds, gl.DotOperandLayout(0, SUMS_BEYOND, 2))
            beyond = warpgroup_mma(operand, q_tile.slice(128, BEYOND, dim=1), beyond, is_async=True)
            mbarrier.wait(ds_empty.index(0), (i & 1) ^ 1)
            ds_s.store(ds)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(0), count=1)
            mbarrier.wait(q_full.index(slot ^ 1), ((i + 1) >> 1) & 1, pred=more)  # for delta
            dp = _dp(v_s.index(zero).reshape([64, 256]), dout_s, delta_s, slot ^ 1, i + 1, dout_full, more, BEYOND)
            total, beyond = warpgroup_mma_wait(2, [total, beyond])
            mbarrier.arrive(q_empty.index(slot), count=1)
            total, beyond, dp = warpgroup_mma_wait(0, [total, beyond, dp])
            half = 2 * i + 2
            mbarrier.arrive(dout_empty.index(half % _HALVES), count=1, pred=more)
            mbarrier.arrive(dout_empty.index((half + 1) % _HALVES), count=1, pred=more)
    if steps > 0 or not CARRY:
        factor = softmax_scale * 2.0**-SHIFT
        _write_all(
            dk, part, head_index // nheads_kv, head_index % nheads_kv, key, total * factor, beyond * factor,
            v_s, 4, BEYOND, CARRY, ROUND,
        )  # fmt: skip


@gluon.jit
def _queries(
    dq, query_lo, query_hi, k_s, ds_s, dq_s, kv_full, ds_full, ds_empty,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
    KIND: gl.constexpr, PERMUTED: gl.constexpr, BEYOND: gl.constexpr,
):  # fmt: skip
    """The third warpgroup: dQ = dS K, 64 columns at a time."""
    QUARTERS: gl.constexpr = 2 + BEYOND // 64
    PLACES: gl.constexpr = dq_s.shape[0]
    head_index, _part, key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, _QUERIES, _KEYS, KIND
    )
    steps = (end - first) * group
    if steps > 0:
        batch = head_index // nheads_kv
        first_head = head_index % nheads_kv * group
        mbarrier.wait(kv_full.index(0), 0)
        for i in range(0, steps):
            zero = i >> 28
            tile, h = _tile_of_step(i, group, key, first, end, down, KIND)
            k_tile = k_s.index(zero).reshape([64, 256])
            mbarrier.wait(ds_full.index(0), i & 1)
            for quarter in gl.static_range(QUARTERS):
                x = gl.zeros([64, 64], gl.float32, _SCORES)
                columns = k_tile.slice(64 * quarter, 64, dim=1)
                x = warpgroup_mma(ds_s.permute((1, 0)), columns, x, use_acc=False, is_async=True)
                x = warpgroup_mma_wait(0, [x])
                tma_wait(PLACES - 1)  # what was in this quarter's place has left
                if quarter == QUARTERS - 1:
                    mbarrier.arrive(ds_empty.index(0), count=1)
                else:
                    warpgroup_barrier()
                place = dq_s.index((QUARTERS * i + quarter) % PLACES)
                store_dq(place, x, PERMUTED)
                fence_async_shared()
                warpgroup_barrier()
                tma_add(dq, [batch, first_head + h, tile * _QUERIES, 64 * quarter], place)
    tma_wait(0)


@gluon.jit(
    do_not_specialize=[*CHANGING, "nheads_kv", "together", "wave", "stride_lb", "stride_lh", "stride_eb", "stride_eh"]
)
def backward_wide_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, query_lo, query_hi,
    stride_lb, stride_lh, stride_eb, stride_eh,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
    pre_scale, post_scale, lse_factor, softmax_scale,
    KIND: gl.constexpr, SOFTCAP: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr, PERMUTED: gl.constexpr,
    SHIFT: gl.constexpr, BEYOND: gl.constexpr,
):  # fmt: skip
    """The arguments of ``backward_kernel``; q, k, v in tiles of 64 rows, dout of 64 rows and 128 columns, what is
    written of 64 rows and 64 columns."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    q_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, 256], q.layout)
    dout_s = gl.allocate_shared_memory(q.dtype, [3, 1, 1, 64, 128], dout.layout)
    k_s = gl.allocate_shared_memory(q.dtype, [1, 1, 1, 1, 64, 256], k.layout)
    v_s = gl.allocate_shared_memory(q.dtype, [1, 1, 1, 1, 64, 256], k.layout)
    ds_s = gl.allocate_shared_memory(q.dtype, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
    SPLIT: gl.constexpr = SHIFT == 0
    message_s = gl.allocate_shared_memory(gl.int32, [2 if SPLIT else 1, 64, 32], gl.NVMMASharedLayout(128, 32, 2))
    dq_s = gl.allocate_shared_memory(gl.float32, [1 if SPLIT else 2, 1, 1, 64, 64], dq.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [2, 64], ROWS)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, 64], ROWS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER)
    dout_empty = gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    p_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=1)
    for s in gl.static_range(2):
        mbarrier.init(q_full.index(s), count=2)  # the copy engine's bytes, and the warp that brings lse and delta
        mbarrier.init(q_empty.index(s), count=2)
    for s in gl.static_range(3):
        mbarrier.init(dout_full.index(s), count=1)
        mbarrier.init(dout_empty.index(s), count=2)
    mbarrier.init(p_full.index(0), count=1)
    mbarrier.init(p_empty.index(0), count=1)
    mbarrier.init(ds_full.index(0), count=1)
    mbarrier.init(ds_empty.index(0), count=1)
    fence_async_shared()
    # 512 registers in all: the sums of two warpgroups take 128 each. The first gets what is left, 208.
    gl.warp_specialize([
        (_values, (
            dv, query_lo, query_hi, q_s, k_s, dout_s, lse_s, message_s, kv_full, q_full, q_empty, dout_full, dout_empty,
            p_full, p_empty,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, pre_scale, post_scale,
            KIND, SOFTCAP, CARRY, ROUND, SHIFT, BEYOND,
        )),
        (_keys, (
            dk, query_lo, query_hi, q_s, v_s, dout_s, delta_s, message_s, ds_s, kv_full, q_full, q_empty, dout_full,
            dout_empty, p_full, p_empty, ds_full, ds_empty,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, softmax_scale,
            KIND, CARRY, ROUND, SHIFT, BEYOND,
        )),
        (_queries, (
            dq, query_lo, query_hi, k_s, ds_s, dq_s, kv_full, ds_full, ds_empty,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
            KIND, PERMUTED, BEYOND,
        )),
        (_producer, (
            q, k, v, dout, query_lo, query_hi, q_s, k_s, v_s, dout_s, kv_full, q_full, q_empty, dout_full, dout_empty,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, KIND,
        )),
        (_loader, (
            lse, delta, query_lo, query_hi, lse_s, delta_s, q_full, q_empty, stride_lb, stride_lh, stride_eb, stride_eh,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, lse_factor,
            KIND, SHIFT,
        )),
    ], [4, 4, 1, 1], [208, 72, 24, 24])  # fmt: skip
