"""Triton block kernels: portable ones for sm_80 and later, and the CPU under ``TRITON_INTERPRET=1``; faster ones for
Hopper in ``hopper/``.

Importing this package never imports Triton; the kernels are compiled on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch

from ...mask import MaskKind
from ..base import BlockMask, Kernel, PlainKernel, accumulator_dtype, backward_without_pairs, forward_without_keys
from ..device import architecture, on_device_of
from . import hopper
from .config import Chooser, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _hopper(backward: bool) -> Kernel:
    from .hopper.kernel import HopperForward, HopperKernel

    return HopperKernel() if backward else HopperForward()


def portable_because(device: torch.device, dtype: torch.dtype, headdim: int) -> str | None:
    """Why calls that this backend serves get the portable kernels, or None: those for Hopper serve them, if not their
    backward pass as well."""
    if interpreted():
        return "TRITON_INTERPRET=1 is set"
    return hopper.refuses(device, dtype, headdim)


@functools.cache
def _launchers() -> Any:
    """What needs Triton, imported once and late; an import statement costs host time at every launch."""
    from . import backward, elementwise, forward

    return SimpleNamespace(
        launch_forward=forward.launch_forward,
        launch_dkdv=backward.launch_dkdv,
        launch_dq=backward.launch_dq,
        launch_delta=elementwise.launch_delta,
        launch_merge=elementwise.launch_merge,
        launch_accumulate=elementwise.launch_accumulate,
    )


class TritonKernel(PlainKernel):
    """See :class:`seqpar_attn.kernels.base.Kernel`. The portable kernels, which are always deterministic: nothing is
    added with atomics. For what those for Hopper can do as well, ``serving`` gives them."""

    name = "triton"

    @property
    def recordable(self) -> bool:
        return not interpreted()

    def __init__(self, choose_tile: Chooser = choose) -> None:
        self._choose = choose_tile

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "no CUDA GPU, and TRITON_INTERPRET=1 is not set"
        return None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        if dtype not in _DTYPES:
            return f"expected bfloat16, float16 or float32, got {dtype}"
        if headdim % 8 or not 8 <= headdim <= 256:
            return f"expected a head dimension that is a multiple of 8 and at most 256, got {headdim}"
        if device.type == "cuda":
            if interpreted():
                return "TRITON_INTERPRET=1 is set, but the tensors are on a GPU"
            arch = architecture(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
            return None if arch >= 80 else f"expected compute capability 8.0 or later, got {arch / 10}"
        if device.type != "cpu" or not interpreted():
            return f"expected CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), got {device}"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None

    def serving(self, device: torch.device, dtype: torch.dtype, headdim: int, deterministic: bool) -> Kernel:
        if portable_because(device, dtype, headdim):
            return self
        return _hopper(hopper.backward_refuses(dtype, headdim, deterministic) is None)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        out_acc: torch.Tensor | None,
        out: torch.Tensor | None,
        mask: BlockMask,
        *,
        softmax_scale: float,
        softcap: float | None,
        carry: bool,
        keep: bool = True,
    ) -> None:
        check_scale(softmax_scale)
        if q.numel() == 0:
            return
        if k.numel() == 0:
            forward_without_keys(lse, out_acc, out, carry)
            return
        tile = self._choose("forward", architecture(q.device), q.element_size(), q.shape[3], mask.kind)
        launchers = _launchers()
        with on_device_of(q):
            launchers.launch_forward(tile, q, k, v, lse, out_acc, out, mask, softmax_scale, softcap, carry, keep)

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        mask: BlockMask,
        *,
        softmax_scale: float,
        softcap: float | None,
        carry_dq: bool,
        carry_dkv: bool,
        deterministic: bool,
    ) -> None:
        check_scale(softmax_scale)
        if q.numel() == 0 or k.numel() == 0:
            backward_without_pairs(dq, dk, dv, carry_dq, carry_dkv)
            return
        launchers = _launchers()
        where = (architecture(q.device), q.element_size(), q.shape[3], mask.kind)
        with on_device_of(q):
            tile = self._choose("dkdv", *where)
            launchers.launch_dkdv(tile, q, k, v, dout, lse, delta, dk, dv, mask, softmax_scale, softcap, carry_dkv)
            tile = self._choose("dq", *where)
            launchers.launch_dq(tile, q, k, v, dout, lse, delta, dq, mask, softmax_scale, softcap, carry_dq)

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        batch, seqlen, nheads, _ = out.shape
        delta = into
        if delta is None:
            delta = torch.empty(batch, nheads, seqlen, dtype=accumulator_dtype(out.dtype), device=out.device)
        if out.numel() == 0:
            return delta
        launchers = _launchers()
        with on_device_of(out):
            launchers.launch_delta(out, dout, delta)
        return delta

    def merge(
        self,
        lse: torch.Tensor,
        out_acc: torch.Tensor,
        lse_part: torch.Tensor,
        out_part: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        if out_acc.numel() == 0:
            return
        launchers = _launchers()
        with on_device_of(out_acc):
            launchers.launch_merge(lse, out_acc, lse_part, out_part, out)

    def accumulate(self, target: torch.Tensor, parts: torch.Tensor) -> None:
        if target.numel() == 0 or parts.numel() == 0:
            return
        launchers = _launchers()
        with on_device_of(target):
            launchers.launch_accumulate(target, parts)


def check_scale(softmax_scale: float) -> None:
    # The running maximum is taken before scaling, which a scale of other sign would turn into a minimum.
    if not softmax_scale > 0:
        raise ValueError(f"expected softmax_scale > 0, got {softmax_scale}")
