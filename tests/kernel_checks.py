"""What the kernel tests share: an independent float64 attention, a player of chains of blocks, and the error rule."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from seqpar_attn.kernels import FULL, BlockMask, interval_mask
from seqpar_attn.kernels.base import accumulator_dtype
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.mask import MaskKind
from seqpar_attn.testing import error_report

NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class Inputs:
    """``q, dout: [b, sq, h, d]``, ``k, v: [b, sk, hkv, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    softmax_scale: float
    softcap: float | None = None


def make_inputs(
    seqlen_q: int,
    seqlen_k: int,
    *,
    dtype: torch.dtype,
    nheads: int = 4,
    nheads_kv: int | None = None,
    headdim: int = 32,
    batch: int = 2,
    softcap: float | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(seqlen: int, heads: int) -> torch.Tensor:
        x = torch.randn(batch, seqlen, heads, headdim, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype)

    heads_kv = nheads_kv or nheads
    q, dout = normal(seqlen_q, nheads), normal(seqlen_q, nheads)
    k, v = normal(seqlen_k, heads_kv), normal(seqlen_k, heads_kv)
    return Inputs(q, k, v, dout, 1.3 * headdim**-0.5, softcap)


@dataclasses.dataclass
class Results:
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor

    def items(self) -> list[tuple[str, torch.Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    def to(self, dtype: torch.dtype) -> Results:
        """As a caller sees it: everything but lse in the input dtype."""
        return Results(*(x if name == "lse" else x.to(dtype) for name, x in self.items()))


def naive(x: Inputs, seen: torch.Tensor) -> Results:
    """Softmax attention with autograd in float64, written head by head; ``seen: [sq, sk]`` bool."""
    q, k, v = (t.detach().double().requires_grad_() for t in (x.q, x.k, x.v))
    group = q.shape[2] // k.shape[2]
    live = seen.any(-1)
    allowed = seen | ~live[:, None]  # rows without keys: any finite softmax, times 0
    outs, lses = [], []
    for head in range(q.shape[2]):
        scores = torch.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, head // group]) * x.softmax_scale
        if x.softcap is not None:
            scores = x.softcap * torch.tanh(scores / x.softcap)
        scores = scores.masked_fill(~allowed, -INF)
        out = torch.softmax(scores, -1) @ v[:, :, head // group]
        outs.append(out * live[None, :, None])
        lses.append(torch.logsumexp(scores, -1).masked_fill(~live, -INF))
    out, lse = torch.stack(outs, 2), torch.stack(lses, 1)
    grads = torch.autograd.grad(out, (q, k, v), x.dout.double())
    return Results(out.detach(), lse.detach(), *grads)


@dataclasses.dataclass
class Block:
    rows: tuple[int, int]
    keys: tuple[int, int]
    mask: BlockMask


def split(seen_kind: str, rows: list[int], keys: list[int], device: str = "cpu") -> tuple[list[Block], torch.Tensor]:
    """Blocks of one attention cut at the given query and key borders, and the whole boolean mask.

    ``seen_kind``: full, causal, causal-1 (without the diagonal), or interval (a window with gaps and empty rows).
    """
    seqlen_q, seqlen_k = rows[-1], keys[-1]
    i, j = torch.arange(seqlen_q, device=device), torch.arange(seqlen_k, device=device)
    lo = (i - 9).clamp(0, seqlen_k)
    hi = (i + 4 - 3 * (i // 16)).clamp(0, seqlen_k).cummax(0).values
    hi = torch.where((i < 3) | (i > seqlen_q - 3), lo, hi)
    lo, hi = lo.cummax(0).values, hi.cummax(0).values
    seen = {
        "full": torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device),
        "causal": j[None] <= i[:, None],
        "causal-1": j[None] < i[:, None],
        "interval": (j[None] >= lo[:, None]) & (j[None] < hi[:, None]),
    }[seen_kind]
    blocks = []
    for k0, k1 in itertools.pairwise(keys):
        for r0, r1 in itertools.pairwise(rows):
            mask = FULL
            if seen_kind.startswith("causal"):
                offset = r0 - k0 - (seen_kind == "causal-1")
                mask = FULL if offset >= k1 - k0 - 1 else BlockMask(MaskKind.CAUSAL, offset)
                if offset + (r1 - r0) <= 0 and k0 > 0:
                    continue  # nothing to see, and the rows have begun with an earlier block
            elif seen_kind == "interval":
                mask = interval_mask(lo[r0:r1] - k0, hi[r0:r1] - k0, k1 - k0)
            blocks.append(Block((r0, r1), (k0, k1), mask))
    return blocks, seen


def play(kernel, x: Inputs, blocks: list[Block], *, deterministic: bool = False) -> Results:
    """All blocks in order, forward then backward; every buffer starts as NaN."""
    wide = accumulator_dtype(x.q.dtype)
    batch, seqlen_q, nheads, _ = x.q.shape
    options = {"softmax_scale": x.softmax_scale, "softcap": x.softcap}
    out_acc, out = torch.full_like(x.q, NAN, dtype=wide), torch.full_like(x.q, NAN)
    lse = torch.full((batch, nheads, seqlen_q), NAN, dtype=wide, device=x.q.device)
    begun: set[tuple[int, int]] = set()
    for n, block in enumerate(blocks):
        rows, keys = slice(*block.rows), slice(*block.keys)
        last = all(later.rows != block.rows for later in blocks[n + 1 :])
        kernel.forward(
            x.q[:, rows],
            x.k[:, keys],
            x.v[:, keys],
            lse[:, :, rows],
            out_acc[:, rows],
            out[:, rows] if last else None,
            block.mask,
            carry=block.rows in begun,
            **options,
        )
        begun.add(block.rows)
    delta = kernel.delta(out, x.dout)
    assert delta.dtype == wide and delta.is_contiguous() and delta.shape == lse.shape
    dq, dk, dv = (torch.full_like(t, NAN, dtype=wide) for t in (x.q, x.k, x.v))
    begun_q: set[tuple[int, int]] = set()
    begun_k: set[tuple[int, int]] = set()
    for block in blocks:
        rows, keys = slice(*block.rows), slice(*block.keys)
        kernel.backward(
            x.q[:, rows],
            x.k[:, keys],
            x.v[:, keys],
            x.dout[:, rows],
            lse[:, :, rows],
            delta[:, :, rows],
            dq[:, rows],
            dk[:, keys],
            dv[:, keys],
            block.mask,
            carry_dq=block.rows in begun_q,
            carry_dkv=block.keys in begun_k,
            deterministic=deterministic,
            **options,
        )
        begun_q.add(block.rows)
        begun_k.add(block.keys)
    grad = torch.full_like(dq, NAN)
    kernel.finish_dq(dq, grad, x.softmax_scale)
    return Results(out, lse, grad, dk, dv)


def gradients(kernel, x: Inputs, lse: torch.Tensor, delta: torch.Tensor, mask: BlockMask = FULL) -> list[torch.Tensor]:
    """dq, dk, dv of one block on its own, for a given lse and delta."""
    grads = [torch.full_like(t, NAN, dtype=lse.dtype) for t in (x.q, x.k, x.v)]
    flags = {"carry_dq": False, "carry_dkv": False, "deterministic": False}
    kernel.backward(
        x.q, x.k, x.v, x.dout, lse, delta, *grads, mask, softmax_scale=x.softmax_scale, softcap=x.softcap, **flags
    )
    return grads


def assert_close(got: Results, truth: Results, atol: float) -> None:
    for (name, x), (_, y) in zip(got.items(), truth.items()):
        assert_near(x, y, atol, name)


def assert_near(x: torch.Tensor, truth: torch.Tensor, atol: float, name: str = "result") -> None:
    report = error_report(x, truth.double(), name=name)
    assert report.max_abs <= atol, f"above {atol:.3g}: {report}"


def assert_no_worse(
    got: Results,
    truth: Results,
    rival: Results,
    *,
    factor: float = 1.1,
    factor_dkv: float | None = None,
    slack: float = 2e-6,
    lse_slack: float = 2e-6,
) -> None:
    """The error rule: against float64, at most ``factor`` times the error of the same-dtype reference.

    The norm obeys the factor itself; the worst element, a noisy number that is there to catch a local fault, twice
    the factor. Both results are compared as a caller would get them, in the input dtype.
    """
    dtype = rival.out.dtype
    for (name, x), (_, y), (_, z) in zip(got.to(dtype).items(), truth.items(), rival.to(dtype).items()):
        limit = factor_dkv if factor_dkv is not None and name in ("dk", "dv") else factor
        extra = lse_slack if name == "lse" else slack
        report = error_report(x, y, z, name)
        assert report.relative <= limit * report.baseline.relative + extra, f"norm above {limit} x baseline: {report}"
        assert report.max_abs <= 2 * limit * report.baseline.max_abs + extra, f"worst above {2 * limit} x: {report}"


REFERENCE = ReferenceKernel()
