"""How results of the forward kernel leave, and what is carried comes in: through shared memory, by the copy engine."""

from __future__ import annotations

from .adapter import (
    fence_async_shared,
    gl,
    gluon,
    halves,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
    tma_wait,
    warpgroup_barrier,
)


@gluon.jit
def leave(
    acc, old_weight, out_acc, out, batch, head, row, r, q_s, stage, stage_full,
    DIM: gl.constexpr, CARRY: gl.constexpr, KEEP: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The results, with those carried in, through ``stage`` to global memory, on their way."""
    if CARRY:
        mbarrier.wait(stage_full, r & 1)
        old = stage.reshape([64, DIM]).load(SUMS)
        acc += old * gl.convert_layout(old_weight, gl.SliceLayout(1, SUMS))[:, None]
    else:
        tma_wait(0)
        warpgroup_barrier()
    if KEEP:
        stage.reshape([64, DIM]).store(acc)
        fence_async_shared()
        warpgroup_barrier()
        tma_store(out_acc, [batch, head, row, 0], stage)
    if out is not None:
        if KEEP:
            tma_wait(0)
        if KEEP or CARRY:
            warpgroup_barrier()
        rounded = stage
        if CARRY or KEEP:  # half of the memory of fp32
            rounded = reinterpret(stage, q_s.dtype, [2, 1, 1, 64, DIM], q_s.layout).index(0)
        rounded.reshape([64, DIM]).store(acc.to(q_s.dtype))
        fence_async_shared()
        warpgroup_barrier()
        tma_store(out, [batch, head, row, 0], rounded)


@gluon.jit
def load_wide_carry(out_acc, batch, head, row, column: gl.constexpr, COUNT: gl.constexpr, full, staged):
    """COUNT times 64 columns of the carried accumulator, once all threads have left the memory that they come to."""
    warpgroup_barrier()
    mbarrier.expect(full, COUNT * 64 * 64 * 4)
    for n in gl.static_range(COUNT):
        tma_load(out_acc, [batch, head, row, column + 64 * n], full, staged.index(n))


@gluon.jit
def _carry_wide(
    x, old_weight, out_acc, batch, head, row, column: gl.constexpr, memory,
    CARRY: gl.constexpr, KEEP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """64 columns of the result, with those carried in, which ``memory`` holds; to ``out_acc``, on their way."""
    tile = memory.reshape([64, 64])
    if CARRY:
        x += tile.load(LAYOUT) * gl.convert_layout(old_weight, gl.SliceLayout(1, LAYOUT))[:, None]
    if KEEP:
        tile.store(x)
        fence_async_shared()
        warpgroup_barrier()
        tma_store(out_acc, [batch, head, row, column], memory)
    return x


@gluon.jit
def leave_wide(
    acc, acc_beyond, old_weight, out_acc, out, batch, head, row, q_c, stage_full,
    BEYOND: gl.constexpr, CARRY: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """The results of more than 128 columns leave by the memory of their queries, 64 columns at a time; as fp32, and so
    carried in, there is room for 128. Of these the first have been asked for, and are waited for here."""
    STAGE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 32, 4)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    staged = reinterpret(q_c, gl.float32, [2, 1, 1, 64, 64], STAGE_LAYOUT)
    a, b = halves(acc, LAYOUT)
    if BEYOND == 128:
        d, e = halves(acc_beyond, LAYOUT)
    else:
        d = acc_beyond
    if CARRY:
        mbarrier.wait(stage_full, 0)
    if CARRY or KEEP:
        a = _carry_wide(a, old_weight, out_acc, batch, head, row, 0, staged.index(0), CARRY, KEEP, LAYOUT)
        b = _carry_wide(b, old_weight, out_acc, batch, head, row, 64, staged.index(1), CARRY, KEEP, LAYOUT)
        tma_wait(0)
        if CARRY:
            load_wide_carry(out_acc, batch, head, row, 128, BEYOND // 64, stage_full, staged)
            mbarrier.wait(stage_full, 1)
        else:
            warpgroup_barrier()
        d = _carry_wide(d, old_weight, out_acc, batch, head, row, 128, staged.index(0), CARRY, KEEP, LAYOUT)
        if BEYOND == 128:
            e = _carry_wide(e, old_weight, out_acc, batch, head, row, 192, staged.index(1), CARRY, KEEP, LAYOUT)
    if out is not None:
        tma_wait(0)
        warpgroup_barrier()
        rounded = reinterpret(q_c, q_c.dtype, [4, 1, 1, 64, 64], q_c.layout)
        rounded.index(0).reshape([64, 64]).store(a.to(q_c.dtype))
        rounded.index(1).reshape([64, 64]).store(b.to(q_c.dtype))
        rounded.index(2).reshape([64, 64]).store(d.to(q_c.dtype))
        if BEYOND == 128:
            rounded.index(3).reshape([64, 64]).store(e.to(q_c.dtype))
        fence_async_shared()
        warpgroup_barrier()
        for n in gl.static_range(2 + BEYOND // 64):
            tma_store(out, [batch, head, row, 64 * n], rounded.index(n))
    tma_wait(0)
