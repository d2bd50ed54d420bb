"""Who takes part in ``attention.py``: shapes, rotating inputs, our kernels and their peers, forward and backward."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import NamedTuple

from common import Contender  # first: finds the checkout

# isort: split
import torch
import torch.nn.functional as F

from seqpar_attn.kernels import FULL, BlockMask
from seqpar_attn.kernels.base import Kernel
from seqpar_attn.mask import MaskKind

SETS = 3  # input sets that take turns, so that no call finds its inputs in the cache


class Shape(NamedTuple):
    batch: int
    seqlen: int
    nheads: int
    nheads_kv: int
    headdim: int
    mask: str

    @classmethod
    def parse(cls, text: str) -> Shape:
        *sizes, mask = text.split(",")
        if len(sizes) != 5 or not all(x.isdigit() for x in sizes) or mask not in ("full", "causal"):
            raise argparse.ArgumentTypeError(f"expected BATCH,SEQLEN,HEADS,HEADS_KV,HEADDIM,full|causal, got {text!r}")
        return cls(*map(int, sizes), mask)

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def block_mask(self) -> BlockMask:
        return BlockMask(MaskKind.CAUSAL) if self.causal else FULL

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 4.0 * self.batch * self.nheads * self.seqlen**2 * self.headdim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        heads = str(self.nheads) if self.nheads == self.nheads_kv else f"{self.nheads}:{self.nheads_kv}"
        batch = f"B{self.batch} " if self.batch > 1 else ""
        return f"{batch}S{self.seqlen} H{heads} D{self.headdim} {self.mask}"


class Data(NamedTuple):
    """One input set, ``[batch, seqlen, heads, headdim]`` bf16."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def make_data(shape: Shape, device: torch.device) -> list[Data]:
    def normal(heads: int) -> torch.Tensor:
        return torch.randn(shape.batch, shape.seqlen, heads, shape.headdim, device=device).bfloat16()

    h, hkv = shape.nheads, shape.nheads_kv
    return [Data(normal(h), normal(hkv), normal(hkv), normal(h)) for _ in range(SETS)]


class Entry(NamedTuple):
    """Both directions of one contender. ``forward(i)`` returns out, ``backward(i)`` returns dq, dk, dv."""

    forward: Contender
    backward: Contender


def own(kernel: Kernel, shape: Shape, data: list[Data], mask: BlockMask | None = None) -> Entry:
    """``mask``: another than the shape's."""
    scale, mask = shape.headdim**-0.5, mask or shape.block_mask
    saved = []
    for x in data:
        lse = torch.empty(shape.batch, shape.nheads, shape.seqlen, device=x.q.device)
        saved.append((torch.empty_like(x.q), lse))
    dq = torch.empty_like(data[0].q, dtype=torch.float32)
    grads = [torch.empty_like(t) for t in data[0][:3]]

    def forward(i: int) -> torch.Tensor:
        x, (out, lse) = data[i % SETS], saved[i % SETS]
        kernel.forward(x.q, x.k, x.v, lse, None, out, mask, softmax_scale=scale, softcap=None, carry=False)
        return out

    def backward(i: int) -> tuple[torch.Tensor, ...]:
        x, (out, lse) = data[i % SETS], saved[i % SETS]
        delta = kernel.delta(out, x.dout)
        flags = {"carry_dq": False, "carry_dkv": False, "deterministic": False}
        kernel.backward(
            x.q, x.k, x.v, x.dout, lse, delta, dq, *grads[1:], mask, softmax_scale=scale, softcap=None, **flags
        )
        kernel.finish_dq(dq, grads[0], scale)
        return tuple(grads)

    for i in range(SETS):
        forward(i)
    return Entry(Contender(forward), Contender(backward))


def _autograd_entry(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    data: list[Data],
    scope: Callable[[], contextlib.AbstractContextManager],
    heads_first: bool,
) -> Entry:
    """A contender that is a differentiable function; its backward replays a graph that is kept."""

    def view(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if heads_first else x

    leaves = [tuple(view(t).detach().requires_grad_() for t in x[:3]) for x in data]
    douts = [view(x.dout) for x in data]
    with scope():
        outs = [attend(*inputs) for inputs in leaves]

    def forward(i: int) -> torch.Tensor:
        # With gradients on, as in training: lse has to be written.
        return view(attend(*leaves[i % SETS]).detach())

    def backward(i: int) -> tuple[torch.Tensor, ...]:
        n = i % SETS
        return tuple(view(g) for g in torch.autograd.grad(outs[n], leaves[n], douts[n], retain_graph=True))

    return Entry(Contender(forward, scope), Contender(backward, scope))


def peer(name: str, shape: Shape, data: list[Data]) -> Entry:
    """Raises if the peer is not installed or refuses the shape."""
    gqa = shape.nheads != shape.nheads_kv
    if name == "fa4":
        from flash_attn.cute import flash_attn_func

        def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result = flash_attn_func(q, k, v, causal=shape.causal)
            return result[0] if isinstance(result, tuple) else result

        return _autograd_entry(fa4, data, contextlib.nullcontext, heads_first=False)
    if name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # every shape is compiled afresh, for itself
        compiled = torch.compile(flex_attention, dynamic=False)
        n, device = shape.seqlen, str(data[0].q.device)
        lower = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device) if shape.causal else None

        def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return compiled(q, k, v, block_mask=lower, enable_gqa=gqa)

        return _autograd_entry(flex, data, contextlib.nullcontext, heads_first=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[name]

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=gqa)

    return _autograd_entry(sdpa, data, lambda: sdpa_kernel(chosen), heads_first=True)
