"""Block kernels for Hopper in Gluon, Triton's language below Triton: the ``triton`` backend's where they can serve.

Importing this package never imports Triton; see ``docs/hopper_triton.md`` for how the kernels work.
"""

from __future__ import annotations

import functools
import importlib

import torch

from ...device import architecture

_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def _missing() -> str | None:
    """Why this Triton cannot compile the kernels, or None."""
    try:
        importlib.import_module(".adapter", __name__)
    except (ImportError, AttributeError) as error:
        return f"Triton's Gluon lacks what they need ({type(error).__name__}: {error})"
    return None


def backward_refuses(dtype: torch.dtype, headdim: int, deterministic: bool) -> str | None:
    """Why the portable kernels serve the backward pass of calls whose forward pass these serve, or None."""
    if deterministic:
        return "dq is added up in whatever order programs come to it"
    if dtype != torch.bfloat16 and headdim <= 64:
        return f"they are faster for {dtype} and head dimension {headdim}"
    return None


def refuses(device: torch.device, dtype: torch.dtype, headdim: int) -> str | None:
    """Why the portable kernels serve such calls and not these, or None.

    Nothing else decides, above all nothing of a block: what is in dq until ``finish_dq`` differs between the two.
    """
    if dtype not in _DTYPES:
        return f"expected bfloat16 or float16, got {dtype}"
    if headdim % 8 or not 8 <= headdim <= 256:
        return f"expected a head dimension that is a multiple of 8 and at most 256, got {headdim}"
    if device.type != "cuda":
        return f"expected a GPU, got {device}"
    found = architecture(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
    if found != 90:
        return f"expected compute capability 9.0, got {found / 10}"
    return _missing()
