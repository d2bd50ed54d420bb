"""The numbers that define a loss, and what they must be."""

from __future__ import annotations

import math
from dataclasses import dataclass

REDUCTIONS = ("mean", "sum", "none")
GRAD_REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Options:
    """The loss of one token, given its logits x, its label y and the vocabulary size V.

    With ``z = softcap * tanh(x / softcap)`` (``z = x`` without a soft cap) and ``lse = log(sum(exp(z)))``::

        (1 - label_smoothing) * (lse - z[y]) + label_smoothing * (lse - mean(z)) + z_loss * lse**2
    """

    vocab_size: int
    """V, over all ranks that share the vocabulary."""
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    @property
    def uniform(self) -> float:
        """The share of the target distribution that every word gets by smoothing."""
        return self.label_smoothing / self.vocab_size if self.vocab_size else 0.0


def check_options(options: Options, reduction: str, grad_reduction: str) -> None:
    """ValueError "expected ..., got ..."."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(f"expected grad_reduction to be one of {', '.join(GRAD_REDUCTIONS)}, got {grad_reduction!r}")
    if grad_reduction != "sum" and reduction != "mean":
        raise ValueError(f"expected grad_reduction {grad_reduction!r} only with reduction 'mean', got {reduction!r}")
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"expected 0 <= label_smoothing < 1, got {options.label_smoothing!r}")
    if not (math.isfinite(options.z_loss) and options.z_loss >= 0):
        raise ValueError(f"expected z_loss to be finite and at least 0, got {options.z_loss!r}")
    cap = options.softcap
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"expected softcap to be positive and finite or None, got {cap!r}")
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        raise ValueError(f"expected ignore_index to be an int, got {options.ignore_index!r}")
