"""The block kernels and who is chosen: one block of attention on one device, forward and backward.

Importing this package loads no backend, neither triton nor flash_attn, and does not touch CUDA: a backend's module is
imported when it is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch

from ..mask import MaskKind
from .base import FULL, BlockMask, Kernel, accumulator_dtype, interval_mask

__all__ = [
    "FULL",
    "BlockMask",
    "Kernel",
    "accumulator_dtype",
    "explain",
    "get",
    "interval_mask",
    "names",
    "resolve",
    "unavailable",
]


class _Backend(NamedTuple):
    module: str
    """Relative to this package."""
    kernel: str
    auto: tuple[str, ...]
    """Device types on which "auto" considers it."""


# In the order in which "auto" prefers them. A new backend is one line here.
_BACKENDS = {
    "cuda": _Backend(".cuda", "CudaKernel", ("cuda",)),
    "triton": _Backend(".triton", "TritonKernel", ("cuda",)),
    "aten": _Backend(".aten", "AtenKernel", ("cuda",)),
    "reference": _Backend(".reference", "ReferenceKernel", ("cpu",)),
    "cudnn": _Backend(".aten", "CudnnKernel", ()),
    "flash_attn": _Backend(".flash_attn", "FlashAttnKernel", ()),
}

_CHOSEN = "chosen"


def names() -> tuple[str, ...]:
    """All backends, available here or not, "auto" not among them."""
    return tuple(_BACKENDS)


@functools.cache
def _load(name: str) -> Kernel | str:
    """The one instance of a backend, or why its module cannot be imported."""
    backend = _BACKENDS[name]
    try:
        kernel: Kernel = getattr(importlib.import_module(backend.module, __name__), backend.kernel)()
    except (ImportError, AttributeError) as error:
        return f"cannot import it ({type(error).__name__}: {error})"
    return kernel


@functools.cache
def get(name: str) -> Kernel:
    """The backend called ``name``, whether or not it can run here (see ``Kernel.unavailable``).

    ValueError: no such backend, or its module cannot be imported.
    """
    if name not in _BACKENDS:
        raise ValueError(f"expected one of {', '.join(_BACKENDS)}, got {name!r}")
    kernel = _load(name)
    if isinstance(kernel, str):
        raise ValueError(f"expected a backend that can be imported, got {name!r}: {kernel}")
    return kernel


def unavailable(name: str) -> str | None:
    """Why the backend ``name`` cannot run in this process at all, or None."""
    kernel = _load(name)
    return kernel if isinstance(kernel, str) else kernel.unavailable()


def _refusal(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    headdim: int,
    kinds: frozenset[MaskKind],
    softcap: float | None,
    deterministic: bool,
) -> str | None:
    """Why ``name`` cannot serve such a call here, or None."""
    reason = unavailable(name)
    if reason is not None:
        return reason
    kernel = get(name)
    reason = kernel.refuses(device, dtype, headdim, kinds, softcap)
    if reason is None and deterministic:
        reason = kernel.nondeterministic
    return reason


def _candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if dtype == torch.float64:
        return ("reference",)  # asked for to check others: the truth, not the fastest
    # A device type that no backend names gets what a CPU gets: plain torch runs anywhere.
    known = {device_type for backend in _BACKENDS.values() for device_type in backend.auto}
    device_type = device.type if device.type in known else "cpu"
    return tuple(name for name, backend in _BACKENDS.items() if device_type in backend.auto)


def explain(
    device: torch.device,
    dtype: torch.dtype,
    headdim: int,
    kinds: frozenset[MaskKind],
    softcap: float | None = None,
    deterministic: bool = False,
) -> list[tuple[str, str]]:
    """What "auto" does with such calls: ``(name, reason)`` of every backend, the reason of its choice being "chosen".

    First the candidates in the order of preference, then the backends that are never chosen automatically here.
    """
    candidates = _candidates(device, dtype)
    chosen = None
    report = []
    for name in candidates:
        reason = f"not needed: {chosen} is preferred"
        if chosen is None:
            reason = _refusal(name, device, dtype, headdim, kinds, softcap, deterministic) or _CHOSEN
            chosen = name if reason == _CHOSEN else None
        report.append((name, reason))
    where = "for float64" if dtype == torch.float64 else f"on {device.type}"
    report += [(name, f"only by name {where}") for name in _BACKENDS if name not in candidates]
    return report


@functools.lru_cache(maxsize=1024)
def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    headdim: int,
    kinds: frozenset[MaskKind],
    softcap: float | None = None,
    deterministic: bool = False,
) -> Kernel:
    """The kernel that serves calls of this sort on ``device``; remembered, so asking again is nearly free.

    ``name`` is one of :func:`names`, or "auto" for the best of those that can. A backend asked for by name is never
    replaced by another. ValueError: no such backend, or it cannot serve (the message says why).
    """
    if name != "auto":
        if name not in _BACKENDS:
            raise ValueError(f"expected auto or one of {', '.join(_BACKENDS)}, got {name!r}")
        kernel = _load(name)
        if not isinstance(kernel, str):
            kernel.prepare()
        reason = _refusal(name, device, dtype, headdim, kinds, softcap, deterministic)
        if reason is not None:
            raise ValueError(f"expected a backend that can serve this call, got {name!r}: {reason}")
        return get(name).serving(device, dtype, headdim, deterministic)
    report = explain(device, dtype, headdim, kinds, softcap, deterministic)
    for candidate, reason in report:
        if reason == _CHOSEN:
            return get(candidate).serving(device, dtype, headdim, deterministic)
    tried = "; ".join(f"{name}: {reason}" for name, reason in report)
    raise ValueError(f"expected a backend that can serve this call, got none: {tried}")
