"""A small Llama over bytes in plain torch. What attention runs is an argument, and positions are explicit."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``q [batch, seqlen, heads, headdim], k, v [batch, seqlen, kv heads, headdim]`` -> the shape of q."""

HEADS, KV_HEADS, HEADDIM, LAYERS = 6, 2, 32, 4
DIM = HEADS * HEADDIM


def rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary embedding of ``[batch, seqlen, heads, headdim]``: a shard's positions ``[batch, seqlen]`` may jump."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = (position_ids[..., None].to(x.dtype) * frequency)[:, :, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-5), nn.RMSNorm(DIM, eps=1e-5)
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEADDIM, bias=False)
        self.proj = nn.Linear(DIM, DIM, bias=False)
        self.gate_up = nn.Linear(DIM, 6 * DIM, bias=False)
        self.down = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, HEADDIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        # Angles in the residual's precision, attention in that of the projections (bfloat16 under autocast).
        q, k = (rotate(t.to(x.dtype), position_ids).to(v.dtype) for t in (q, k))
        x = x + self.proj(attention(q, k, v).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """``input_ids, position_ids: [batch, seqlen]`` -> logits ``[batch, seqlen, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(DIM, eps=1e-5), nn.Linear(DIM, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * LAYERS) ** 0.5 if into_residual else 0.02)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, position_ids, attention)
        return self.head(self.norm(x))


def one_device(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own causal attention over the whole sequence: what the sharded run is compared with."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
