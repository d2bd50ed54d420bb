"""The gradient of a weight, one chunk of tokens more: product, addition and rounding in one kernel. Hopper, in Gluon.

    sum[v, h] += dlogits[t, v] * hidden[t, h]    over the chunk's t, float32; the sum as in :mod:`.split`

A persistent program multiplies tiles of 128 or 192 words by 256 columns: a producer warp has the copy engine bring 64
tokens at a time into a ring of stages, two or three warpgroups multiply 64 words each. The larger tile asks less of the
L2, from which the smaller one cannot be fed as fast as tensor cores multiply; the smaller has more registers.

Behind a tile's last tokens the ring brings what is in the sum so far, some of the tile's columns in the memory of a
stage: it is there when the product is. The new sum takes the old one's place in shared memory and leaves from there,
the last of it while the next tile is being multiplied. A warpgroup waits for the others no more than the ring makes it,
so one multiplies while another rounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

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


@dataclass(frozen=True)
class Tile:
    """How ``groups`` warpgroups multiply 64 words each. ``in_flight``: products that may be unfinished while the next
    one is issued."""

    groups: int
    in_flight: int

    @property
    def words(self) -> int:
        return 64 * self.groups

    @property
    def constants(self) -> dict[str, int]:
        # Of 65536 registers, what the producer leaves, in eights: a sum takes 128 of a thread's.
        registers, left = {2: (240, 24), 3: (160, 32)}[self.groups]
        return {
            "GROUPS": self.groups, "STAGES": STAGES, "IN_FLIGHT": self.in_flight, "REGISTERS": registers,
            "PRODUCER_REGISTERS": left,
        }  # fmt: skip

    @property
    def maxnreg(self) -> int:
        """What the warps are started with: those of the producer's warpgroup too."""
        return {2: 168, 3: 128}[self.groups]


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
    QUARTERS: gl.constexpr = 4 // GROUPS  # of a tile's columns, as many as a stage has room for
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
        for piece in gl.static_range(4 // QUARTERS):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            if FIRST:  # nothing to bring, but the memory has to be free
                mbarrier.expect(full.index(slot), 0)
            else:
                mbarrier.expect(full.index(slot), QUARTERS * GROUPS * 64 * 64 * 3)
                high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH)
                for c in gl.static_range(GROUPS):
                    low_s = reinterpret(a_s.index(GROUPS * slot + c), gl.uint8, [2, 64, 64], LOW)
                    for q in gl.static_range(QUARTERS):
                        at = [word + 64 * c, column + 64 * (QUARTERS * piece + q)]
                        tma_load(high, at, full.index(slot), high_s.index(QUARTERS * c + q))
                        tma_load(low, at, full.index(slot), low_s.index(q))
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
    quarters, high, low, word, column, a_s, b_s, full, i,
    c: gl.constexpr, FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 columns each of ``quarters``, added to what stage ``i`` has brought; on their way."""
    HIGH: gl.constexpr = high.layout
    LOW: gl.constexpr = low.layout
    HIGH_PAIRS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    LOW_PAIRS: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    QUARTERS: gl.constexpr = 4 // GROUPS
    slot = i % STAGES
    mbarrier.wait(full.index(slot), (i // STAGES) & 1)
    high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH)
    low_s = reinterpret(a_s.index(GROUPS * slot + c), gl.uint8, [2, 64, 64], LOW)
    for q in gl.static_range(QUARTERS):
        high_pairs = reinterpret(high_s.index(QUARTERS * c + q), gl.int32, [64, 32], HIGH_PAIRS)
        low_pairs = reinterpret(low_s.index(q), gl.int16, [64, 32], LOW_PAIRS)
        add_in_place(quarters[q], high_pairs, low_pairs, FIRST)
    fence_async_shared()
    warpgroup_barrier()
    for q in gl.static_range(QUARTERS):
        tma_store(high, [word, column + 64 * q], high_s.index(QUARTERS * c + q))
        tma_store(low, [word, column + 64 * q], low_s.index(q))


@gluon.jit
def _consumer(
    high, low, a_s, b_s, full, empty, steps, band, down, tiles, c: gl.constexpr,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    COLUMNS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    QUARTER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    STORES: gl.constexpr = 2 * (4 // GROUPS)  # per stage
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        word, column = _place(tile, band, down, GROUPS)
        word += 64 * c
        if GROUPS == 2:
            acc = gl.zeros([64, 256], gl.float32, SUMS)
        else:
            # ptxas refuses instructions of more registers than a thread starts with: two, half as wide.
            left = gl.zeros([64, 128], gl.float32, HALF)
            right = gl.zeros([64, 128], gl.float32, HALF)
        for k in range(0, steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            words = a_s.index(GROUPS * slot + c).permute((1, 0))
            if GROUPS == 2:
                acc = warpgroup_mma(words, b_s.index(slot), acc, is_async=True)
            else:
                columns = reinterpret(b_s.index(slot), gl.bfloat16, [2, 64, 128], COLUMNS)
                left = warpgroup_mma(words, columns.index(0), left, is_async=True)
                right = warpgroup_mma(words, columns.index(1), right, is_async=True)
            if (k == 0) & (i > 0):  # what the last tile has left behind
                tma_wait(0)
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            if GROUPS == 2:
                acc = warpgroup_mma_wait(IN_FLIGHT, [acc])
            else:
                left, right = warpgroup_mma_wait(2 * IN_FLIGHT, [left, right])
            if IN_FLIGHT == 0:
                mbarrier.arrive(empty.index(slot), count=1)
            else:
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)
            i += 1
        if IN_FLIGHT:
            if GROUPS == 2:
                acc = warpgroup_mma_wait(0, [acc])
            else:
                left, right = warpgroup_mma_wait(0, [left, right])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        if GROUPS == 2:
            left, right = _halves(acc, HALF)
        first, second = _halves(left, QUARTER)
        third, fourth = _halves(right, QUARTER)
        if GROUPS == 2:
            _leave((first, second), high, low, word, column, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
            i += 1
            _leave((third, fourth), high, low, word, column + 128, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
        else:
            _leave((first,), high, low, word, column, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
            i += 1
            _leave((second,), high, low, word, column + 64, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
            tma_wait(STORES)
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            i += 1
            _leave((third,), high, low, word, column + 128, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
            tma_wait(STORES)
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            i += 1
            _leave((fourth,), high, low, word, column + 192, a_s, b_s, full, i, c, FIRST, GROUPS, STAGES)
        tma_wait(STORES)
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        i += 1
    tma_wait(0)


@gluon.jit(do_not_specialize=["steps", "band", "down", "tiles"])
def weight_gradient_kernel(
    dlogits, hidden, high, low, steps, band, down, tiles,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr,
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
    if GROUPS == 2:
        gl.warp_specialize([
            (_consumer, (
                high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                0, FIRST, GROUPS, STAGES, IN_FLIGHT,
            )),
            (_consumer, (
                high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                1, FIRST, GROUPS, STAGES, IN_FLIGHT,
            )),
            (_producer, (
                dlogits, hidden, high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                FIRST, GROUPS, STAGES,
            )),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                0, FIRST, GROUPS, STAGES, IN_FLIGHT,
            )),
            (_consumer, (
                high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                1, FIRST, GROUPS, STAGES, IN_FLIGHT,
            )),
            (_consumer, (
                high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                2, FIRST, GROUPS, STAGES, IN_FLIGHT,
            )),
            (_producer, (
                dlogits, hidden, high, low, a_s, b_s, full, empty, steps, band, down, tiles,
                FIRST, GROUPS, STAGES,
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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(tokens: int) -> Tile:
    """Not measured yet."""
    return Tile(3, 1)


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
    tile: Tile | None = None,
) -> None:
    """``(high, low) += dlogits.T @ hidden``, or ``=`` if ``first``. ``high: [words, width]`` int16, contiguous."""
    (tokens, words), width = dlogits.shape, hidden.shape[1]
    tile = tile or choose(tokens)

    def boxes(x: torch.Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, columns], layout(8 * x.element_size()))

    across, down = cdiv(width, WIDTH), cdiv(words, tile.words)
    weight_gradient_kernel[(min(across * down, _multiprocessors(dlogits.device)),)](
        boxes(dlogits, 64), boxes(hidden, WIDTH), boxes(high, 64), boxes(low, 64), cdiv(tokens, TOKENS),
        band_of(across, 2 * tokens * width), down, across * down,
        FIRST=first, **tile.constants, num_warps=4, maxnreg=tile.maxnreg,
    )  # fmt: skip
