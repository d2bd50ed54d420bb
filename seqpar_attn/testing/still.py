"""Ranks that exchange nothing, and kernels that compute nothing: what is left of a call is all the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..comm.base import Handle
from ..kernels.base import PlainKernel


class Still:
    """A communicator of ``world_size`` ranks, ``local_ranks`` of them here, for which nothing moves."""

    name = "nothing moves"
    arena = None

    def __init__(self, world_size: int, local_ranks: Sequence[int]):
        self.world_size, self.local_ranks = world_size, tuple(local_ranks)

    def exchange(self, sends: Any, receives: Any, *, slow: bool = False) -> Handle:
        return self

    def count_call(self) -> None:
        pass

    def give_way(self, why: str) -> bool:
        return False

    def open(self, slow: bool) -> None:
        pass

    def wait(self) -> None:
        pass

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        if error is not None:
            raise error


class Idle(PlainKernel):
    """Every method of a kernel, without what it computes; a pass has all its buffers."""

    name = "idle"

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pass

    backward = merge = accumulate = finish_dq = forward

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        batch, seqlen, nheads, _ = out.shape
        return torch.empty(batch, nheads, seqlen, device=out.device) if into is None else into
