"""Single-device attention the obvious way: what every sharded result is compared with."""

from __future__ import annotations

import torch

from ..mask import Mask
from ..plan import key_intervals


def visible(mask: Mask, device: torch.device | str | None = None) -> torch.Tensor:
    """Boolean ``[seqlen, seqlen]``: which keys (columns) each query (row) attends."""
    positions = torch.arange(mask.seqlen, device=device)
    lo, hi = key_intervals(mask, positions)
    return (positions >= lo[:, None]) & (positions < hi[:, None])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of whole sequences ``[batch, seqlen, heads, headdim]`` through a whole score matrix, in plain
    differentiable torch operations of the input dtype."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible(mask, q.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), torch.logsumexp(s, -1)


def attention64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, torch.Tensor]:
    """The float64 truth of an attention call: ``out, lse, dq, dk, dv``."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.double()).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
