"""A candidate for cross-entropy's rows: they stay in registers between statistics and gradient, so that memory is read
once. On an H100 tune_loss.py found it faster than the package's in parts of 1024 lanes and 8 warps; the package does
not use it yet.

A row is cut into parts of one program each. Every program reduces its part, publishes what it found, waits until the
row's other parts have been published, and writes its part of the gradient from what it still holds. Who waits for whom
cannot hang: programs number themselves in the order in which they start (a ticket), parts of a row have neighbouring
numbers, so all parts of every row but the last one begun are running, and that row's others start as soon as any other
row is finished.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqpar_attn.kernels.triton.common import LN2, LOG2E, cdiv
from seqpar_attn.loss.options import Options
from seqpar_attn.loss.triton.rows import _capped


@dataclass(frozen=True)
class Part:
    """What a program holds: ``lanes`` vectors of ``vector`` elements."""

    lanes: int
    vector: int
    num_warps: int

    @property
    def columns(self) -> int:
        return self.lanes * self.vector


def choose(columns: int, itemsize: int) -> Part:
    """16 KiB of a row per program of 16 warps, so that a multiprocessor has two; less where the row is shorter."""
    vector = 16 // itemsize
    lanes = min(1024, max(32, triton.next_power_of_2(cdiv(columns, vector))))
    return Part(lanes, vector, max(1, lanes // 64))


@triton.jit(do_not_specialize=["tokens"])
def resident_kernel(
    logits, target, weight, statistics, grad, published, arrived, stride_row, stride_grad, tokens, columns,
    softcap, cap_inverse, uniform, hit, z_loss,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    PARTS: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """``statistics: [4, tokens]``; ``published: [tokens, 4, PADDED]``; ``arrived: [tokens + 1]`` zeros, the last one
    the next ticket. ``PADDED``: the power of two from PARTS on."""
    if PARTS > 1:
        ticket = tl.atomic_add(arrived + tokens, 1, sem="relaxed")
    else:
        ticket = tl.program_id(0)
    row = (ticket // PARTS).to(tl.int64)
    part = ticket % PARTS
    logits += row * stride_row
    grad += row * stride_grad
    statistics += row
    many = tokens.to(tl.int64)
    offsets = part * LANES * VECTOR + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    inside = offsets < columns
    row_weight = tl.load(weight + row)
    if row_weight == 0:
        if part == 0:
            tl.store(statistics, 0.0)
            tl.store(statistics + many, 1.0)
            tl.store(statistics + many * 2, 0.0)
            tl.store(statistics + many * 3, 0.0)
        tl.store(grad + offsets, tl.zeros([LANES, VECTOR], tl.float32).to(grad.dtype.element_ty), mask=inside)
    else:
        label = tl.load(target + row)
        # Before anything is written: the gradient may take the place of the logits.
        chosen = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
        chosen = tl.where(label >= 0, _capped(chosen, softcap, cap_inverse, SOFTCAP), 0.0)
        # logits: [LANES, VECTOR]
        x = tl.load(logits + offsets, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        z = _capped(x.to(tl.float32), softcap, cap_inverse, SOFTCAP)
        if SOFTCAP:  # which would make -inf finite
            z = tl.where(inside, z, float("-inf"))
        peak = tl.max(tl.max(z, 1), 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        e = tl.exp2((z - base) * LOG2E)
        total = tl.sum(tl.sum(e, 1), 0)
        drift = 0.0
        if SMOOTHING:
            drift = tl.sum(tl.sum(tl.where(inside, z - base, 0.0), 1), 0)
        shrink = 1.0
        if PARTS > 1:
            published += row * (4 * PADDED)
            tl.store(published + part, peak)
            tl.store(published + PADDED + part, total)
            tl.store(published + PADDED * 2 + part, drift)
            tl.debug_barrier()
            tl.atomic_add(arrived + row, 1, sem="release")
            while tl.atomic_add(arrived + row, 0, sem="acquire") < PARTS:
                pass
            tl.debug_barrier()
            others = tl.arange(0, PADDED)
            # published: [PADDED]; volatile: from the L2, which all multiprocessors share
            peaks = tl.load(published + others, mask=others < PARTS, other=float("-inf"), volatile=True)
            totals = tl.load(published + PADDED + others, mask=others < PARTS, other=0.0, volatile=True)
            peak = tl.max(peaks, 0)
            common = tl.where(peak == float("-inf"), 0.0, peak)
            total = tl.sum(totals * tl.exp2((peaks - common) * LOG2E), 0)
            if SMOOTHING:
                drifts = tl.load(published + PADDED * 2 + others, mask=others < PARTS, other=0.0, volatile=True)
                lengths = tl.minimum(columns - others * (LANES * VECTOR), LANES * VECTOR)
                moved = tl.where(peaks == float("-inf"), 0.0, peaks) - common
                drift = tl.sum(tl.where(others < PARTS, drifts + moved * lengths, 0.0), 0)
            shrink = tl.exp2((base - common) * LOG2E)
            base = common
        if part == 0:
            tl.store(statistics, peak)
            tl.store(statistics + many, total)
            tl.store(statistics + many * 2, chosen)
            tl.store(statistics + many * 3, drift)
        p = e * (shrink / total)
        dz = p - uniform - tl.where(offsets == label, hit, 0.0)
        if Z_LOSS:  # apart, as p may all but cancel with what was subtracted
            dz += p * (2.0 * z_loss * (peak + tl.log2(total) * LN2))
        if SOFTCAP:
            bent = z * cap_inverse
            dz *= 1.0 - bent * bent
        # grad: [LANES, VECTOR]
        tl.store(
            grad + offsets, (dz * row_weight).to(grad.dtype.element_ty), mask=inside, eviction_policy="evict_first"
        )


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
    part = part or choose(columns, logits.element_size())
    parts = cdiv(columns, part.columns)
    padded = triton.next_power_of_2(parts)
    cap = options.softcap
    assert logits.stride(1) == 1 and out.stride(1) == 1 and statistics.stride() == (tokens, 1)
    published, arrived = statistics, target  # not touched
    if parts > 1:
        published = torch.empty(tokens, 4, padded, dtype=torch.float32, device=logits.device)
        arrived = torch.zeros(tokens + 1, dtype=torch.int32, device=logits.device)
    resident_kernel[(tokens * parts,)](
        logits, target, weight, statistics, out, published, arrived, logits.stride(0), out.stride(0), tokens, columns,
        cap or 1.0, 1.0 / (cap or 1.0), options.uniform, 1.0 - options.label_smoothing, options.z_loss,
        SOFTCAP=cap is not None, SMOOTHING=options.label_smoothing > 0, Z_LOSS=options.z_loss > 0,
        PARTS=parts, PADDED=padded, LANES=part.lanes, VECTOR=part.vector, num_warps=part.num_warps,
    )  # fmt: skip
