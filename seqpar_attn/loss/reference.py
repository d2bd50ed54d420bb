"""Rows of logits the obvious way, in plain torch and any dtype: the twin that the Triton kernels are read against.

A *row* is one token's logits, or this rank's columns of them. What a rank must know of a row to get its loss and its
gradient is four numbers, its *statistics* ``[4, tokens]``, float32 (float64 for float64 logits); ranks that share a
vocabulary merge theirs (:func:`merge`). With z the logits after the soft cap:

====== =========================================================================================
PEAK   max(z), -inf where there are no columns
TOTAL  sum(exp(z - PEAK))
CHOSEN z at the label, 0 where the label is another rank's
DRIFT  sum(z - PEAK), 0 without label smoothing
====== =========================================================================================

PEAK and TOTAL are kept apart, since PEAK + log(TOTAL) would round away what is left of large logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import accumulator_dtype
from .options import Options

Tensor = torch.Tensor
PEAK, TOTAL, CHOSEN, DRIFT = range(4)


def _capped(logits: Tensor, options: Options) -> Tensor:
    z = logits.to(accumulator_dtype(logits.dtype))
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


def _finite(peak: Tensor) -> Tensor:
    """``peak``, or 0 where it is -inf: exp(-inf - 0) is 0 where exp(-inf - -inf) would be NaN."""
    return torch.where(peak == float("-inf"), 0.0, peak)


def no_statistics(weight: Tensor) -> Tensor:
    """The statistics of rows without columns."""
    zero = torch.zeros_like(weight)
    return torch.stack([zero - float("inf"), zero, zero, zero])


class Labels(NamedTuple):
    """What is known of ``tokens`` labels."""

    target: Tensor
    """int32 ``[tokens]``: the label as a column of this rank, -1 if it is another's or the token is ignored."""
    live: Tensor
    """float32 (float64) ``[tokens]``: 1, or 0 for ignored tokens, or NaN for labels out of range, which cannot hide."""
    counts: Tensor
    """int64 ``[2]``: tokens that are not ignored, and those of them that are out of range."""


class ReferenceRows:
    """See the module. The contract of every backend of the loss."""

    name = "reference"

    def labels(self, labels: Tensor, options: Options, start: int, columns: int, wide: torch.dtype) -> Labels:
        """Of ``labels: [tokens]``, any integers, on a rank that has ``columns`` words from ``start`` on."""
        flat = labels.long()
        valid = flat != options.ignore_index
        bad = valid & ((flat < 0) | (flat >= options.vocab_size))
        local = flat - start
        target = torch.where(valid & (local >= 0) & (local < columns), local, -1).to(torch.int32)
        live = valid.to(wide).masked_fill(bad, float("nan"))
        return Labels(target, live, torch.stack([valid.sum(), bad.sum()]))

    def losses(self, statistics: Tensor, weight: Tensor, options: Options) -> Tensor:
        """Per-token losses ``[tokens]`` times ``weight``; 0 where that is 0."""
        return losses(statistics, weight, options)

    def weights(self, live: Tensor, counts: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """The factor of a mean over ``counts[0]`` tokens, times ``times``, and what it makes of each token's weight."""
        factor = times / counts[0].clamp(min=1).to(live.dtype)  # without tokens every weight is 0
        return factor, live * factor

    def loss(self, statistics: Tensor, weight: Tensor, options: Options, factor: Tensor) -> Tensor:
        """The sum of :meth:`losses`, times ``factor``."""
        return losses(statistics, weight, options).sum() * factor

    def statistics(self, logits: Tensor, target: Tensor, weight: Tensor, options: Options) -> Tensor:
        """Statistics ``[4, tokens]`` of the rows ``logits: [tokens, columns]``.

        ``target: [tokens]`` is the column of the label, or -1 where it is not among these. Rows of ``weight`` 0
        (``[tokens]``, float32 or float64) are not looked at.
        """
        if not logits.shape[1]:
            return no_statistics(weight)
        z = _capped(logits, options)
        peak = z.amax(1)
        base = _finite(peak)
        total = torch.exp(z - base[:, None]).sum(1)
        chosen = z.gather(1, target.clamp(min=0).long()[:, None])[:, 0]
        chosen = torch.where(target >= 0, chosen, 0.0)
        drift = (z - base[:, None]).sum(1) if options.label_smoothing else torch.zeros_like(total)
        unseen = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=z.dtype, device=z.device)[:, None]
        return torch.where(weight == 0, unseen, torch.stack([peak, total, chosen, drift]))

    def gradient(
        self, logits: Tensor, target: Tensor, weight: Tensor, statistics: Tensor, options: Options, out: Tensor
    ) -> None:
        """``out = weight * d loss / d logits``, which may be ``logits`` itself; statistics over the whole vocabulary.

        Rows of weight 0 become 0, whatever their logits.
        """
        if not logits.numel():
            return
        z = _capped(logits, options)
        peak, total = statistics[PEAK], statistics[TOTAL]
        p = torch.exp(z - _finite(peak)[:, None]) / total[:, None]
        columns = torch.arange(z.shape[1], device=z.device)
        chosen = (columns == target[:, None]).to(z.dtype)
        dz = p - options.uniform - (1 - options.label_smoothing) * chosen
        if options.z_loss:  # apart, as p may all but cancel with what was subtracted
            dz = dz + p * (2 * options.z_loss * (peak + torch.log(total)))[:, None]
        if options.softcap is not None:
            dz = dz * (1 - (z / options.softcap) ** 2)
        out.copy_(torch.where(weight[:, None] == 0, 0.0, dz * weight[:, None]))

    def both(self, logits: Tensor, target: Tensor, weight: Tensor, options: Options, out: Tensor) -> Tensor:
        """:meth:`statistics` and :meth:`gradient` of rows that hold the whole vocabulary."""
        statistics = self.statistics(logits, target, weight, options)
        self.gradient(logits, target, weight, statistics, options, out)
        return statistics

    def scale(self, x: Tensor, factor: Tensor) -> None:
        """``x *= factor`` (one number, on the device)."""
        x.copy_(x * factor)


def merge(parts: Tensor, columns: list[int]) -> Tensor:
    """Statistics ``[4, tokens]`` of whole rows from those of their parts ``[parts, 4, tokens]``, which have that many
    ``columns``."""
    peak = parts[:, PEAK].amax(0)
    shift = parts[:, PEAK] - _finite(peak)
    total = (parts[:, TOTAL] * torch.exp(shift)).sum(0)
    # A part without columns has the peak -inf, and nothing to shift.
    moved = torch.where(shift == float("-inf"), 0.0, shift) * parts.new_tensor(columns)[:, None]
    return torch.stack([peak, total, parts[:, CHOSEN].sum(0), (parts[:, DRIFT] + moved).sum(0)])


def losses(statistics: Tensor, weight: Tensor, options: Options) -> Tensor:
    """Per-token losses ``[tokens]`` times ``weight``; 0 where that is 0."""
    peak, total, chosen, drift = statistics
    log_total = torch.log(total)
    loss = log_total - (1 - options.label_smoothing) * (chosen - peak)
    if options.label_smoothing:
        loss = loss - options.uniform * drift
    if options.z_loss:
        loss = loss + options.z_loss * (peak + log_total) ** 2
    return torch.where(weight == 0, 0.0, loss * weight)
