"""Cross-entropy of a linear layer's output, without ever holding all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..comm import Group
from ..kernels import accumulator_dtype
from .call import Setup, check_floats, check_labels_like, prepare, refuse_double_backward, without_autocast
from .products import WeightSum, product

Tensor = torch.Tensor

LOGITS_BYTES = 512 << 20
_ALIGNED = 16
"""Rows of the buffer start at multiples of this many elements: for vector loads, and for tensor cores."""


class _Chunks:
    """The logits of a few tokens at a time, in one buffer that their gradients take over."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, share: int, logits_bytes: int) -> None:
        """``share``: the largest slice of the vocabulary that any rank has, so that all cut alike."""
        self.hidden, self.weight, self.bias = hidden, weight, bias
        tokens, vocab = hidden.shape[0], weight.shape[0]
        self.stride = -(-max(share, 1) // _ALIGNED) * _ALIGNED
        most = max(1, logits_bytes // (self.stride * hidden.element_size()))
        pieces = -(-tokens // most)
        self.length = max(1, -(-tokens // max(pieces, 1)))
        if self.length % 128 and (rounded := -(-self.length // 128) * 128) <= most:
            self.length = rounded
        self.buffer = hidden.new_empty(self.length, self.stride)[:, :vocab]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(which tokens, their hidden states, their logits)``; the next chunk overwrites the logits."""
        for start in range(0, self.hidden.shape[0], self.length):
            part = slice(start, min(start + self.length, self.hidden.shape[0]))
            hidden, logits = self.hidden[part], self.buffer[: part.stop - part.start]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield part, hidden, logits


class _Gradients:
    """Sums over chunks of what is needed, in float32, for one factor at the end: rounded once."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...], setup: Setup):
        wide = accumulator_dtype(hidden.dtype)
        self.setup, self.hidden_dtype, self.tensor = setup, hidden.dtype, weight
        self.dhidden = hidden.new_empty(hidden.shape, dtype=wide) if needs[0] else None
        if self.dhidden is not None and not weight.shape[0]:
            self.dhidden.zero_()  # without words nobody writes it
        split = setup.rows.name == "triton" and weight.dtype == torch.bfloat16
        self.dweight = WeightSum(weight, split) if needs[1] else None
        self.dbias = bias.new_zeros(bias.shape, dtype=wide) if needs[2] and bias is not None else None

    def add(self, part: slice, hidden: Tensor, dlogits: Tensor) -> None:
        if self.dhidden is not None and dlogits.shape[1]:
            product(dlogits, self.tensor, self.dhidden[part])
        if self.dweight is not None:
            self.dweight.add(dlogits, hidden)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def finish(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dhidden = None
        if self.dhidden is not None:
            dhidden = torch.empty_like(self.dhidden, dtype=self.hidden_dtype)
            torch.mul(self.setup.slice.sum_(self.dhidden), factor, out=dhidden)  # rounds, and reads, once
            self.dhidden = None
        dweight = self.dweight.finish(factor) if self.dweight is not None else None
        dbias = (self.dbias * factor).to(self.hidden_dtype) if self.dbias is not None else None
        return dhidden, dweight, dbias

    def close(self) -> None:
        self.tensor = self.tensor.new_empty(0)
        if self.dweight is not None:
            self.dweight.close()


class _LinearCrossEntropy(torch.autograd.Function):
    """``hidden: [tokens, hidden]``. Gradients of a sum or mean are computed in forward, while the logits are there, up
    to a factor; those of per-token losses in backward, from logits computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        setup: Setup,
        needs: tuple[bool, ...],
        logits_bytes: int,
    ) -> Tensor:
        rows, options, live = setup.rows, setup.options, setup.live
        weight_of, ctx.later = setup.weight, torch.ones_like(setup.factor)
        if hidden.dtype == torch.float16:  # where the factor's power of two, which rounds nothing, could make it vanish
            mantissa, exponent = torch.frexp(setup.factor)
            weight_of, ctx.later = live * mantissa, torch.ldexp(ctx.later, exponent)
        ahead = any(needs) and setup.reduction != "none"
        gradients = _Gradients(hidden, weight, bias, needs, setup) if ahead else None
        statistics = live.new_empty(4, hidden.shape[0])
        for part, h, logits in _Chunks(hidden, weight, bias, max(setup.slice.columns), logits_bytes):
            target, weights = setup.target[part], weight_of[part]
            if ahead and setup.slice.group is None:
                found = rows.both(logits, target, weights, options, logits)
            else:
                found = setup.slice.merge(rows.statistics(logits, target, weights, options))
                if ahead:
                    rows.gradient(logits, target, weights, found, options, logits)
            statistics[:, part] = found
            if gradients is not None:
                gradients.add(part, h, logits)
        if gradients is not None:
            gradients.close()
        elif any(needs):
            ctx.save_for_backward(hidden, weight, bias, statistics)
        ctx.setup, ctx.needs, ctx.logits_bytes, ctx.gradients = setup, needs, logits_bytes, gradients
        return setup.loss(statistics)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_cross_entropy")
        setup = ctx.setup
        with without_autocast(dloss.device):
            if setup.reduction != "none":
                gradients, ctx.gradients = ctx.gradients, None
                if gradients is None:
                    raise RuntimeError(
                        "expected one backward pass: linear_cross_entropy has given its gradients away "
                        "(they are computed in forward, while the logits are there)"
                    )
                return (*gradients.finish(dloss * ctx.later), None, None, None)
            hidden, weight, bias, statistics = ctx.saved_tensors
            weights = setup.scaled(dloss)
            gradients = _Gradients(hidden, weight, bias, ctx.needs, setup)
            for part, h, logits in _Chunks(hidden, weight, bias, max(setup.slice.columns), ctx.logits_bytes):
                setup.rows.gradient(
                    logits, setup.target[part], weights[part], statistics[:, part], setup.options, logits
                )
                gradients.add(part, h, logits)
            gradients.close()
            return (*gradients.finish(torch.ones_like(setup.factor)), None, None, None)


@torch._disable_dynamo
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    group: Group = None,
    grad_reduction: str = "sum",
    tp_group: Group = None,
    vocab_size: int | None = None,
    logits_bytes: int = LOGITS_BYTES,
    backend: str = "auto",
    check_labels: bool = True,
) -> torch.Tensor:
    """:func:`cross_entropy` of ``hidden @ weight.T + bias``, in chunks of tokens: the logits never exist whole.

    With "mean" and "sum" the gradients are computed during the call, chunk by chunk, and scaled in backward, which can
    run once only. With "none" backward computes the logits again, one product more. Sums over chunks are float32
    (products of bfloat16 and float16 included); the gradient of a bfloat16 weight is summed on the Triton backend in
    its own memory and 8 bits more per element, see ``LOW_BITS`` in :mod:`seqpar_attn.loss.products`. A gradient that
    nobody needs is not computed. Autocast is ignored.

    Args:
        hidden: ``[..., hidden]``, bfloat16, float16, float32 or float64, any strides.
        weight: ``[vocab, hidden]``, contiguous, of the dtype of ``hidden``; with ``tp_group`` this rank's words, and
            the gradient of ``hidden``, which all ranks of ``tp_group`` have, is summed over them.
        labels: integers ``[...]``.
        bias: ``[vocab]`` as ``weight``, or None.
        logits_bytes: most memory for logits, and for their gradients, which take the same place; one token's are always
            there. Fewer chunks are faster: each adds to the whole gradient of the weight once. Beside it, beyond the
            gradients themselves, there are 4 bytes per element of ``hidden`` and 1 (other dtypes and backends: 4) per
            element of ``weight``, and 32 MiB where no kernel multiplies and adds in one.

    All others, result and errors as in :func:`cross_entropy`.
    """
    error = None
    grad = torch.is_grad_enabled()
    needs = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    try:
        _check(hidden, weight, labels, bias, logits_bytes, tp_group is not None)
    except ValueError as complaint:
        error = complaint
    setup = prepare(
        "linear_cross_entropy",
        hidden,
        labels,
        weight.shape[0] if weight.dim() else 0,
        error,
        options={
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        },
        reduction=reduction,
        grad_reduction=grad_reduction,
        group=group,
        tp_group=tp_group,
        vocab_size=vocab_size,
        backend=backend,
        check_labels=check_labels,
        # In backward hidden's gradient is a collective, and so is every chunk wherever gradients are computed at all.
        fields={
            "hidden size": hidden.shape[-1:],
            "logits_bytes": logits_bytes,
            "hidden requires grad": needs[0],
            "any requires grad": any(needs),
        },
    )
    with without_autocast(hidden.device):
        flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
        loss = _LinearCrossEntropy.apply(flat, weight, bias, setup, needs, logits_bytes)
    setup.verdict.read()
    return loss.view(labels.shape) if reduction == "none" else loss


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logits_bytes: int, sliced: bool
) -> None:
    check_floats("hidden", hidden, 1)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not (weight.shape[0] or sliced):
        raise ValueError(
            f"expected weight of shape [vocab, hidden] with hidden {hidden.shape[-1]}, got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"expected weight in the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    if not weight.is_contiguous():
        raise ValueError(f"expected a contiguous weight, got strides {list(weight.stride())}")
    if weight.device != hidden.device:
        raise ValueError(f"expected weight on the device of hidden, {hidden.device}, got {weight.device}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"expected bias of shape [vocab] = {list(weight.shape[:1])}, got {list(bias.shape)}")
        if bias.dtype != hidden.dtype or bias.device != hidden.device:
            raise ValueError(
                f"expected bias as hidden, {hidden.dtype} on {hidden.device}, got {bias.dtype} on {bias.device}"
            )
    check_labels_like("hidden", hidden, labels)
    if isinstance(logits_bytes, bool) or not isinstance(logits_bytes, int) or logits_bytes < 1:
        raise ValueError(f"expected logits_bytes to be a positive int, got {logits_bytes!r}")
