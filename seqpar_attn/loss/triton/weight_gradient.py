"""The gradient of a weight, one chunk of tokens more: product, addition and rounding in one kernel. Hopper, in Gluon.

    sum[v, h] += dlogits[t, v] * hidden[t, h]    over the chunk's t, float32; the sum as in :mod:`.split`

A persistent program multiplies tiles of 192 words by 256 columns: a producer warp has the copy engine bring 64 tokens
at a time into a ring of stages, three warpgroups multiply 64 words each. Tiles of 128 words, with more registers for
each of two warpgroups, were slower on an H100: the L2 cannot feed them as fast as tensor cores multiply.

Behind a tile's last tokens the ring brings what is in the sum so far, some of the tile's columns in the memory of a
stage: it is there when the product is. The new sum takes the old one's place in shared memory and leaves from there,
the last of it while the next tile is being multiplied. A warpgroup waits for the others no more than the ring makes it,
so one multiplies while another rounds.
"""

from __future__ import annotations

import functools

import torch

from ...kernels.device import multiprocessors
from ...kernels.triton.common import cdiv
from ...kernels.triton.hopper.adapter import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
    tma_wait,
    warpgroup_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .split_pairs import add_in_place

WIDTH = 256
TOKENS = 64
STAGES = 4
_BANDED_BYTES = 24 << 20
"""Hidden states that stay in the L2, with room for what passes through it."""


GROUPS = 3
"""Warpgroups that multiply, of 64 words each."""
# Of 65536 registers, what the producer leaves, in eights: a sum takes 128 of a thread's. All start with as many.
REGISTERS, PRODUCER_REGISTERS, MAXNREG = 160, 32, 128
CONSTANTS = {
    "GROUPS": GROUPS, "STAGES": STAGES, "REGISTERS": REGISTERS, "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
}  # fmt: skip


@gluon.jit
def _place(tile, band, down, GROUPS: gl.constexpr):
    """Where a tile begins. Tiles that run at once lie in ``band`` columns of tiles, so that they share what they
    read."""
    per_band = band * down
    inside = tile % per_band
    return inside // band * (64 * GROUPS), (tile // per_band * band + inside % band) * 256


@gluon.jit
def _producer(
    dlogits, hidden, high, low, a_s, b_s, full, empty, steps, band, down, tiles,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HIGH: gl.constexpr = high.layout
    LOW: gl.constexpr = low.layout
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        word, column = _place(tile, band, down, GROUPS)
        for k in range(0, steps):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 64 * (64 * GROUPS + 256) * 2)
            for c in gl.static_range(GROUPS):
                tma_load(dlogits, [k * 64, word + 64 * c], full.index(slot), a_s.index(GROUPS * slot + c))
            tma_load(hidden, [k * 64, column], full.index(slot), b_s.index(slot))
            i += 1
        for quarter in gl.static_range(4):  # of a tile's columns: as many as a stage has room for
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            if FIRST:  # nothing to bring, but the memory has to be free
                mbarrier.expect(full.index(slot), 0)
            else:
                mbarrier.expect(full.index(slot), GROUPS * 64 * 64 * 3)
                high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH)
                for c in gl.static_range(GROUPS):
                    low_s = reinterpret(a_s.index(GROUPS * slot + c), gl.uint8, [2, 64, 64], LOW)
                    at = [word + 64 * c, column + 64 * quarter]
                    tma_load(high, at, full.index(slot), high_s.index(c))
                    tma_load(low, at, full.index(slot), low_s.index(0))
            i += 1


@gluon.jit
def _halves(x, LAYOUT: gl.constexpr):
    """[64, N] -> two of [64, N / 2] in LAYOUT, where that takes no exchange."""
    left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2]), [0, 2, 1]))
    return (
        gl.convert_layout(left, LAYOUT, assert_trivial=True),
        gl.convert_layout(right, LAYOUT, assert_trivial=True),
    )


@gluon.jit
def _leave(
    quarter, high, low, word, column, a_s, b_s, full, i,
    c: gl.constexpr, FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 columns, added to what stage ``i`` has brought; on their way."""
    HIGH: gl.constexpr = high.layout
    LOW: gl.constexpr = low.layout
    HIGH_PAIRS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    LOW_PAIRS: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    slot = i % STAGES
    mbarrier.wait(full.index(slot), (i // STAGES) & 1)
    high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH).index(c)
    low_s = reinterpret(a_s.index(GROUPS * slot + c), gl.uint8, [2, 64, 64], LOW).index(0)
    high_pairs = reinterpret(high_s, gl.int32, [64, 32], HIGH_PAIRS)
    low_pairs = reinterpret(low_s, gl.int16, [64, 32], LOW_PAIRS)
    add_in_place(quarter, high_pairs, low_pairs, FIRST)
    fence_async_shared()
    warpgroup_barrier()
    tma_store(high, [word, column], high_s)
    tma_store(low, [word, column], low_s)


@gluon.jit
def _consumer(
    high, low, a_s, b_s, full, empty, steps, band, down, tiles, c: gl.constexpr,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    QUARTER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    STORES: gl.constexpr = 2  # per stage
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        word, column = _place(tile, band, down, GROUPS)
        word += 64 * c
        # ptxas refuses instructions of more registers than a thread starts with: two, half as wide.
        left = gl.zeros([64, 128], gl.float32, HALF)
        right = gl.zeros([64, 128], gl.float32, HALF)
        for k in range(0, steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            words = a_s.index(GROUPS * slot + c).permute((1, 0))
            columns = reinterpret(b_s.index(slot), gl.bfloat16, [2, 64, 128], COLUMNS)
            left = warpgroup_mma(words, columns.index(0), left, is_async=True)
            right = warpgroup_mma(words, columns.index(1), right, is_async=True)
            if (k == 0) & (i > 0):  # what the last tile has left behind
                tma_wait(0)
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            left, right = warpgroup_mma_wait(2, [left, right])  # all but this step's
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)
            i += 1
        left, right = warpgroup_mma_wait(0, [left, right])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        first, second = _halves(left, QUARTER)
        third, fourth = _halves(right, QUARTER)
        quarters = (first, second, third, fourth)
        for quarter in gl.static_range(4):
            _leave(
                quarters[quarter], high, low, word, column + 64 * quarter, a_s, b_s, full, i,
                c, FIRST, GROUPS, STAGES,
            )  # fmt: skip
            if quarter > 0:
                tma_wait(STORES)
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            i += 1
    tma_wait(0)


@gluon.jit(do_not_specialize=["steps", "band", "down", "tiles"])
def weight_gradient_kernel(
    dlogits, hidden, high, low, steps, band, down, tiles,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tensors are descriptors, in boxes of 64 rows: ``dlogits: [tokens, words]``, 64 columns at a time, ``hidden:
    [tokens, width]``, 256, ``high, low: [words, width]`` int16 and uint8, 64. Copies fill zeros in beyond the ends of
    tensors, and store nothing there. ``steps``: times 64 tokens; ``down``: tiles one below the other; ``band``: see
    :func:`_place`, divides the tiles side by side."""
    a_s = gl.allocate_shared_memory(gl.bfloat16, [GROUPS * STAGES, 64, 64], dlogits.layout)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 256], hidden.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (
            high, low, a_s, b_s, full, empty, steps, band, down, tiles, 0, FIRST, GROUPS, STAGES,
        )),
        (_consumer, (
            high, low, a_s, b_s, full, empty, steps, band, down, tiles, 1, FIRST, GROUPS, STAGES,
        )),
        (_consumer, (
            high, low, a_s, b_s, full, empty, steps, band, down, tiles, 2, FIRST, GROUPS, STAGES,
        )),
        (_producer, (
            dlogits, hidden, high, low, a_s, b_s, full, empty, steps, band, down, tiles, FIRST, GROUPS, STAGES,
        )),
    ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@functools.cache
def layout(bits: int) -> object:
    """Of boxes of 64 rows: whole rows are swizzled, but no more than 128 bytes."""
    return gl.NVMMASharedLayout(64 if bits == 8 else 128, bits, 2)


def serves(dlogits: torch.Tensor, hidden: torch.Tensor, low: torch.Tensor) -> bool:
    """Whether the copy engine can read and write these: addresses and rows at multiples of 16 bytes. On Hopper."""
    tensors = (dlogits, hidden, low)
    return (
        low.dtype == torch.uint8
        and hidden.dtype == dlogits.dtype == torch.bfloat16
        and all(x.numel() and x.stride(1) == 1 for x in tensors)
        and not any(x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 for x in tensors)
    )


def band_of(across: int, hidden_bytes: int) -> int:
    """How many of ``across`` tiles run side by side: half of them where the hidden states leave the L2 anyway, so that
    less of them is read per token and more of the gradients of the logits, 3 MiB in 4."""
    return across // 2 if across > 8 and not across % 2 and hidden_bytes > _BANDED_BYTES else across


def launch_weight_gradient(
    dlogits: torch.Tensor,
    hidden: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    first: bool,
) -> None:
    """``(high, low) += dlogits.T @ hidden``, or ``=`` if ``first``. ``high: [words, width]`` int16, contiguous."""
    (tokens, words), width = dlogits.shape, hidden.shape[1]

    def boxes(x: torch.Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, columns], layout(8 * x.element_size()))

    across, down = cdiv(width, WIDTH), cdiv(words, 64 * GROUPS)
    weight_gradient_kernel[(min(across * down, multiprocessors(dlogits.device)),)](
        boxes(dlogits, 64), boxes(hidden, WIDTH), boxes(high, 64), boxes(low, 64), cdiv(tokens, TOKENS),
        band_of(across, 2 * tokens * width), down, across * down,
        FIRST=first, **CONSTANTS, num_warps=4, maxnreg=MAXNREG,
    )  # fmt: skip
