"""The one input contract of the public functions: what a call must look like, checked before anything moves.

It looks at shapes, dtypes and numbers only, so it costs microseconds and never touches device memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Call:
    """The arguments of a public function beside its tensors and its group. Hashable: it is the key of a plan."""

    method: str
    transfer: str
    layout: str
    causal: bool
    window_size: int | None
    cu_seqlens: tuple[int, ...] | None
    softcap: float | None
    softmax_scale: float
    backend: str
    deterministic: bool
    ranks_per_host: int | None = None

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Call:
        """From what an operator of ``CALL_SCHEMA`` gets: all fields in order, ``cu_seqlens`` a list."""
        call = cls(*arguments)
        return call if call.cu_seqlens is None else replace(call, cu_seqlens=tuple(call.cu_seqlens))


CALL_SCHEMA = (
    "str method, str transfer, str layout, bool causal, SymInt? window_size, SymInt[]? cu_seqlens, float? softcap, "
    "float softmax_scale, str backend, bool deterministic, SymInt? ranks_per_host"
)
"""A :class:`Call` as arguments of an operator of torch's dispatcher."""


def as_boundaries(cu_seqlens: torch.Tensor | Sequence[int] | None) -> list[int] | None:
    """``cu_seqlens`` as integers. A CUDA tensor costs one copy to the host; a list, tuple or CPU tensor nothing."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
            raise ValueError(
                f"expected cu_seqlens to be one-dimensional integers, got {cu_seqlens.dtype} of shape "
                f"{list(cu_seqlens.shape)}"
            )
        return [int(x) for x in cu_seqlens.tolist()]
    if not all(isinstance(x, int) for x in cu_seqlens):
        raise ValueError(f"expected cu_seqlens to be integers, got {list(cu_seqlens)!r}")
    return list(cu_seqlens)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Shapes, dtypes and devices of one rank's shards; ValueError "expected ..., got ..."."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"expected {name} of shape [batch, seqlen, nheads, headdim], got {x.dim()} dimensions {list(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"expected {name} in bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"expected q, k and v of one dtype, got {q.dtype} for q and {x.dtype} for {name}")
        if x.device != q.device:
            raise ValueError(f"expected q, k and v on one device, got {q.device} for q and {x.device} for {name}")
    if k.shape != v.shape:
        raise ValueError(f"expected k and v of one shape, got {list(k.shape)} and {list(v.shape)}")
    for axis, name in ((0, "batch"), (1, "seqlen"), (3, "headdim")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(f"expected q and k of one {name}, got {q.shape[axis]} and {k.shape[axis]}")
    if q.shape[3] < 1 or k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "expected a positive headdim and nheads of q to be a multiple of that of k, got "
            f"headdim {q.shape[3]}, nheads {q.shape[2]} and {k.shape[2]}"
        )


def check_call(call: Call, seqlen: int) -> None:
    """Everything else that does not depend on other ranks; ``seqlen`` is the global length."""
    if call.method == "dist_flash" and call.layout != "contiguous":
        raise ValueError(f"expected layout 'contiguous' for dist_flash_attention, got {call.layout!r}")
    if call.transfer == "double" and call.method != "ring":
        raise ValueError(f"expected transfer 'double' with ring_attention only, got it with {call.method!r}")
    if call.window_size is not None:
        if call.window_size < 1:
            raise ValueError(f"expected window_size to be a positive int or None, got {call.window_size!r}")
        if not call.causal:
            raise ValueError(f"expected causal=True with window_size, got causal=False, window_size={call.window_size}")
    if call.softcap is not None and not (math.isfinite(call.softcap) and call.softcap > 0):
        raise ValueError(f"expected softcap to be positive and finite or None, got {call.softcap!r}")
    if not (math.isfinite(call.softmax_scale) and call.softmax_scale > 0):
        raise ValueError(f"expected softmax_scale to be positive and finite, got {call.softmax_scale!r}")
    bounds = call.cu_seqlens
    if bounds is not None:
        if len(bounds) < 2 or bounds[0] != 0:
            raise ValueError(f"expected cu_seqlens to start at 0 and hold at least one document, got {_short(bounds)}")
        if any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"expected cu_seqlens in ascending order, got {_short(bounds)}")
        if bounds[-1] != seqlen:
            raise ValueError(
                f"expected cu_seqlens (global boundaries) to end at the global length {seqlen}, got {bounds[-1]}"
            )


def _short(bounds: tuple[int, ...]) -> str:
    return str(list(bounds)) if len(bounds) <= 12 else f"[{', '.join(map(str, bounds[:8]))}, ... {bounds[-1]}]"
