"""The gradient of a weight, one chunk of tokens more: product, addition and rounding in one kernel. Hopper, in Gluon.

    sum[v, h] += dlogits[t, v] * hidden[t, h]    over the chunk's t, float32; the sum as in :mod:`.split`

A persistent program multiplies tiles of 128 words by 256 columns: a producer warp has the copy engine bring 64 tokens
at a time into a ring of stages, two warpgroups multiply 64 words each. Behind a tile's last tokens the ring brings what
is in the sum so far, half of the tile's columns in the memory of a stage: it is there when the product is. The new sum
takes the old one's place in shared memory and leaves from there. A warpgroup waits for the other no more than the ring
makes it, so one multiplies while the other rounds.
"""

from __future__ import annotations

import functools

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

WORDS = 128
WIDTH = 256
TOKENS = 64
STAGES = 4
_STAGE_BYTES = gl.constexpr(TOKENS * (WORDS + WIDTH) * 2)
REGISTERS = 240
PRODUCER_REGISTERS = 24
MAXNREG = 168


@gluon.jit
def _producer(
    dlogits, hidden, high, low, a_s, b_s, full, empty, steps, across, tiles, FIRST: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    HIGH: gl.constexpr = high.layout
    LOW: gl.constexpr = low.layout
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        word = tile // across * 128
        column = tile % across * 256
        for k in range(0, steps):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), _STAGE_BYTES)
            tma_load(dlogits, [k * 64, word], full.index(slot), a_s.index(2 * slot))
            tma_load(dlogits, [k * 64, word + 64], full.index(slot), a_s.index(2 * slot + 1))
            tma_load(hidden, [k * 64, column], full.index(slot), b_s.index(slot))
            i += 1
        for half in gl.static_range(2):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            if FIRST:
                mbarrier.expect(full.index(slot), 0)
            else:
                mbarrier.expect(full.index(slot), _STAGE_BYTES)
                high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH)
                for c in gl.static_range(2):
                    low_s = reinterpret(a_s.index(2 * slot + c), gl.uint8, [2, 64, 64], LOW)
                    for q in gl.static_range(2):
                        at = [word + 64 * c, column + 128 * half + 64 * q]
                        tma_load(high, at, full.index(slot), high_s.index(2 * c + q))
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
def _add(x, high_s, low_s, FIRST: gl.constexpr, LAYOUT: gl.constexpr):
    """64 columns in shared memory, plus ``x`` (or ``x`` alone if FIRST): see ``split.add_split_kernel``."""
    if not FIRST:
        missing = (low_s.load(LAYOUT).to(gl.int32) ^ 128) - 128
        bits = (high_s.load(LAYOUT).to(gl.int32) << 16) + (missing << 8)
        x += bits.to(gl.float32, bitcast=True)
    bits = x.to(gl.int32, bitcast=True)
    bits = gl.where(x == x, bits + 127 + ((bits >> 8) & 1), 0x7FC00000)
    high_s.store(((bits + 0x8000) >> 16).to(gl.int16))
    low_s.store((bits >> 8).to(gl.uint8))


@gluon.jit
def _leave(
    left, right, high, low, word, column, a_s, b_s, full, i, c: gl.constexpr, FIRST: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """128 columns, added to what stage ``i`` has brought; on their way."""
    HIGH: gl.constexpr = high.layout
    LOW: gl.constexpr = low.layout
    slot = i % STAGES
    mbarrier.wait(full.index(slot), (i // STAGES) & 1)
    high_s = reinterpret(b_s.index(slot), gl.int16, [4, 64, 64], HIGH)
    low_s = reinterpret(a_s.index(2 * slot + c), gl.uint8, [2, 64, 64], LOW)
    _add(left, high_s.index(2 * c), low_s.index(0), FIRST, LAYOUT)
    _add(right, high_s.index(2 * c + 1), low_s.index(1), FIRST, LAYOUT)
    fence_async_shared()
    warpgroup_barrier()
    for q in gl.static_range(2):
        tma_store(high, [word, column + 64 * q], high_s.index(2 * c + q))
        tma_store(low, [word, column + 64 * q], low_s.index(q))


@gluon.jit
def _consumer(
    high, low, a_s, b_s, full, empty, steps, across, tiles,
    c: gl.constexpr, FIRST: gl.constexpr, STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    QUARTER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        word = tile // across * 128 + 64 * c
        column = tile % across * 256
        acc = gl.zeros([64, 256], gl.float32, SUMS)
        for k in range(0, steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            words = a_s.index(2 * slot + c).permute((1, 0))
            acc = warpgroup_mma(words, b_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(IN_FLIGHT, [acc])
            if IN_FLIGHT == 0:
                mbarrier.arrive(empty.index(slot), count=1)
            else:
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)
            i += 1
        if IN_FLIGHT:
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        left, right = _halves(acc, HALF)
        first, second = _halves(left, QUARTER)
        third, fourth = _halves(right, QUARTER)
        _leave(first, second, high, low, word, column, a_s, b_s, full, i, c, FIRST, STAGES, QUARTER)
        _leave(third, fourth, high, low, word, column + 128, a_s, b_s, full, i + 1, c, FIRST, STAGES, QUARTER)
        tma_wait(4)
        mbarrier.arrive(empty.index(i % STAGES), count=1)
        tma_wait(0)
        mbarrier.arrive(empty.index((i + 1) % STAGES), count=1)
        i += 2


@gluon.jit(do_not_specialize=["steps", "across", "tiles"])
def weight_gradient_kernel(
    dlogits, hidden, high, low, steps, across, tiles,
    FIRST: gl.constexpr, STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tensors are descriptors, in boxes of 64 rows: ``dlogits: [tokens, words]``, 64 columns at a time, ``hidden:
    [tokens, width]``, 256, ``high, low: [words, width]`` int16 and uint8, 64. Copies fill zeros in beyond the ends of
    tensors, and store nothing there. ``steps``: times 64 tokens; ``across``: tiles side by side."""
    a_s = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], dlogits.layout)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 256], hidden.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (high, low, a_s, b_s, full, empty, steps, across, tiles, 0, FIRST, STAGES, IN_FLIGHT)),
        (_consumer, (high, low, a_s, b_s, full, empty, steps, across, tiles, 1, FIRST, STAGES, IN_FLIGHT)),
        (_producer, (dlogits, hidden, high, low, a_s, b_s, full, empty, steps, across, tiles, FIRST, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


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


def launch_weight_gradient(
    dlogits: torch.Tensor, hidden: torch.Tensor, high: torch.Tensor, low: torch.Tensor, first: bool, in_flight: int = 1
) -> None:
    """``(high, low) += dlogits.T @ hidden``, or ``=`` if ``first``. ``high: [words, width]`` int16, contiguous."""
    (tokens, words), width = dlogits.shape, hidden.shape[1]

    def boxes(x: torch.Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, columns], layout(8 * x.element_size()))

    across = cdiv(width, WIDTH)
    tiles = cdiv(words, WORDS) * across
    weight_gradient_kernel[(min(tiles, _multiprocessors(dlogits.device)),)](
        boxes(dlogits, 64), boxes(hidden, WIDTH), boxes(high, 64), boxes(low, 64), cdiv(tokens, TOKENS), across, tiles,
        FIRST=first, STAGES=STAGES, IN_FLIGHT=in_flight, REGISTERS=REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4, maxnreg=MAXNREG,
    )  # fmt: skip
