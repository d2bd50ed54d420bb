"""The block kernels as dispatcher ops, so that torch.compile and selective checkpointing see them.

``seqpar_attn::block_forward``, ``block_backward``, ``block_delta`` and ``block_merge``. Same contract as
:class:`seqpar_attn.kernels.base.Kernel`, with the mask flattened into (kind, offset, four optional int32 tensors) and
the backend given by its name: a resolved one, never "auto", for an op must not decide anything at run time. They
carry no autograd formula: the schedule's player has its own.
"""

from __future__ import annotations

import torch

from ..mask import MaskKind
from . import get
from .base import BlockMask, accumulator_dtype

Tensor = torch.Tensor


def flatten_mask(mask: BlockMask) -> tuple[str, int, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The op arguments ``kind, offset, key_lo, key_hi, query_lo, query_hi`` of a mask."""
    return mask.kind.value, mask.offset, mask.key_lo, mask.key_hi, mask.query_lo, mask.query_hi


def _unflatten_mask(
    kind: str,
    offset: int,
    key_lo: Tensor | None,
    key_hi: Tensor | None,
    query_lo: Tensor | None,
    query_hi: Tensor | None,
) -> BlockMask:
    return BlockMask(MaskKind(kind), offset, key_lo, key_hi, query_lo, query_hi)


@torch.library.custom_op("seqpar_attn::block_forward", mutates_args=("lse", "out_acc", "out"))
def block_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    out_acc: torch.Tensor | None,
    out: torch.Tensor | None,
    kind: str,
    offset: int,
    key_lo: torch.Tensor | None,
    key_hi: torch.Tensor | None,
    query_lo: torch.Tensor | None,
    query_hi: torch.Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    carry: bool,
    backend: str,
) -> None:
    """Continue a softmax over one more block: see ``Kernel.forward``."""
    mask = _unflatten_mask(kind, offset, key_lo, key_hi, query_lo, query_hi)
    get(backend).forward(q, k, v, lse, out_acc, out, mask, softmax_scale=softmax_scale, softcap=softcap, carry=carry)


@block_forward.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


@torch.library.custom_op("seqpar_attn::block_backward", mutates_args=("dq", "dk", "dv"))
def block_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    kind: str,
    offset: int,
    key_lo: torch.Tensor | None,
    key_hi: torch.Tensor | None,
    query_lo: torch.Tensor | None,
    query_hi: torch.Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    carry_dq: bool,
    carry_dkv: bool,
    deterministic: bool,
    backend: str,
) -> None:
    """Gradients of one block into the accumulators: see ``Kernel.backward``."""
    mask = _unflatten_mask(kind, offset, key_lo, key_hi, query_lo, query_hi)
    get(backend).backward(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dq,
        dk,
        dv,
        mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        carry_dq=carry_dq,
        carry_dkv=carry_dkv,
        deterministic=deterministic,
    )


@block_backward.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


@torch.library.custom_op("seqpar_attn::block_delta", mutates_args=())
def block_delta(out: torch.Tensor, dout: torch.Tensor, backend: str) -> torch.Tensor:
    """``rowsum(dout * out)``: see ``Kernel.delta``."""
    return get(backend).delta(out, dout)


@block_delta.register_fake
def _(out: torch.Tensor, dout: torch.Tensor, backend: str) -> torch.Tensor:
    batch, seqlen, nheads, _ = out.shape
    return out.new_empty((batch, nheads, seqlen), dtype=accumulator_dtype(out.dtype))


@torch.library.custom_op("seqpar_attn::block_merge", mutates_args=("lse", "out_acc", "out"))
def block_merge(
    lse: torch.Tensor,
    out_acc: torch.Tensor,
    lse_part: torch.Tensor,
    out_part: torch.Tensor,
    out: torch.Tensor | None,
    backend: str,
) -> None:
    """Merge a partial result into the carry: see ``Kernel.merge``."""
    get(backend).merge(lse, out_acc, lse_part, out_part, out)


@block_merge.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None
