"""Statistics and gradients of rows of logits that are read once: they stay in shared memory in between. In Gluon.

A row is cut into parts of one program each. A program copies its part into shared memory, reduces it, publishes what it
found, waits until the row's other parts have been published, and writes its part of the gradient from what it holds.
Registers hold a vector per thread at a time, so that a multiprocessor has room for a dozen parts on their way.

Waiting for each other cannot hang. Programs number themselves in the order in which they start (a ticket), parts of a
row have neighbouring numbers, and no program waits before it has published. So a row that is waited for lacks parts
that run and will publish, or, if it is the last one begun, parts that have not started; these start in the place of
programs of rows before it, which are complete and end. What must hold is that the parts of one row fit on the GPU
together. :func:`serves` asks for a multiprocessor per part, of which one has room for several: kernels of other streams
may have most of the GPU, and may have all of it as long as they end without waiting for this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ...kernels.device import multiprocessors
from ...kernels.triton.common import LN2, LOG2E, cdiv
from ...kernels.triton.hopper.adapter import gl, gluon, reinterpret, tanh, warpgroup_barrier
from ..options import Options
from .launching import launch


@dataclass(frozen=True)
class Part:
    """What a program holds: ``chunks`` times a vector of 16 bytes per thread."""

    chunks: int
    num_warps: int

    def columns(self, itemsize: int) -> int:
        return self.chunks * self.num_warps * 32 * (16 // itemsize)


LARGEST = Part(8, 4)


def choose(columns: int, itemsize: int) -> Part:
    """16 KiB of a row per program; less where the row is shorter."""
    per_chunk = LARGEST.columns(itemsize) // LARGEST.chunks
    return Part(min(LARGEST.chunks, triton.next_power_of_2(cdiv(columns, per_chunk))), LARGEST.num_warps)


def serves(logits: torch.Tensor) -> bool:
    """Whether the parts of a row run at once, on a GPU."""
    columns, itemsize = logits.shape[1], logits.element_size()
    return logits.is_cuda and cdiv(columns, choose(columns, itemsize).columns(itemsize)) <= multiprocessors(
        logits.device
    )


@gluon.jit
def _capped(x, softcap, cap_inverse, SOFTCAP: gl.constexpr):
    if SOFTCAP:
        return softcap * tanh(x * cap_inverse)
    else:
        return x


@gluon.jit
def _exp2(x):
    """Without denormal results, which a third of the instructions would be for: 0 where it is below 2^-126."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _packed(high, low):
    """int64 of two float32. Never 0 for a peak and a total, as no total is 0 but where the peak is -inf."""
    bits = high.to(gl.int32, bitcast=True).to(gl.int64) << 32
    return bits | (low.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF)


@gluon.jit
def _high(words):
    return (words >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def _low(words):
    return words.to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def _awaited(published, others, PARTS: gl.constexpr):
    """The words of a row once none of the PARTS is 0. A word is data and sign that it is there in one: nothing needs
    fences, and nobody asks twice. ``others`` has an element per thread, so that few warps ask and all get the same
    answer; else every warp would ask for itself, and they could disagree on whether to go on."""
    # published: [PARTS]; volatile: from the L2, which all multiprocessors share
    words = gl.load(published + others, mask=others < PARTS, other=1, volatile=True)
    while gl.min((words != 0).to(gl.int32), 0) == 0:
        words = gl.load(published + others, mask=others < PARTS, other=1, volatile=True)
    return words


@gluon.jit
def _observe(
    x, inside, peak, total, drift, first, softcap, cap_inverse,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr,
):  # fmt: skip
    """One chunk more in the running maximum, sum of exponentials and sum of differences to ``first``, per thread."""
    z = _capped(x.to(gl.float32), softcap, cap_inverse, SOFTCAP)
    if MASKED:  # after the cap, which would make -inf finite
        z = gl.where(inside, z, float("-inf"))
    new = gl.maximum(peak, gl.max(z, 1))
    base = gl.where(new == float("-inf"), 0.0, new)
    total = total * _exp2((peak - base) * LOG2E) + gl.sum(_exp2((z - base[:, None]) * LOG2E), 1)
    if SMOOTHING:
        difference = z - first
        if MASKED:
            difference = gl.where(inside, difference, 0.0)
        drift += gl.sum(difference, 1)
    return new, total, drift


@gluon.jit
def _differentiate(
    z, base, scale, steep, uniform, hit, cap_inverse,
    HIT: gl.constexpr, SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr, Z_LOSS: gl.constexpr,
):  # fmt: skip
    """``scale, uniform, hit`` have the row's weight in them. HIT: for the label's logit."""
    p = _exp2((z - base) * LOG2E) * scale
    dz = p
    if SMOOTHING:
        dz -= uniform
    if HIT:
        dz -= hit
    if Z_LOSS:  # apart, as p may all but cancel with what was subtracted
        dz += p * steep
    if SOFTCAP:
        bent = z * cap_inverse
        dz *= 1.0 - bent * bent
    return dz


# Not for strides or columns of 1, either: rows of one word, known as such, are more than its compiler can take.
@gluon.jit(do_not_specialize=["stride_row", "stride_grad", "tokens", "columns"])
def resident_kernel(
    logits, target, weight, statistics, grad, published, stride_row, stride_grad, columns, tokens,
    softcap, cap_inverse, uniform, hit, z_loss,
    SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr, Z_LOSS: gl.constexpr, ALIGNED: gl.constexpr,
    PARTS: gl.constexpr, CHUNKS: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """``statistics: [4, tokens]``; ``published``: int64 zeros, the next ticket, then ``[tokens, 1 or 2, PARTS]``.
    ALIGNED: all rows begin at multiples of VECTOR elements, and strides are in VECTORs."""
    LANES: gl.constexpr = 32 * WARPS
    CHUNK: gl.constexpr = LANES * VECTOR
    BLOCK: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32, 1], [WARPS, 1], [1, 0])
    LANE: gl.constexpr = gl.SliceLayout(1, BLOCK)
    VECTORS: gl.constexpr = gl.SliceLayout(0, BLOCK)
    MEMORY: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, 1, [1, 0])
    if PARTS > 1:
        ticket = gl.atomic_add(published, 1, sem="relaxed").to(gl.int32)
    else:
        ticket = gl.program_id(0)
    row = (ticket // PARTS).to(gl.int64)
    part = ticket % PARTS
    row_weight = gl.load(weight + row)
    label = gl.load(target + row)
    UNIT: gl.constexpr = VECTOR if ALIGNED else 1
    logits += row * stride_row * UNIT
    grad += row * stride_grad * UNIT
    statistics += row
    many = tokens.to(gl.int64)
    start = part * (CHUNK * CHUNKS)
    length = gl.minimum(columns - start, CHUNK * CHUNKS)
    whole = length // CHUNK
    ragged = whole * CHUNK < length
    lanes = gl.arange(0, LANES, LANE)
    here = lanes[:, None] * VECTOR + gl.arange(0, VECTOR, VECTORS)[None, :]
    logits += start
    grad += start
    if row_weight == 0:
        if part == 0:
            gl.store(statistics, 0.0)
            gl.store(statistics + many, 1.0)
            gl.store(statistics + many * 2, 0.0)
            gl.store(statistics + many * 3, 0.0)
        zeros = gl.zeros([LANES, VECTOR], grad.dtype.element_ty, BLOCK)
        for i in range(0, whole):
            gl.store(grad + i * CHUNK + here, zeros)
        if ragged:
            gl.store(grad + whole * CHUNK + here, zeros, mask=here < length - whole * CHUNK)
    else:
        held = gl.allocate_shared_memory(logits.dtype.element_ty, [CHUNKS, LANES, VECTOR], MEMORY)
        # logits: [LANES, VECTOR] at a time
        if ALIGNED and whole == CHUNKS:  # at once: Triton puts a barrier between copies to the same memory
            everything = gl.arange(0, CHUNKS * LANES, LANE)[:, None] * VECTOR + gl.arange(0, VECTOR, VECTORS)[None, :]
            async_copy.async_copy_global_to_shared(
                reinterpret(held, logits.dtype.element_ty, [CHUNKS * LANES, VECTOR], MEMORY), logits + everything
            )
        else:
            for i in range(0, whole):
                if ALIGNED:
                    async_copy.async_copy_global_to_shared(held.index(i), logits + i * CHUNK + here)
                else:
                    held.index(i).store(gl.load(logits + i * CHUNK + here))
        tail = here < length - whole * CHUNK
        if ragged:
            held.index(whole).store(gl.load(logits + whole * CHUNK + here, mask=tail, other=float("-inf")))
        # The label's logit is read by the part that it lies in, which is the one that may overwrite it: others read
        # what is theirs before they publish.
        label -= start
        hit_here = (label >= 0) & (label < length)
        chosen = 0.0
        if hit_here:
            chosen = _capped(gl.load(logits + label).to(gl.float32), softcap, cap_inverse, SOFTCAP)
            gl.store(statistics + many * 2, chosen)
        elif (part == 0) & (label < 0):
            gl.store(statistics + many * 2, 0.0)
        async_copy.commit_group()
        async_copy.wait_group(0)
        peaks = gl.full([LANES], float("-inf"), gl.float32, LANE)
        totals = gl.zeros([LANES], gl.float32, LANE)
        drifts = gl.zeros([LANES], gl.float32, LANE)
        first = 0.0
        if SMOOTHING:
            # Sums of differences to any element of the part do not cancel as sums of the elements would.
            first = _capped(gl.load(logits).to(gl.float32), softcap, cap_inverse, SOFTCAP)
            first = gl.where(gl.abs(first) < float("inf"), first, 0.0)
        for i in range(0, whole):
            peaks, totals, drifts = _observe(
                held.index(i).load(BLOCK), tail, peaks, totals, drifts, first, softcap, cap_inverse,
                False, SOFTCAP, SMOOTHING,
            )  # fmt: skip
        if ragged:
            peaks, totals, drifts = _observe(
                held.index(whole).load(BLOCK), tail, peaks, totals, drifts, first, softcap, cap_inverse,
                True, SOFTCAP, SMOOTHING,
            )  # fmt: skip
        peak = gl.max(peaks, 0)
        base = gl.where(peak == float("-inf"), 0.0, peak)
        total = gl.sum(totals * _exp2((peaks - base) * LOG2E), 0)
        drift = 0.0
        if SMOOTHING:
            drift = gl.sum(drifts, 0) + length * (first - base)
        if PARTS > 1:
            PADDED: gl.constexpr = max(LANES, 1 << (PARTS - 1).bit_length())
            WORDS: gl.constexpr = 2 if SMOOTHING else 1
            published += 1 + row * (WORDS * PARTS)
            if SMOOTHING:
                gl.atomic_xchg(published + PARTS + part, _packed(drift, peak * 0.0 + 1.0), sem="relaxed")
            gl.atomic_xchg(published + part, _packed(peak, total), sem="relaxed")
            others = gl.arange(0, PADDED, gl.BlockedLayout([1], [32], [WARPS], [0]))
            exists = others < PARTS
            words = _awaited(published, others, PARTS)
            peaks_of = gl.where(exists, _high(words), float("-inf"))
            peak = gl.max(peaks_of, 0)
            base = gl.where(peak == float("-inf"), 0.0, peak)
            total = gl.sum(gl.where(exists, _low(words) * _exp2((peaks_of - base) * LOG2E), 0.0), 0)
            if SMOOTHING:
                drifts_of = _high(_awaited(published + PARTS, others, PARTS))
                lengths = gl.minimum(columns - others * (CHUNK * CHUNKS), CHUNK * CHUNKS)
                moved = gl.where(peaks_of == float("-inf"), 0.0, peaks_of) - base
                drift = gl.sum(gl.where(exists, drifts_of + moved * lengths, 0.0), 0)
        if part == 0:
            gl.store(statistics, peak)
            gl.store(statistics + many, total)
            gl.store(statistics + many * 3, drift)
        scale = row_weight / total
        uniform *= row_weight
        hit *= row_weight
        steep = 0.0
        if Z_LOSS:
            steep = 2.0 * z_loss * (peak + gl.log2(total) * LN2)
        # grad: [LANES, VECTOR] at a time
        for i in range(0, whole):
            z = _capped(held.index(i).load(BLOCK).to(gl.float32), softcap, cap_inverse, SOFTCAP)
            dz = _differentiate(z, base, scale, steep, uniform, hit, cap_inverse, False, SOFTCAP, SMOOTHING, Z_LOSS)
            gl.store(grad + i * CHUNK + here, dz.to(grad.dtype.element_ty))
        if ragged:
            z = _capped(held.index(whole).load(BLOCK).to(gl.float32), softcap, cap_inverse, SOFTCAP)
            dz = _differentiate(z, base, scale, steep, uniform, hit, cap_inverse, False, SOFTCAP, SMOOTHING, Z_LOSS)
            gl.store(grad + whole * CHUNK + here, dz.to(grad.dtype.element_ty), mask=tail)
        if hit_here:  # over what has just been stored there: cheaper than to ask every column whether it is the label
            warpgroup_barrier()
            dz = _differentiate(chosen, base, scale, steep, uniform, hit, cap_inverse, True, SOFTCAP, SMOOTHING, Z_LOSS)
            gl.store(grad + label, dz.to(grad.dtype.element_ty))


def launch_resident(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    out: torch.Tensor,
    options: Options,
    part: Part | None = None,
) -> None:
    """``out`` may be ``logits``. Rows hold the whole vocabulary."""
    tokens, columns = logits.shape
    itemsize = logits.element_size()
    part = part or choose(columns, itemsize)
    parts = cdiv(columns, part.columns(itemsize))
    smoothing, cap = options.label_smoothing > 0, options.softcap
    scale = float(cap or 1.0)
    assert logits.stride(1) == 1 and out.stride(1) == 1 and statistics.stride() == (tokens, 1)
    published = target  # not touched
    if parts > 1:
        published = torch.zeros(1 + tokens * parts * (2 if smoothing else 1), dtype=torch.int64, device=logits.device)
    vector = 16 // itemsize
    aligned = not any(x.data_ptr() % 16 or x.stride(0) % vector for x in (logits, out))
    unit = vector if aligned else 1
    launch(
        resident_kernel,
        tokens * parts,
        (logits, target, weight, statistics, out, published),
        (logits.stride(0) // unit, out.stride(0) // unit, columns),
        (tokens, scale, 1.0 / scale, options.uniform, 1.0 - options.label_smoothing, float(options.z_loss)),
        (cap is not None, smoothing, options.z_loss > 0, aligned, parts, part.chunks, vector, part.num_warps),
        part.num_warps,
    )
