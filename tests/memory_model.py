"""A small decoder in the shape of Hugging Face's, whose attention is this package's, for the tests of memory."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import seqpar_attn

DIM, HEADS, KV_HEADS, HEADDIM, LAYERS, VOCABULARY = 32, 4, 2, 8, 4, 50


class Attention(nn.Module):
    def __init__(self, group: Any, backend: str, own: bool = True, deterministic: bool = False):
        super().__init__()
        self.group, self.backend, self.own, self.deterministic = group, backend, own, deterministic
        self.function = seqpar_attn.ring_attention
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEADDIM, bias=False)
        self.proj = nn.Linear(HEADS * HEADDIM, DIM, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(hidden).unflatten(-1, (-1, HEADDIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        if self.own:
            options = {"group": self.group, "backend": self.backend, "deterministic": self.deterministic}
            out = self.function(q, k, v, **options)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return self.proj(out.flatten(2))


class MLP(nn.Module):
    """Remembers how many tokens it saw at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 3 * DIM), nn.Linear(3 * DIM, DIM)
        self.seen: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append(hidden.shape[-2])
        return self.down(F.silu(self.up(hidden)))


class Layer(nn.Module):
    def __init__(self, group: Any, backend: str, own: bool, deterministic: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.self_attn, self.mlp = Attention(group, backend, own, deterministic), MLP()
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        hidden = hidden + self.dropout(self.self_attn(self.norm1(hidden)))
        if scale is not None:
            hidden = hidden * scale
        return hidden + self.mlp(self.norm2(hidden))


class Decoder(nn.Module):
    def __init__(self, group: Any = None, backend: str = "reference", own: bool = True, deterministic: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer(group, backend, own, deterministic) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return self.head(hidden)


def gradients(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The loss, and every parameter's gradient, of one step."""
    model.zero_grad()
    loss = F.cross_entropy(model(ids, **kwargs).flatten(0, 1).float(), ids.flatten())
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


POLICIES = list(itertools.product(("save", "offload", "recompute"), ("keep", "offload")))


def make_model() -> Decoder:
    """Always the same one, over 4 virtual ranks, float64."""
    torch.manual_seed(0)
    return Decoder(seqpar_attn.LoopbackGroup(4)).double()


def make_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
