"""The loss's Triton kernels: sm_80 and later, and the CPU under ``TRITON_INTERPRET=1``.

Importing this package never imports Triton; the kernels are compiled on first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch

from ...kernels.device import architecture, on_device_of
from ...kernels.triton import interpreted
from ..options import Options
from ..reference import Labels, no_statistics

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _gluon(name: str) -> Any:
    """A module in Gluon, Triton's language below Triton; None where that lacks what it needs, and under the
    interpreter, which has none (and runs one program at a time, while those of ``resident`` wait for each other)."""
    if interpreted():
        return None
    try:
        return importlib.import_module(f".{name}", __name__)
    except (ImportError, AttributeError):
        return None


@functools.cache
def _launchers() -> Any:
    from . import rows, split, tokens

    resident, weight_gradient = _gluon("resident"), _gluon("weight_gradient")
    return SimpleNamespace(
        statistics=rows.launch_statistics,
        gradient=rows.launch_gradient,
        both=resident.launch_resident if resident else None,
        holds_rows=resident.serves if resident else lambda logits: False,
        scale=rows.launch_scale,
        labels=tokens.launch_labels,
        weights=tokens.launch_weights,
        losses=tokens.launch_losses,
        loss=tokens.launch_loss,
        add=split.launch_add,
        finish=split.launch_finish,
        product=weight_gradient.launch_weight_gradient if weight_gradient else None,
        multiplies=weight_gradient.serves if weight_gradient else lambda *tensors: False,
    )


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve such logits here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"expected bfloat16, float16 or float32, got {dtype}"
    if device.type == "cuda":
        if interpreted():
            return "TRITON_INTERPRET=1 is set, but the tensors are on a GPU"
        arch = architecture(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
        return None if arch >= 80 else f"expected compute capability 8.0 or later, got {arch / 10}"
    if device.type != "cpu" or not interpreted():
        return f"expected CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), got {device}"
    return "Triton's interpreter rounds to bfloat16 wrongly" if dtype == torch.bfloat16 else None


class TritonRows:
    """See :class:`seqpar_attn.loss.reference.ReferenceRows`. Floats are added in a fixed order: the same bits in every
    run."""

    name = "triton"

    def labels(self, labels: Tensor, options: Options, start: int, columns: int, wide: torch.dtype) -> Labels:
        assert wide == torch.float32
        with on_device_of(labels):
            return Labels(
                *_launchers().labels(labels.contiguous(), options.ignore_index, options.vocab_size, start, columns)
            )

    def weights(self, live: Tensor, counts: Tensor, times: int) -> tuple[Tensor, Tensor]:
        with on_device_of(live):
            return _launchers().weights(live, counts, times)

    def loss(self, statistics: Tensor, weight: Tensor, options: Options, factor: Tensor) -> Tensor:
        with on_device_of(weight):
            return _launchers().loss(statistics.contiguous(), weight.contiguous(), options, factor)

    def losses(self, statistics: Tensor, weight: Tensor, options: Options) -> Tensor:
        with on_device_of(weight):
            return _launchers().losses(statistics.contiguous(), weight.contiguous(), options)

    def statistics(self, logits: Tensor, target: Tensor, weight: Tensor, options: Options) -> Tensor:
        if not logits.shape[1]:
            return no_statistics(weight)
        statistics = torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)
        if logits.numel():
            with on_device_of(logits):
                _launchers().statistics(logits, target, weight.contiguous(), statistics, options)
        return statistics

    def gradient(
        self, logits: Tensor, target: Tensor, weight: Tensor, statistics: Tensor, options: Options, out: Tensor
    ) -> None:
        if logits.numel():
            with on_device_of(logits):
                _launchers().gradient(logits, target, weight.contiguous(), statistics.contiguous(), out, options)

    def both(self, logits: Tensor, target: Tensor, weight: Tensor, options: Options, out: Tensor) -> Tensor:
        launchers = _launchers()
        if not logits.numel() or not launchers.holds_rows(logits):
            statistics = self.statistics(logits, target, weight, options)
            self.gradient(logits, target, weight, statistics, options, out)
            return statistics
        statistics = torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)
        with on_device_of(logits):
            launchers.both(logits, target, weight.contiguous(), statistics, out, options)
        return statistics

    def scale(self, x: Tensor, factor: Tensor) -> None:
        if x.numel():
            with on_device_of(x):
                _launchers().scale(x, factor)


def add_split(high: Tensor, low: Tensor, addend: Tensor, first: bool) -> None:
    """See :mod:`seqpar_attn.loss.triton.split`."""
    if high.numel():
        with on_device_of(high):
            _launchers().add(high, low, addend, first)


def add_product(high: Tensor, low: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> bool:
    """``add_split`` of ``dlogits.T @ hidden``, if one kernel can do both here; else nothing is done: False."""
    if architecture(high.device) != 90 or not _launchers().multiplies(dlogits, hidden, low):
        return False
    with on_device_of(high):
        _launchers().product(dlogits, hidden, high, low, first)
    return True


def finish_split(high: Tensor, low: Tensor, factor: Tensor) -> None:
    """See :mod:`seqpar_attn.loss.triton.split`."""
    if high.numel():
        with on_device_of(high):
            _launchers().finish(high, low, factor)
