"""Base of the backends that wrap somebody else's kernel: a finished partial result per block, merged into the carry.

Such kernels return ``out`` already rounded to the input dtype and cannot continue a softmax. So every block costs an
extra merge over the fp32 carry and its rounding is paid once per block: these backends are baselines, and a fallback
for hardware that our own kernels do not serve.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..mask import MaskKind
from .base import (
    BlockMask,
    PlainKernel,
    accumulate_reference,
    delta_reference,
    join_parts,
    merge_reference,
    split_parts,
)

# Stands for lse = -inf in backward: exp(score - _NO_KEY) is exactly 0, while exp(score + inf) would be inf or NaN.
# Finite, so that a kernel may multiply it by log2(e) or subtract it from -inf without making a NaN.
_NO_KEY = 1e30


def pseudo_out(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A tensor ``o`` of ``dout``'s shape and dtype with ``rowsum(dout * o) == delta``.

    Kernels made for one device compute delta themselves, from the ``out`` they are given; but the delta of a ring is
    global (and a gradient of lse may have been folded into it), so the ``out`` that yields it need not exist anywhere.
    The shortest such vector is parallel to dout: ``o = dout * delta / |dout|^2``. By Cauchy-Schwarz it is no longer
    than the true out, and all terms of its row sum have one sign, so rounding it costs no more than rounding out did.
    Where dout is 0 (or so small that its square is, below 1e-22 in float32) o is 0.
    """
    wide = dout.to(delta.dtype)
    norm2 = wide.square().sum(-1)
    ratio = torch.where(norm2 > 0, delta.transpose(1, 2) / norm2, torch.zeros_like(norm2))
    return (wide * ratio.unsqueeze(-1)).to(dout.dtype)


def _pad_headdim(x: torch.Tensor) -> torch.Tensor:
    """Zero columns up to a multiple of 8: they change neither scores nor sums."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _accumulate(target: torch.Tensor, part: torch.Tensor, rows: slice, carried: bool) -> None:
    """``part`` into the tokens ``rows`` of ``target``; the other tokens receive nothing from this block."""
    if carried:
        target[:, rows].add_(part)
        return
    target[:, : rows.start].zero_()
    target[:, rows].copy_(part)
    target[:, rows.stop :].zero_()


class PartialKernel(PlainKernel):
    """See :class:`seqpar_attn.kernels.base.Kernel`.

    Serves FULL, and CAUSAL with seqlen_q == seqlen_k and offset 0 or -1; anything else is a ValueError at the call.
    A subclass implements ``_attend`` and ``_attend_backward`` for FULL and CAUSAL with offset 0.
    """

    name: str
    kinds = frozenset({MaskKind.FULL, MaskKind.CAUSAL})
    supports_softcap = False
    native_gqa = False
    """Whether the kernel reads grouped heads itself; otherwise keys and values are repeated in memory first."""
    """Why a backward with ``deterministic=True`` is impossible, or None. The registry asks for it if it is there."""

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
        """Partial ``out`` (the shape and dtype of q) and ``lse: [batch, nheads, seqlen_q]``."""
        raise NotImplementedError

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
        """``dq, dk, dv`` of the shapes of ``q, k, v``; delta is to be computed as ``rowsum(dout * out)``."""
        raise NotImplementedError

    def _refuses_call(
        self, headdim: int, max_headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        """The part of ``refuses`` that all such kernels share."""
        if headdim > max_headdim:
            return f"expected headdim <= {max_headdim}, got {headdim}"
        unknown = sorted(kind.value for kind in kinds - self.kinds)
        if unknown:
            return f"expected mask kinds among full, causal, got {', '.join(unknown)}"
        if softcap is not None and not self.supports_softcap:
            return f"expected no softcap, got {softcap}"
        return None

    def _seen(
        self, q: torch.Tensor, k: torch.Tensor, mask: BlockMask, softcap: float | None
    ) -> tuple[slice, slice, bool]:
        """The queries that see a key, the keys that are seen, and whether the mask between those is causal."""
        if softcap is not None and not self.supports_softcap:
            raise ValueError(f"{self.name}: expected no softcap, got {softcap}")
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        if mask.kind is MaskKind.FULL:
            return slice(0, seqlen_q if seqlen_k else 0), slice(0, seqlen_k), False
        if mask.kind is not MaskKind.CAUSAL:
            raise ValueError(f"{self.name}: expected a full or causal mask, got {mask.kind.value}")
        if seqlen_q != seqlen_k or mask.offset not in (0, -1):
            raise ValueError(
                f"{self.name}: expected a causal block with seqlen_q == seqlen_k and offset 0 or -1, "
                f"got seqlen_q={seqlen_q}, seqlen_k={seqlen_k}, offset={mask.offset}"
            )
        # Offset -1 hides the diagonal: the first query sees nothing, the last key is unseen, the rest is plain causal.
        return slice(-mask.offset, seqlen_q), slice(0, seqlen_k + mask.offset), True

    def _operands(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice, keys: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        group = q.shape[2] // k.shape[2]
        k, v = k[:, keys], v[:, keys]
        if group > 1 and not self.native_gqa:
            k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        return _pad_headdim(q[:, rows]), _pad_headdim(k), _pad_headdim(v)

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
        k, v = join_parts(k), join_parts(v)
        rows, keys, causal = self._seen(q, k, mask, softcap)
        for blind in (slice(0, rows.start), slice(rows.stop, q.shape[1])):
            self._forward_blind(lse[:, :, blind], out_acc, out, blind, carry)
        if rows.start >= rows.stop:
            return
        operands = self._operands(q, k, v, rows, keys)
        out_part, lse_part = self._attend(*operands, causal=causal, softmax_scale=softmax_scale, softcap=softcap)
        out_part = out_part[..., : q.shape[3]]
        if carry:
            assert out_acc is not None
            merge_reference(
                lse[:, :, rows], out_acc[:, rows], lse_part, out_part, None if out is None else out[:, rows]
            )
            return
        lse[:, :, rows].copy_(lse_part)
        for target in (out_acc, out):
            if target is not None:
                target[:, rows].copy_(out_part)

    def _forward_blind(
        self, lse: torch.Tensor, out_acc: torch.Tensor | None, out: torch.Tensor | None, rows: slice, carry: bool
    ) -> None:
        """Queries that see no key of this block: the carry stays as it is, or starts as nothing."""
        if not lse.shape[2]:
            return
        if carry:
            assert out_acc is not None
            if out is not None:
                out[:, rows].copy_(out_acc[:, rows])
            return
        lse.fill_(float("-inf"))
        for target in (out_acc, out):
            if target is not None:
                target[:, rows].zero_()

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
        if deterministic and self.nondeterministic is not None:
            raise ValueError(f"{self.name}: expected deterministic=False, got True ({self.nondeterministic})")
        k, v = join_parts(k), join_parts(v)
        rows, keys, causal = self._seen(q, k, mask, softcap)
        if rows.start >= rows.stop:
            for target, carried in ((dq, carry_dq), (dk, carry_dkv), (dv, carry_dkv)):
                if not carried:
                    target.zero_()
            return
        lse, dout = lse[:, :, rows], dout[:, rows]
        lse = torch.where(lse == float("-inf"), _NO_KEY, lse).contiguous()
        operands = self._operands(q, k, v, rows, keys)
        grads = self._attend_backward(
            *operands,
            _pad_headdim(dout),
            _pad_headdim(pseudo_out(dout, delta[:, :, rows])),
            lse,
            causal=causal,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
        )
        block_dq, block_dk, block_dv = (x[..., : q.shape[3]] for x in grads)
        if block_dk.shape[2] != k.shape[2]:
            # One gradient per query head came back: sum the group in the accumulator's precision, not the input's.
            grouped = (*block_dk.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
            block_dk, block_dv = (x.reshape(grouped).sum(3, dtype=dq.dtype) for x in (block_dk, block_dv))
        _accumulate(dq, block_dq, rows, carry_dq)
        for target, block in ((dk, block_dk), (dv, block_dv)):
            if target.ndim == 5:  # no mask, so every key is seen
                for part, part_of_block in zip(target, split_parts(block, target)):
                    _accumulate(part, part_of_block, slice(0, part.shape[1]), carry_dkv)
            else:
                _accumulate(target, block, keys, carry_dkv)

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
