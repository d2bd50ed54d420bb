"""Plain torch twin of every block kernel: any device, any float dtype, the truth that the others are compared with.

It forms whole score matrices, so it needs memory in seqlen_q x seqlen_k; use it for tests and small models.
"""

from __future__ import annotations

import torch

from ..mask import MaskKind
from .base import (
    BlockMask,
    PlainKernel,
    accumulate_reference,
    accumulator_dtype,
    delta_reference,
    join_parts,
    merge_reference,
    split_parts,
)


def visible(mask: BlockMask, seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor | None:
    """Boolean ``[seqlen_q, seqlen_k]``: what each query sees; None when everything is seen."""
    if mask.kind is MaskKind.FULL:
        return None
    j = torch.arange(seqlen_k, device=device)
    if mask.kind is MaskKind.CAUSAL:
        i = torch.arange(seqlen_q, device=device)
        return j[None, :] <= i[:, None] + mask.offset
    assert mask.key_lo is not None and mask.key_hi is not None
    return (j[None, :] >= mask.key_lo[:, None]) & (j[None, :] < mask.key_hi[:, None])


def _heads_first(x: torch.Tensor, nheads: int, dtype: torch.dtype) -> torch.Tensor:
    """``[b, s, h_kv, d]`` -> ``[b, nheads, s, d]`` in ``dtype``, key heads repeated for their query heads."""
    x = x.transpose(1, 2).to(dtype)
    return x if x.shape[1] == nheads else x.repeat_interleave(nheads // x.shape[1], dim=1)


def _scores(
    q: torch.Tensor, k: torch.Tensor, mask: BlockMask, softmax_scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores ``[b, h, q, k]`` (-inf where hidden) and the derivative factor of the soft cap (None without one)."""
    s = q @ k.transpose(-1, -2) * softmax_scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    seen = visible(mask, q.shape[2], k.shape[2], q.device)
    return (s if seen is None else s.masked_fill(~seen, float("-inf"))), slope


class ReferenceKernel(PlainKernel):
    """See :class:`seqpar_attn.kernels.base.Kernel`. GEMM operands are rounded to the input dtype as the fast kernels
    round them (P and dS), so a same-dtype comparison is fair."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        return None

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
        dtype = accumulator_dtype(q.dtype)
        nheads = q.shape[2]
        k, v = join_parts(k), join_parts(v)
        s, _ = _scores(_heads_first(q, nheads, dtype), _heads_first(k, nheads, dtype), mask, softmax_scale, softcap)
        block_lse = torch.logsumexp(s, -1)
        total = torch.logaddexp(lse, block_lse) if carry else block_lse
        base = torch.where(total == float("-inf"), torch.zeros_like(total), total)
        p = torch.exp(s - base.unsqueeze(-1)).to(q.dtype).to(dtype)
        result = (p @ _heads_first(v, nheads, dtype)).transpose(1, 2)
        if carry:
            assert out_acc is not None
            result = result + out_acc * torch.exp(lse - base).transpose(1, 2).unsqueeze(-1)
        lse.copy_(total)
        for target in (out_acc if keep else None, out):
            if target is not None:
                target.copy_(result)

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
        dtype = accumulator_dtype(q.dtype)
        k, v = join_parts(k), join_parts(v)
        batch, seqlen_k, nheads_kv, headdim = k.shape
        nheads = q.shape[2]
        qh, kh, vh, doh = (_heads_first(x, nheads, dtype) for x in (q, k, v, dout))
        s, slope = _scores(qh, kh, mask, softmax_scale, softcap)
        base = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
        p = torch.exp(s - base.unsqueeze(-1))
        ds = p * (doh @ vh.transpose(-1, -2) - delta.unsqueeze(-1))
        if slope is not None:
            ds = ds * slope
        p, ds = (x.to(q.dtype).to(dtype) for x in (p, ds))

        def per_key_head(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(batch, nheads_kv, nheads // nheads_kv, seqlen_k, headdim).sum(2)
            return x.transpose(1, 2)

        block_dq = (ds @ kh * softmax_scale).transpose(1, 2)
        block_dk = split_parts(per_key_head(ds.transpose(-1, -2) @ qh * softmax_scale), dk)
        block_dv = split_parts(per_key_head(p.transpose(-1, -2) @ doh), dv)
        for target, block, carried in ((dq, block_dq, carry_dq), (dk, block_dk, carry_dkv), (dv, block_dv, carry_dkv)):
            if carried:
                target.add_(block)
            else:
                target.copy_(block)

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        return delta_reference(out, dout, into)

    def merge(
        self,
        lse: torch.Tensor,
        out_acc: torch.Tensor,
        lse_part: torch.Tensor,
        out_part: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        merge_reference(lse, out_acc, lse_part, out_part, out)

    def accumulate(self, target: torch.Tensor, parts: torch.Tensor) -> None:
        accumulate_reference(target, parts)
