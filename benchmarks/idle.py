"""Stands where kernels are, for benchmarks that leave the computation out."""

from __future__ import annotations

from typing import Any

import common  # noqa: F401  finds the checkout

# isort: split
import torch

from seqpar_attn.kernels.base import PlainKernel


class Idle(PlainKernel):
    """Every method of a kernel, without what it computes."""

    name = "idle"

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pass

    backward = merge = accumulate = finish_dq = forward

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        batch, seqlen, nheads, _ = out.shape
        return torch.empty(batch, nheads, seqlen, device=out.device) if into is None else into
