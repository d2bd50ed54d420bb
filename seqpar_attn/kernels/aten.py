"""Backends over the attention kernels that torch itself bundles: "aten" (flash attention) and "cudnn".

Baselines: what a ring without kernels of its own would run on. Both merge partial results (see ``partial``), and for
grouped heads both repeat keys and values in memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from ..mask import MaskKind
from .partial import PartialKernel

_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """aten's flash backward has no argument for determinism: it reads torch's global switch."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _refuses_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"expected compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    if dtype not in _HALF:
        return f"expected float16 or bfloat16, got {dtype}"
    return None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """``q, k, v: [b, h, s, d]`` -> out of q's shape, ``lse: [b, h, s]``, then what the backward wants to be given."""
    result: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return result


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """The same of cuDNN; lse is ``[b, h, s, 1]`` in some versions of torch and ``[b, h, s]`` in others."""
    result: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return result


@functools.cache
def _conventions(
    forward: Callable[..., tuple[torch.Tensor, ...]], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What the backward of this torch expects besides tensors of ours: random state (two) and the rank of lse.

    Names, dtypes and shapes of those have changed between torch versions, so they are taken from a tiny forward
    instead of being written down. Without dropout nobody reads the state's value.
    """
    x = torch.zeros(1, 1, 64, 64, dtype=dtype, device=device)
    result = forward(x, x, x, False, 1.0)
    return result[6], result[7], result[1].dim()


class AtenKernel(PartialKernel):
    """torch's flash attention: FlashAttention-2 on CUDA (sm80 and newer), its own kernel on CPU."""

    name = "aten"

    def unavailable(self) -> str | None:
        return None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        if device.type == "cuda":
            if not torch.backends.cuda.is_flash_attention_available():
                return "this torch was built without flash attention"
            reason = _refuses_cuda(device, dtype)
        elif device.type == "cpu":
            known = (*_HALF, torch.float32, torch.float64)
            reason = None if dtype in known else f"expected a float dtype of 16, 32 or 64 bits, got {dtype}"
        else:
            reason = f"expected a cuda or cpu device, got {device.type}"
        return reason or self._refuses_call(headdim, 256, kinds, softcap)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=softmax_scale
            )
        else:
            out, lse = _flash(q, k, v, causal, softmax_scale)[:2]
        return out.transpose(1, 2), lse

    def _attend_backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        softcap: float | None,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, dout, out))
        if q.device.type == "cpu":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, lse, 0.0, causal, scale=softmax_scale
            )
        else:
            state, state2, _ = _conventions(_flash, q.device, q.dtype)
            dense = (None, None, q.shape[2], k.shape[2])  # no cumulative lengths
            with _determinism(deterministic):
                grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                    dout, q, k, v, out, lse, *dense, 0.0, causal, state, state2, scale=softmax_scale
                )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class CudnnKernel(PartialKernel):
    """cuDNN's fused attention as bundled with torch; CUDA only."""

    name = "cudnn"
    nondeterministic = "torch gives no way to ask cuDNN's backward for a fixed order of sums"

    def unavailable(self) -> str | None:
        if not torch.backends.cudnn.is_available():
            return "this torch was built without cuDNN"
        return None if torch.cuda.is_available() else "torch sees no CUDA GPU"

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        if device.type != "cuda":
            return f"expected a cuda device, got {device.type}"
        return _refuses_cuda(device, dtype) or self._refuses_call(headdim, 128, kinds, softcap)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _cudnn(q, k, v, causal, softmax_scale)[:2]
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def _attend_backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        softcap: float | None,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, dout, out))
        state, state2, lse_rank = _conventions(_cudnn, q.device, q.dtype)
        if lse_rank == 4:
            lse = lse.unsqueeze(-1)
        no_bias, no_lengths = None, (None, None)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            state,
            state2,
            no_bias,
            *no_lengths,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            scale=softmax_scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
