"""Backward block kernel for Hopper: a program owns 128 keys, 64 per consumer warpgroup, and walks over the query tiles
that see them, for all query heads of their group.

Scores and dP are formed transposed (keys are rows), so that P and dS are register operands of the products for dV and
dK. dS also goes through shared memory for dQ = dS K, which is multiplied one tile late, so that the two warpgroups need
not wait for each other, and which the copy engine adds to an fp32 accumulator. Its columns are there in an order that
takes 16-byte stores without bank conflicts (``dq_position`` in ``finish``); P, and with it dS and dq, is 2^14 times
itself for bf16.
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

_NEVER = gl.constexpr(1 << 30)
# A query tile and a head of the group as one number, for the consumers are short of registers: tile * _TILE + head.
_TILE = gl.constexpr(1 << 12)
_NO_TILE = gl.constexpr(((1 << 19) - 1) << 12)  # queries that do not exist


@gluon.jit
def program_work(
    seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """This program's (key head over all batches, part, first key), its query tiles [first, end) and whether it walks
    down. ``together`` heads take turns. Programs of a wave begin together and those of the next one as these end, so
    one wave walks down from the last queries and the next one up: then all are at about the same queries, and find in
    the L2 what another has loaded or added to."""
    pid = gl.program_id(0)
    tiles_of_part = (seqlen_k + KEYS - 1) // KEYS
    per = tiles_of_part * parts * together
    heads = pid // per
    rest = pid - heads * per
    width = gl.minimum(together, heads_total - heads * together)
    tile = rest // width
    head_index = heads * together + rest - tile * width
    part = tile // tiles_of_part
    key = (tile - part * tiles_of_part) * KEYS
    end = (seqlen_q + QUERIES - 1) // QUERIES
    first = end * 0
    if KIND == CAUSAL:
        first = gl.minimum(gl.maximum(key - offset, 0) // QUERIES, end)
    elif KIND == INTERVAL:
        last = gl.minimum(key + KEYS, seqlen_k) - 1
        end = gl.minimum((gl.load(query_hi + last) + QUERIES - 1) // QUERIES, end)
        first = gl.minimum(gl.load(query_lo + key) // QUERIES, end)
    down = (wave > 0) & ((pid // gl.maximum(wave, 1)) % 2 == 0)
    return head_index, part, key, first, end, down


@gluon.jit
def step_tile(i, group, first, end, down):
    """(query tile, head in the group) of step ``i``: heads take turns with a query tile. Past the last, that again."""
    step = gl.minimum(i, (end - first) * group - 1)
    tile = step // group
    return gl.where(down, end - 1 - tile, first + tile), step - tile * group


@gluon.jit
def _producer(
    q, k, v, dout, query_lo, query_hi, q_s, k_s, v_s, dout_s, kv_full, q_full, q_empty, dout_full, ds_full,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
    KIND: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    head_index, part, key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, QUERIES, KEYS, KIND
    )
    batch = head_index // nheads_kv
    head_kv = head_index % nheads_kv
    steps = (end - first) * group
    if steps > 0:
        mbarrier.expect(kv_full.index(0), 2 * KEYS * DIM * 2)
        for c in gl.static_range(2):
            tma_load(k, [part, batch, head_kv, key + 64 * c, 0], kv_full.index(0), k_s.index(c))
            tma_load(v, [part, batch, head_kv, key + 64 * c, 0], kv_full.index(0), v_s.index(c))
        # One tile of queries more than there are steps: a step looks ahead to the next one's scores.
        for i in range(0, steps + 1):
            tile, h = step_tile(i, group, first, end, down)
            head = head_kv * group + h
            slot = i % Q_STAGES
            mbarrier.wait(q_empty.index(slot), ((i // Q_STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), QUERIES * DIM * 2)
            tma_load(q, [batch, head, tile * QUERIES, 0], q_full.index(slot), q_s.index(slot))
            if i < steps:
                slot = i & 1
                mbarrier.wait(ds_full.index(slot), ((i >> 1) & 1) ^ 1)
                mbarrier.expect(dout_full.index(slot), QUERIES * DIM * 2)
                tma_load(dout, [batch, head, tile * QUERIES, 0], dout_full.index(slot), dout_s.index(slot))


@gluon.jit
def _loader(
    lse, delta, query_lo, query_hi, lse_s, delta_s, q_full, q_empty, dout_full, ds_full,
    stride_lb, stride_lh, stride_eb, stride_eh,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, lse_factor,
    KIND: gl.constexpr, SHIFT: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """(SHIFT - lse in powers of two) times ``lse_factor``, and -delta, of each query tile: the copy engine could not,
    for slices of lse along the sequence begin anywhere. Rows without keys and rows that do not exist get -inf and 0,
    which makes their P and dS 0."""
    head_index, _part, _key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, QUERIES, KEYS, KIND
    )
    batch = (head_index // nheads_kv).to(gl.int64)
    head_kv = head_index % nheads_kv
    steps = (end - first) * group
    rows = gl.arange(0, QUERIES, gl.BlockedLayout([QUERIES // 32], [32], [1], [0]))
    for i in range(0, gl.where(steps > 0, steps + 1, 0)):
        tile, h = step_tile(i, group, first, end, down)
        head = (head_kv * group + h).to(gl.int64)
        row = tile * QUERIES + rows
        slot = i % Q_STAGES
        mbarrier.wait(q_empty.index(slot), ((i // Q_STAGES) & 1) ^ 1)
        x = gl.load(lse + batch * stride_lb + head * stride_lh + row, mask=row < seqlen_q, other=float("-inf"))
        lse_s.index(slot).store(gl.where(x == float("-inf"), x, (SHIFT - x * LOG2E) * lse_factor))
        mbarrier.arrive(q_full.index(slot), count=1)
        if i < steps:
            slot = i & 1
            mbarrier.wait(ds_full.index(slot), ((i >> 1) & 1) ^ 1)
            x = gl.load(delta + batch * stride_eb + head * stride_eh + row, mask=row < seqlen_q, other=0.0)
            delta_s.index(slot).store(-x)
            mbarrier.arrive(dout_full.index(slot), count=1)


@gluon.jit
def _scores(k_c, q_s, lse_s, slot, QUERIES: gl.constexpr, SOFTCAP: gl.constexpr, SCORES: gl.constexpr):
    """Scores [64 keys, QUERIES], on their way. Their accumulator starts at -lse, unless a cap comes in between."""
    x = gl.zeros([64, QUERIES], gl.float32, SCORES)
    q_tile = q_s.index(slot).reshape([q_s.shape[3], q_s.shape[4]])
    if SOFTCAP:
        return warpgroup_mma(k_c, q_tile.permute((1, 0)), x, use_acc=False, is_async=True)
    else:
        x = x + lse_s.index(slot).load(gl.SliceLayout(0, SCORES))[None, :]
        return warpgroup_mma(k_c, q_tile.permute((1, 0)), x, is_async=True)


@gluon.jit
def _probabilities(
    s, lse_s, slot, query, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k, offset, pre_scale, post_scale,
    KIND: gl.constexpr, SOFTCAP: gl.constexpr, QUERIES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """P [64 keys, QUERIES] of the query tile at ``query`` for the keys from ``key`` on."""
    if SOFTCAP:
        p = gl.exp2(tanh(s * pre_scale) * post_scale + lse_s.index(slot).load(gl.SliceLayout(0, SCORES))[None, :])
    else:
        p = gl.exp2(s * post_scale)
    if (query < inner_lo) | (query + QUERIES > inner_hi):
        # The bounds of keys are found anew for every tile that has a border in it: kept, they would take registers from
        # all tiles.
        keys = key + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        queries = (query + gl.arange(0, QUERIES, gl.SliceLayout(0, SCORES)))[None, :]
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
    return p


@gluon.jit
def kept(p, SPLIT: gl.constexpr, SCORES: gl.constexpr):
    """P in fp16, and if SPLIT 2^24 times what that lacks."""
    high = pack(p, gl.float16)
    if SPLIT:
        return high, pack((p - unpack(high, gl.float16, SCORES).to(gl.float32)) * 16777216.0, gl.float16)
    else:
        return high, 0


@gluon.jit
def whole(high, low, SPLIT: gl.constexpr, SCORES: gl.constexpr):
    p = unpack(high, gl.float16, SCORES).to(gl.float32)
    if SPLIT:
        p += unpack(low, gl.float16, SCORES).to(gl.float32) * (1 / 16777216.0)
    return p


@gluon.jit
def _dq(ds_s, k_s, slot, zero, c: gl.constexpr, DIM: gl.constexpr, QUERIES: gl.constexpr, DQ: gl.constexpr):
    """This warpgroup's [64, 64] of dQ = dS K, summed over both warpgroups' keys: half of the columns if there are 128,
    half of the rows if there are 64."""
    x = gl.zeros([64, 64], gl.float32, DQ)
    for w in gl.static_range(2):
        ds = ds_s.index(slot * 2 + w)
        k_tile = k_s.index(w + zero).reshape([64, DIM])
        if DIM == 128:
            k_tile = k_tile.slice(64 * c, 64, dim=1)
        else:
            ds = ds.slice(64 * c, 64, dim=1)
        if w == 0:
            x = warpgroup_mma(ds.permute((1, 0)), k_tile, x, use_acc=False, is_async=True)
        else:
            x = warpgroup_mma(ds.permute((1, 0)), k_tile, x, is_async=True)
    return x


@gluon.jit
def store_dq(dq_c, dq, PERMUTED: gl.constexpr):
    """[64, 64] to shared memory. Of 32 columns, a thread's eight come together (``dq_position``)."""
    if PERMUTED:
        dq = gl.reshape(gl.permute(gl.reshape(dq, [64, 2, 4, 4, 2]), [0, 1, 3, 2, 4]), [64, 64])
    dq_c.reshape([64, 64]).store(dq)


@gluon.jit
def _add_dq(dq, dq_c, batch, first_head, at, c: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr):
    query = at // _TILE * QUERIES
    head = first_head + at % _TILE
    if DIM == 128:
        tma_add(dq, [batch, head, query, 64 * c], dq_c)
    else:
        tma_add(dq, [batch, head, query + 64 * c, 0], dq_c)


@gluon.jit
def write_gradient(target, at_part, batch, head_kv, key, column: gl.constexpr, x, memory, CARRY: gl.constexpr):
    """A tile of dk or dv, through shared memory that the copy engine has read."""
    memory.reshape([x.shape[0], x.shape[1]]).store(x)
    fence_async_shared()
    warpgroup_barrier()
    if CARRY:
        tma_add(target, [at_part, batch, head_kv, key, column], memory)
    else:
        tma_store(target, [at_part, batch, head_kv, key, column], memory)


@gluon.jit
def _consumer(
    dq, dk, dv, query_lo, query_hi, q_s, k_s, v_s, dout_s, lse_s, delta_s, ds_s, dq_s, kv_full, q_full, q_empty,
    dout_full, ds_full,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
    pre_scale, post_scale, softmax_scale,
    c: gl.constexpr, KIND: gl.constexpr, SOFTCAP: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr,
    PERMUTED: gl.constexpr, SHIFT: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr,
    DIM: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    # P waits for dP as fp16 of 2^14 P, and there are registers for the next scores meanwhile. For fp16 inputs that
    # would add to the error of dS: there it waits as its operand for dV and the rest.
    SPLIT: gl.constexpr = SHIFT == 0
    head_index, part, tile_key, first, end, down = program_work(
        seqlen_q, seqlen_k, parts, heads_total, together, wave, offset, query_lo, query_hi, QUERIES, KEYS, KIND
    )
    batch = head_index // nheads_kv
    head_kv = head_index % nheads_kv
    key = tile_key + 64 * c
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

    dk_sum = gl.zeros([64, DIM], gl.float32, SUMS)
    dv_sum = gl.zeros([64, DIM], gl.float32, SUMS)
    if steps > 0:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(q_full.index(0), 0)
        at = gl.where(down, end - 1, first) * _TILE
        to_next_tile = gl.where(down, -_TILE, _TILE)
        first_head = head_kv * group
        s = _scores(k_s.index(c).reshape([64, DIM]), q_s, lse_s, 0, QUERIES, SOFTCAP, SCORES)
        s = warpgroup_mma_wait(0, [s])
        p = _probabilities(
            s, lse_s, 0, at // _TILE * QUERIES, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k, offset,
            pre_scale, post_scale, KIND, SOFTCAP, QUERIES, SCORES,
        )  # fmt: skip
        p, p_rest = kept(p, SPLIT, SCORES)
        # Beside the first tile, a product of stale memory: added to queries that do not exist.
        late = at * 0 + _NO_TILE
        stored = late
        for i in range(0, steps):
            # Always 0, but the compiler cannot know: it would keep descriptors in registers that accumulators need.
            zero = i >> 28
            dq_c = dq_s.index(c + zero)
            q_slot = i % Q_STAGES
            q_next = (i + 1) % Q_STAGES
            dout_slot = i & 1
            following = gl.where(at % _TILE + 1 == group, at // _TILE * _TILE + to_next_tile, at + 1)
            mbarrier.wait(dout_full.index(dout_slot), (i >> 1) & 1)
            dout_tile = dout_s.index(dout_slot).reshape([QUERIES, DIM])
            dp = (
                gl.zeros([64, QUERIES], gl.float32, SCORES)
                + delta_s.index(dout_slot).load(gl.SliceLayout(0, SCORES))[None, :]
            )
            dp = warpgroup_mma(v_s.index(c + zero).reshape([64, DIM]), dout_tile.permute((1, 0)), dp, is_async=True)
            p_operand = unpack(p, gl.float16, SCORES)
            if not SPLIT:
                p_operand = p_operand.to(gl.float32).to(q_s.dtype)
            dv_sum = warpgroup_mma(gl.convert_layout(p_operand, OPERAND), dout_tile, dv_sum, is_async=True)
            # dQ of the last step, stored long enough ago that the fence does not wait.
            fence_async_shared()
            warpgroup_barrier()
            _add_dq(dq, dq_c, batch, first_head, stored, c, QUERIES, DIM)
            dp, dv_sum = warpgroup_mma_wait(0, [dp, dv_sum])
            k_c = k_s.index(c + zero).reshape([64, DIM])
            mbarrier.wait(q_full.index(q_next), ((i + 1) // Q_STAGES) & 1)
            s = _scores(k_c, q_s, lse_s, q_next, QUERIES, SOFTCAP, SCORES)
            p = whole(p, p_rest, SPLIT, SCORES)
            ds = p * dp
            if SOFTCAP:
                # The derivative of the cap, from P: to keep the capped scores would take too many registers.
                shifted = lse_s.index(q_slot).load(gl.SliceLayout(0, SCORES))[None, :]
                capped = gl.where(p == 0.0, 0.0, (gl.log2(p) - shifted) / post_scale)
                ds = ds * (1.0 - capped * capped)
            ds = ds.to(q_s.dtype)
            # Both warpgroups' dS of the step before. It also says that nobody reads the slot that is written now.
            slot = i & 1
            mbarrier.wait(ds_full.index(slot ^ 1), ((i - 1) >> 1) & 1, pred=i > 0)
            ds_s.index(slot * 2 + c).store(ds)
            late_dq = _dq(ds_s, k_s, slot ^ 1, zero, c, DIM, QUERIES, DQ)
            dk_sum = warpgroup_mma(
                gl.convert_layout(ds, OPERAND), q_s.index(q_slot).reshape([QUERIES, DIM]), dk_sum, is_async=True
            )
            s = warpgroup_mma_wait(3, [s])
            p = _probabilities(
                s, lse_s, q_next, following // _TILE * QUERIES, key, inner_lo, inner_hi, query_lo, query_hi, seqlen_k,
                offset, pre_scale, post_scale, KIND, SOFTCAP, QUERIES, SCORES,
            )  # fmt: skip
            p, p_rest = kept(p, SPLIT, SCORES)
            late_dq = warpgroup_mma_wait(1, [late_dq])
            fence_async_shared()
            tma_wait(0)
            # All threads meet here: the dQ before has left its memory for all of them. The producers take it for the
            # sign that dout has been read.
            mbarrier.arrive(ds_full.index(slot), count=1)
            store_dq(dq_c, late_dq, PERMUTED)
            # Plus zero, here and below: what is handed from one variable that the loop carries to another that began
            # with the same value, Triton's compiler takes for that value for ever.
            stored = late + zero
            dk_sum = warpgroup_mma_wait(0, [dk_sum])
            mbarrier.arrive(q_empty.index(q_slot), count=1)
            late = at + zero
            at = following
        dq_c = dq_s.index(c)
        fence_async_shared()
        warpgroup_barrier()
        _add_dq(dq, dq_c, batch, first_head, stored, c, QUERIES, DIM)
        slot = (steps - 1) & 1
        mbarrier.wait(ds_full.index(slot), ((steps - 1) >> 1) & 1)
        late_dq = warpgroup_mma_wait(0, [_dq(ds_s, k_s, slot, 0, c, DIM, QUERIES, DQ)])
        tma_wait(0)
        warpgroup_barrier()
        store_dq(dq_c, late_dq, PERMUTED)
        fence_async_shared()
        warpgroup_barrier()
        _add_dq(dq, dq_c, batch, first_head, late, c, QUERIES, DIM)
        tma_wait(0)
        warpgroup_barrier()

    if steps > 0 or not CARRY:
        # This warpgroup's part of the memory of V, and of dQ, is now its own.
        UNSHIFT: gl.constexpr = 2.0**-SHIFT
        dv_sum = dv_sum * UNSHIFT
        dk_sum = dk_sum * (softmax_scale * UNSHIFT)
        dq_c = dq_s.index(c)
        v_c = v_s.index(c)
        if ROUND:
            dq_memory = reinterpret(dq_c, q_s.dtype, [128 // DIM, 1, 1, 1, 64, DIM], v_s.layout).index(0)
            write_gradient(dv, part, batch, head_kv, key, 0, dv_sum.to(q_s.dtype), dq_memory, CARRY)
            write_gradient(dk, part, batch, head_kv, key, 0, dk_sum.to(q_s.dtype), v_c, CARRY)
        else:
            FP32: gl.constexpr = gl.NVMMASharedLayout(128, 32, 5)
            dq_memory = reinterpret(dq_c, gl.float32, [1, 1, 1, 64, 64], FP32)
            if DIM == 128:
                v_memory = reinterpret(v_c, gl.float32, [1, 1, 1, 64, 64], FP32)
                dv_left, dv_right = halves(dv_sum, DQ)
                dk_left, dk_right = halves(dk_sum, DQ)
                write_gradient(dv, part, batch, head_kv, key, 0, dv_left, dq_memory, CARRY)
                write_gradient(dv, part, batch, head_kv, key, 64, dv_right, v_memory, CARRY)
                tma_wait(1)
                warpgroup_barrier()
                write_gradient(dk, part, batch, head_kv, key, 0, dk_left, dq_memory, CARRY)
                tma_wait(1)
                warpgroup_barrier()
                write_gradient(dk, part, batch, head_kv, key, 64, dk_right, v_memory, CARRY)
            else:
                write_gradient(dv, part, batch, head_kv, key, 0, dv_sum, dq_memory, CARRY)
                tma_wait(0)
                warpgroup_barrier()
                write_gradient(dk, part, batch, head_kv, key, 0, dk_sum, dq_memory, CARRY)
    tma_wait(0)


@gluon.jit(
    do_not_specialize=[
        *CHANGING,
        "nheads_kv",
        "together",
        "wave",
        *["stride_lb", "stride_lh", "stride_eb", "stride_eh"],
    ]
)
def backward_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, query_lo, query_hi,
    stride_lb, stride_lh, stride_eb, stride_eh,
    seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
    pre_scale, post_scale, lse_factor, softmax_scale,
    KIND: gl.constexpr, SOFTCAP: gl.constexpr, CARRY: gl.constexpr, ROUND: gl.constexpr, PERMUTED: gl.constexpr,
    SHIFT: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr, Q_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All but ``lse, delta, query_lo, query_hi`` are tensor descriptors: [batch, nheads, seqlen, headdim], keys and
    their gradients with parts in front, in tiles of QUERIES or 64 rows."""
    KEYS: gl.constexpr = 128
    ROWS: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    q_s = gl.allocate_shared_memory(q.dtype, [Q_STAGES, 1, 1, QUERIES, DIM], q.layout)
    dout_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, DIM], q.layout)
    k_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 1, 64, DIM], k.layout)
    v_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 1, 64, DIM], k.layout)
    ds_s = gl.allocate_shared_memory(q.dtype, [4, 64, QUERIES], gl.NVMMASharedLayout(128, 16, 2))
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, 64], dq.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [Q_STAGES, QUERIES], ROWS)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, QUERIES], ROWS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=1)
    for s in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(s), count=2)  # the copy engine's bytes, and the warp that brings lse
        mbarrier.init(q_empty.index(s), count=2)
    for s in gl.static_range(2):
        mbarrier.init(dout_full.index(s), count=2)
        mbarrier.init(ds_full.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (
            dq, dk, dv, query_lo, query_hi, q_s, k_s, v_s, dout_s, lse_s, delta_s, ds_s, dq_s, kv_full, q_full, q_empty,
            dout_full, ds_full,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
            pre_scale, post_scale, softmax_scale,
            0, KIND, SOFTCAP, CARRY, ROUND, PERMUTED, SHIFT, QUERIES, KEYS, DIM, Q_STAGES,
        )),
        (_consumer, (
            dq, dk, dv, query_lo, query_hi, q_s, k_s, v_s, dout_s, lse_s, delta_s, ds_s, dq_s, kv_full, q_full, q_empty,
            dout_full, ds_full,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
            pre_scale, post_scale, softmax_scale,
            1, KIND, SOFTCAP, CARRY, ROUND, PERMUTED, SHIFT, QUERIES, KEYS, DIM, Q_STAGES,
        )),
        (_producer, (
            q, k, v, dout, query_lo, query_hi, q_s, k_s, v_s, dout_s, kv_full, q_full, q_empty, dout_full, ds_full,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset,
            KIND, QUERIES, KEYS, DIM, Q_STAGES,
        )),
        (_loader, (
            lse, delta, query_lo, query_hi, lse_s, delta_s, q_full, q_empty, dout_full, ds_full,
            stride_lb, stride_lh, stride_eb, stride_eh,
            seqlen_q, seqlen_k, parts, nheads_kv, group, heads_total, together, wave, offset, lse_factor,
            KIND, SHIFT, QUERIES, KEYS, Q_STAGES,
        )),
    ], [4, 1, 1], [REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
