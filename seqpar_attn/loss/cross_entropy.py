"""Cross-entropy of logits that are there already."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..comm import Group
from .call import Setup, check_floats, check_labels_like, prepare, refuse_double_backward, without_autocast

Tensor = torch.Tensor


class _CrossEntropy(torch.autograd.Function):
    """``logits: [tokens, vocab]``. The gradient is written in forward if it may go over the logits and is needed in no
    other scale than forward knows; else in backward, from the saved logits and statistics."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, setup: Setup, needed: bool, inplace: bool) -> Tensor:
        rows, options = setup.rows, setup.options
        # Not float16: gradients of a mean vanish in it unless the caller's loss scale, known in backward, is in them.
        ahead = needed and inplace and setup.reduction != "none" and logits.dtype != torch.float16
        if ahead and setup.slice.group is None:
            statistics = rows.both(logits, setup.target, setup.weight, options, logits)
        else:
            statistics = setup.slice.merge(rows.statistics(logits, setup.target, setup.live, options))
            if ahead:
                rows.gradient(logits, setup.target, setup.weight, statistics, options, logits)
        if ahead:
            # Whoever saved these logits for a backward of its own hears of it there.
            torch.autograd.graph.increment_version(logits)
        ctx.ahead, ctx.setup, ctx.inplace, ctx.spent = ahead, setup, inplace, False
        if needed:
            ctx.save_for_backward(logits, statistics)
        return setup.loss(statistics)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cross_entropy")
        if ctx.spent:
            raise RuntimeError(
                "expected one backward pass: the logits of this cross_entropy have been overwritten by their gradient "
                "(inplace=True)"
            )
        logits, statistics = ctx.saved_tensors
        setup = ctx.setup
        if ctx.inplace:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)
        with without_autocast(logits.device):
            if ctx.ahead:
                setup.rows.scale(logits, dloss)
                return logits, None, None, None
            out = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
            weight = setup.scaled(dloss if setup.reduction == "none" else dloss * setup.factor)
            setup.rows.gradient(logits, setup.target, weight, statistics, setup.options, out)
        return out, None, None, None


@torch._disable_dynamo
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
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
    inplace: bool = False,
    backend: str = "auto",
    check_labels: bool = True,
) -> torch.Tensor:
    """Cross-entropy of ``logits`` whose tokens are split over the ranks of ``group``.

    The loss of a token with logits x and label y, where ``z = softcap * tanh(x / softcap)`` (or x itself) and
    ``lse = logsumexp(z)``, is ``(1 - label_smoothing) * (lse - z[y]) + label_smoothing * (lse - mean(z)) + z_loss *
    lse**2``. Computed in float32 inside (float64 for float64 logits), in natural logarithms.

    With ``reduction="mean"`` the result is *this rank's share* of the mean over all tokens of ``group`` that count: the
    sum of its own losses over the global number of such tokens (one all-reduce of two integers). Shares add up to the
    mean, and a rank without such a token contributes 0 and gets zero gradients; so does every rank if nobody has any.
    How the gradients of the ranks are then combined decides a factor:

    - ``grad_reduction="sum"``: the caller *adds* the parameters' gradients over the group, as this package's examples
      do. The factor is 1.
    - ``grad_reduction="mean"``: the caller *averages* them, as DDP and FSDP do by default. Loss and gradients are then
      multiplied by the group's world size, so that the average of the losses is the mean over all tokens.

    Either way the combined gradients are those of one device with all tokens.

    Args:
        logits: ``[..., vocab]`` of any strides, bfloat16, float16, float32 or float64; with ``tp_group`` this rank's
            columns.
        labels: integers ``[...]``: the word to predict *at* each position (shifted already, as ``shard_batch`` does),
            in ``[0, vocab_size)``, or ``ignore_index``.
        ignore_index: the label of tokens that do not count. Their loss and gradient are 0, whatever their logits.
        label_smoothing: in [0, 1).
        z_loss: weight of ``lse**2``, at least 0.
        softcap: positive, or None.
        reduction: "mean", "sum" (of this rank's tokens) or "none" (per token, ``[...]``).
        group: for "mean", who has the other tokens: a ProcessGroup, one dimension of a DeviceMesh, None (the default
            group; one rank without torch.distributed) or a LoopbackGroup (all tokens are here; ``LoopbackGroup(1)``
            for a mean over this process's tokens alone). Must be given with ``tp_group``.
        tp_group: ranks that have the same tokens and a slice of the vocabulary each, in rank order. All get the same
            loss.
        vocab_size: words over all of ``tp_group``; rank r has ``[r * s, (r + 1) * s)`` of them, ``s`` being
            ``ceil(vocab_size / world_size)``, as ``torch.chunk`` cuts. Default: equal slices.
        inplace: the gradient may be written over ``logits``, whose contents are lost during the call or in backward:
            no second buffer of that size, and one pass over memory less. The graph can then be run backward once only.
        backend: "auto", "triton" or "reference" (plain torch). A name never falls back to another.
        check_labels: raise for labels out of range. On a GPU the host then waits once, at the end of the call, for the
            work that was queued before it (not in the capture of a CUDA graph, where nothing is checked). Labels out of
            range that nobody checks make the loss NaN.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``[...]`` with "none". Differentiable once.

    Raises:
        ValueError: bad shapes, dtypes, numbers or labels, here or (as far as the groups have to know) on another rank.

    Sources: online softmax (Milakov, Gimelshein 2018, arXiv 1805.02867); z-loss: PaLM (Chowdhery et al. 2022, arXiv
    2204.02311); vocabulary-parallel loss: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053), the idea only.
    """
    error = None
    needed = torch.is_grad_enabled() and logits.requires_grad
    try:
        check_floats("logits", logits, 1)
        if not logits.shape[-1] and tp_group is None:
            raise ValueError(f"expected logits of at least one word, got shape {list(logits.shape)}")
        check_labels_like("logits", logits, labels)
    except ValueError as complaint:
        error = complaint
    setup = prepare(
        "cross_entropy",
        logits,
        labels,
        logits.shape[-1] if logits.dim() else 0,
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
        fields={},
    )
    with without_autocast(logits.device):
        # A view always: backward gives its argument away as a gradient, which must not be the caller's own tensor.
        flat = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
        if flat.stride(1) != 1 or (flat.shape[0] > 1 and flat.stride(0) < flat.shape[1]):
            flat = flat.contiguous()  # columns apart, or rows that share memory: also no place for a gradient
        loss = _CrossEntropy.apply(flat, setup, needed, inplace)
    setup.verdict.read()
    return loss.view(labels.shape) if reduction == "none" else loss
