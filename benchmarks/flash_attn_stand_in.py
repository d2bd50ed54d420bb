"""The two functions of flash-attn 2 that ring-flash-attention calls, over the same kernels as torch bundles them.

flash-attn has no wheel for every Python and torch; torch carries FlashAttention-2 itself. The difference in speed: the
real function writes gradients into buffers it is given, torch returns them, and they are copied once. ``note()`` says
what else differs on the device that was used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch

from seqpar_attn.kernels.aten import AtenKernel

_KERNEL = AtenKernel()


@functools.cache
def _groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's function takes fewer key heads than query heads, as flash-attn does."""
    if device.type != "cuda":
        return False
    q = torch.zeros(1, 64, 2, 64, device=device, dtype=dtype)
    k = torch.zeros(1, 64, 1, 64, device=device, dtype=dtype)
    rest: dict[str, Any] = dict(causal=False, softmax_scale=1.0, softcap=None)
    try:
        out, lse = _KERNEL._attend(q, k, k, **rest)
        _, dk, _ = _KERNEL._attend_backward(q, k, k, out, out, lse, **rest, deterministic=False)
    except RuntimeError:
        return False
    return dk.shape == k.shape


def _repeated(q: torch.Tensor, *keys: torch.Tensor) -> list[torch.Tensor]:
    copies = q.shape[2] // keys[0].shape[2]
    if copies == 1 or _groups(q.device, q.dtype):
        return list(keys)
    return [x.repeat_interleave(copies, dim=2) for x in keys]


def _plain(dropout_p: float, softcap: float, alibi_slopes: Any, *window: int) -> None:
    if dropout_p or softcap or alibi_slopes is not None or any(x != -1 for x in window):
        raise ValueError("expected plain attention, got dropout, a soft cap, slopes or a window")


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    _plain(dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    k, v = _repeated(q, k, v)
    out, lse = _KERNEL._attend(q, k, v, causal=causal, softmax_scale=softmax_scale, softcap=None)
    return out, lse, None, None


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    rng_state: torch.Tensor | None = None,
) -> None:
    _plain(dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    heads = k.shape[2]
    k, v = _repeated(q, k, v)
    rest: dict[str, Any] = dict(causal=causal, softmax_scale=softmax_scale, softcap=None, deterministic=deterministic)
    grads = _KERNEL._attend_backward(q, k, v, dout, out, softmax_lse.contiguous(), **rest)
    for into, grad in zip((dq, dk, dv), grads):
        if grad.shape[2] != into.shape[2]:
            grad = grad.unflatten(2, (heads, -1)).sum(3)
        into.copy_(grad)


def _unused(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("expected a call for whole sequences, got one for packed documents")


def install() -> None:
    """Let ``import flash_attn`` find this, unless the real package is there."""
    try:
        real = importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    except ModuleNotFoundError:
        real = False
    if real:
        return
    package, interface = (types.ModuleType(x) for x in ("flash_attn", "flash_attn.flash_attn_interface"))
    for module in (package, interface):  # who looks a package up looks for its spec
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=module is package)
    given: dict[str, Any] = dict(
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
        _flash_attn_varlen_forward=_unused,
        _flash_attn_varlen_backward=_unused,
    )
    vars(interface).update(given)
    vars(package).update(__path__=[], flash_attn_interface=interface)
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def zigzag() -> Callable[..., torch.Tensor]:
    """``zigzag_ring_flash_attn_func`` of the installed ring-flash-attention; ImportError without it.

    The package's own first import is passed over: it also loads an adapter that newer transformers break.
    """
    spec = importlib.util.find_spec("ring_flash_attn")
    if spec is None:
        raise ImportError("ring_flash_attn is not installed")
    install()
    if "ring_flash_attn" not in sys.modules:
        package = types.ModuleType("ring_flash_attn")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["ring_flash_attn"] = package
    module = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    function: Callable[..., torch.Tensor] = module.zigzag_ring_flash_attn_func
    return function


def note(device: torch.device, dtype: torch.dtype) -> str:
    """What ring-flash-attention ran on."""
    if getattr(sys.modules["flash_attn.flash_attn_interface"], "_flash_attn_forward", None) is not _flash_attn_forward:
        return "over the flash-attn that is installed"
    heads = "" if _groups(device, dtype) else ", key heads repeated in memory"
    return f"over torch's own flash attention, gradients copied once more{heads}"
