"""The protocol of a block kernel: one block of attention on one device, carry in, carry out.

Shapes: ``q, out, dout: [batch, seqlen_q, nheads, headdim]``; ``k, v: [batch, seqlen_k, nheads_kv, headdim]``;
``lse, delta: [batch, nheads, seqlen_q]``, natural logarithm. ``nheads`` is a multiple of ``nheads_kv``: query head h
reads key head ``h // (nheads // nheads_kv)``. The head dimension is contiguous; every other stride is free, so a
block may be a slice of a shard. With a FULL mask, ``k, v`` (and ``dk, dv``) may have one more dimension in front:
``[parts, batch, seqlen_k, nheads_kv, headdim]``, keys of several owners that are attended together. Accumulators and
``lse``, ``delta`` have the accumulator dtype: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..mask import MaskKind


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The mask of one block, in the block's own indices (query i, key j).

    For INTERVAL, int32 vectors on the block's device, all non-decreasing: query i sees the keys
    ``key_lo[i] <= j < key_hi[i]`` (``[seqlen_q]``); the same set seen from the keys: key j is seen by the queries
    ``query_lo[j] <= i < query_hi[j]`` (``[seqlen_k]``). An interval may be empty (lo >= hi).
    """

    kind: MaskKind
    offset: int = 0
    key_lo: torch.Tensor | None = None
    key_hi: torch.Tensor | None = None
    query_lo: torch.Tensor | None = None
    query_hi: torch.Tensor | None = None


FULL = BlockMask(MaskKind.FULL)


def interval_mask(key_lo: torch.Tensor, key_hi: torch.Tensor, seqlen_k: int) -> BlockMask:
    """INTERVAL mask from the queries' view; the keys' view is derived. Bounds are clamped to ``[0, seqlen_k]``."""
    key_lo = key_lo.clamp(0, seqlen_k).contiguous()
    key_hi = torch.maximum(key_hi.clamp(0, seqlen_k), key_lo).contiguous()
    keys = torch.arange(seqlen_k, device=key_lo.device, dtype=key_lo.dtype)
    query_lo = torch.searchsorted(key_hi, keys, right=True)
    query_hi = torch.searchsorted(key_lo, keys, right=True)
    as_int32 = [x.to(torch.int32).contiguous() for x in (key_lo, key_hi, query_lo, query_hi)]
    return BlockMask(MaskKind.INTERVAL, 0, *as_int32)


def join_parts(x: torch.Tensor) -> torch.Tensor:
    """Keys in parts as one block: ``[parts, b, s, h, d]`` -> ``[b, parts * s, h, d]``; one block stays as it is."""
    return x if x.ndim == 4 else x.transpose(0, 1).flatten(1, 2)


def split_parts(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of ``join_parts``, into the shape of ``like``."""
    if like.ndim == 4:
        return x
    parts, batch, *rest = like.shape
    return x.reshape(batch, parts, *rest).transpose(0, 1)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernel(Protocol):
    """One backend. Methods write into the tensors they are given, on the current stream, and never synchronise."""

    name: str
    nondeterministic: str | None
    """Why gradients may differ in their last bits from run to run although asked not to, or None."""

    @property
    def recordable(self) -> bool:
        """Whether all that ``forward, backward, merge, accumulate`` do are launches that a tape can be told of, and
        ``delta, finish_dq`` each do nothing else, or tell it nothing."""
        ...

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process at all (a missing package, no GPU), or None."""
        ...

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        """Why this backend cannot serve such a call, or None."""
        ...

    def serving(self, device: torch.device, dtype: torch.dtype, headdim: int, deterministic: bool) -> Kernel:
        """Which of this backend's kernels serves all blocks of such calls; mostly this one. Of the same name."""
        ...

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
        """Continue the softmax of ``q`` over one more block of keys.

        With ``carry`` the normalised partial result so far is read from ``(out_acc, lse)``; without it this is the
        first block, nothing is read, and old content (even NaN) does not matter. The new normalised result goes into
        ``lse`` and into ``out_acc`` and/or ``out`` (the input dtype), whichever are given. Rows that have seen no key
        yet get out 0 and lse -inf. Without ``keep`` nobody reads ``out_acc`` afterwards, so its new content may be
        left out.
        """
        ...

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
        """Gradients of one block, given the *global* ``lse`` and ``delta``.

        ``dq, dk, dv`` are accumulators of the shapes of ``q, k, v``: added to if carried, else overwritten in full.
        What is in ``dq`` is the backend's own affair until ``finish_dq``; sums of it are sums. Not carried, ``dk`` and
        ``dv`` may both have the input dtype instead: results that are rounded once. Rows with lse -inf (no key
        anywhere) contribute nothing.
        """
        ...

    def finish_dq(self, dq: torch.Tensor, grad: torch.Tensor, softmax_scale: float) -> None:
        """Write the gradient of ``q`` that was accumulated in ``dq`` into ``grad``, in the input dtype."""
        ...

    def prepare(self) -> None:
        """The backend was asked for by name: make available what can be made, such as a library to be compiled."""
        ...

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """``rowsum(dout * out)``: ``[batch, nheads, seqlen_q]`` in the accumulator dtype, contiguous; in ``into``, if
        that is given."""
        ...

    def merge(
        self,
        lse: torch.Tensor,
        out_acc: torch.Tensor,
        lse_part: torch.Tensor,
        out_part: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        """Merge a partial result into ``(out_acc, lse)``; also write the merged rows to ``out`` if given."""
        ...

    def accumulate(self, target: torch.Tensor, parts: torch.Tensor) -> None:
        """Add ``parts: [count, *target.shape]`` (or one of ``target.shape``) to ``target``; accumulator dtype.

        Both are slices along the sequence of contiguous ``[..., b, s, h, d]``.
        """
        ...


class PlainKernel:
    """What holds for a backend that has nothing of its own to say: accumulators hold what their names say, nothing is
    recorded, and there is nothing to prepare."""

    nondeterministic: str | None = None

    @property
    def recordable(self) -> bool:
        return False

    def finish_dq(self, dq: torch.Tensor, grad: torch.Tensor, softmax_scale: float) -> None:
        grad.copy_(dq)

    def prepare(self) -> None:
        pass

    def serving(self, device: torch.device, dtype: torch.dtype, headdim: int, deterministic: bool) -> Any:
        return self


def delta_reference(out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    dtype = accumulator_dtype(out.dtype)
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2)
    return delta.contiguous() if into is None else into.copy_(delta)


def forward_without_keys(
    lse: torch.Tensor, out_acc: torch.Tensor | None, out: torch.Tensor | None, carry: bool
) -> None:
    """What ``Kernel.forward`` does where the block has no keys."""
    if carry:
        assert out_acc is not None, "carry reads out_acc"
        if out is not None:
            out.copy_(out_acc)
        return
    lse.fill_(float("-inf"))
    for target in (out_acc, out):
        if target is not None:
            target.zero_()


def backward_without_pairs(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, carry_dq: bool, carry_dkv: bool
) -> None:
    """What ``Kernel.backward`` does where the block has no queries or no keys."""
    if not carry_dq:
        dq.zero_()
    if not carry_dkv:
        dk.zero_()
        dv.zero_()


def accumulate_reference(target: torch.Tensor, parts: torch.Tensor) -> None:
    for part in parts if parts.ndim > target.ndim else (parts,):
        target.add_(part)


def merge_reference(
    lse: torch.Tensor,
    out_acc: torch.Tensor,
    lse_part: torch.Tensor,
    out_part: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    """Readable twin of every ``merge``: weights from ``logaddexp``, so nothing overflows and -inf means no keys."""
    total = torch.logaddexp(lse, lse_part)
    # A row without keys on either side has total = -inf: its weights are exp(-inf - 0) = 0, not NaN.
    base = torch.where(total == float("-inf"), torch.zeros_like(total), total)
    old, new = (torch.exp(x - base).transpose(1, 2).unsqueeze(-1) for x in (lse, lse_part))
    merged = out_acc * old + out_part.to(out_acc.dtype) * new
    out_acc.copy_(merged)
    lse.copy_(total)
    if out is not None:
        out.copy_(merged)
