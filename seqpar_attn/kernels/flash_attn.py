"""Backend "flash_attn": Tri Dao's packages, if installed. FlashAttention-4 on Hopper and newer, else FlashAttention-2.

Both packages share the name ``flash_attn``: FlashAttention-2 (`pip install flash-attn`) is compiled, FlashAttention-4
(`pip install flash-attn-4`) lives in ``flash_attn.cute`` and compiles at run time. Partial results are merged
(see ``partial``); grouped heads and softcap are native to both.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from ..mask import MaskKind
from .partial import PartialKernel

_FA2 = "flash_attn.flash_attn_interface"
_FA4 = "flash_attn.cute.interface"
_NEEDED = {_FA2: ("_flash_attn_forward", "_flash_attn_backward"), _FA4: ("_flash_attn_fwd", "_flash_attn_bwd")}


@functools.cache
def _load(module: str) -> ModuleType | str:
    """The module, or why it cannot serve."""
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a binary built for another torch raises OSError, RuntimeError and more
        return f"cannot import {module} ({type(error).__name__}: {error})"
    for name in _NEEDED[module]:
        if not hasattr(loaded, name):
            return f"{module} has no {name}"
    if module == _FA2:
        # Before 2.7 the same functions took a window tuple and returned padded copies of their inputs.
        version = getattr(importlib.import_module("flash_attn"), "__version__", "0")
        if tuple(int(x) for x in version.split(".")[:2]) < (2, 7):
            return f"expected flash_attn >= 2.7, got {version}"
    return loaded


class FlashAttnKernel(PartialKernel):
    name = "flash_attn"
    supports_softcap = True
    native_gqa = True

    def unavailable(self) -> str | None:
        reasons = [loaded for loaded in (_load(_FA4), _load(_FA2)) if isinstance(loaded, str)]
        if len(reasons) == 2:
            return "; ".join(reasons)
        return None if torch.cuda.is_available() else "torch sees no CUDA GPU"

    def _choose(self, device: torch.device) -> tuple[int, ModuleType]:
        """Version (4 or 2) and module that serve ``device``."""
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        fa4, fa2 = _load(_FA4), _load(_FA2)
        if hopper and isinstance(fa4, ModuleType):
            return 4, fa4
        if isinstance(fa2, ModuleType):
            return 2, fa2
        need = "" if hopper or isinstance(fa4, str) else " (FlashAttention-4 needs compute capability 9.0)"
        raise ValueError(f"flash_attn: expected a package that serves {device}, got none: {fa2}{need}")

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        if device.type != "cuda":
            return f"expected a cuda device, got {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"expected compute capability 8.0 or newer, got {capability}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"expected float16 or bfloat16, got {dtype}"
        try:
            version, _ = self._choose(device)
        except ValueError as error:
            return str(error)
        max_headdim = 128 if version == 4 and capability >= (10, 0) else 256
        return self._refuses_call(headdim, max_headdim, kinds, softcap)

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
        version, module = self._choose(q.device)
        if version == 4:
            result = module._flash_attn_fwd(
                q, k, v, softmax_scale=softmax_scale, causal=causal, softcap=softcap, return_lse=True
            )
        else:
            result = module._flash_attn_forward(
                q,
                k,
                v,
                dropout_p=0.0,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size_left=-1,
                window_size_right=-1,
                softcap=softcap or 0.0,
                alibi_slopes=None,
                return_softmax=False,
            )
        return result[0], result[1]

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
        version, module = self._choose(q.device)
        if version == 4:
            dq, dk, dv = module._flash_attn_bwd(
                q,
                k,
                v,
                out,
                dout,
                lse,
                softmax_scale=softmax_scale,
                causal=causal,
                softcap=softcap or 0.0,
                deterministic=deterministic,
            )
            return dq, dk, dv
        # Written in place; contiguous whatever the strides of q, k and v are.
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        module._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=softcap or 0.0,
            alibi_slopes=None,
            deterministic=deterministic,
        )
        return dq, dk, dv
