"""The whole sequence-parallel attention as one operator with a gradient.

``seqpar_attn::attention`` takes a group by name, so that torch.compile can trace it and a selective-checkpoint policy
can save its results and skip its kernels and its communication in recomputation.
"""

from __future__ import annotations

from typing import Any

import torch

from . import kept, kernels, numbers
from .comm import UNKNOWN, Communicator, communicator
from .kernels.base import Kernel, accumulator_dtype
from .layout import get_layout
from .mask import Mask
from .operator import below_autograd, define
from .passes import backward_pass, forward_pass
from .plan import Plan, make_plan
from .validation import CALL_SCHEMA, Call, check_call, check_tensors


def _prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, comm: Communicator, call: Call) -> tuple[Plan, Kernel]:
    """Check this rank's input and choose; ValueError if anything is wrong with it."""
    check_tensors(q, k, v)
    copies = comm.world_size // len(comm.local_ranks)
    seqlen = q.shape[1] * copies
    check_call(call, seqlen)
    get_layout(call.layout, comm.world_size).shard_length(seqlen)
    mask = Mask(seqlen, call.causal, call.window_size, call.cu_seqlens)
    plan = make_plan(call.method, call.transfer, call.layout, comm.world_size, mask, call.ranks_per_host)
    kernel = kernels.resolve(call.backend, q.device, q.dtype, q.shape[3], plan.kinds, call.softcap, call.deterministic)
    return plan, kernel


def describe(
    q: torch.Tensor, k: torch.Tensor, call: Call, kernel: Kernel | None, direction: str = "forward"
) -> dict[str, object]:
    """What all ranks must agree on; that includes the kernel, whose accumulators may be in a form of its own."""
    shapes = {"q shape": tuple(q.shape), "k shape": tuple(k.shape)}
    # The device first: ranks that differ in it may be at different handshakes, with no other field in common.
    own = {"device": q.device.type, "direction": direction, **shapes, "dtype": q.dtype}
    chosen = kernel and f"{kernel.name} ({type(kernel).__name__})"  # a backend may have several kernels
    return own | vars(call) | {"chosen backend": chosen}


def of_call(number: int | None) -> dict[str, object]:
    """What all ranks of a group must agree on in the backward pass, besides."""
    return {"forward call": UNKNOWN if number is None else number}


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of this process's shards; see :func:`seqpar_attn.ring_attention`."""
    known = kept.replayed(q)
    if known is not None:
        return known[0], known[1]
    call = Call.of(rest)
    comm = communicator(group, q.device)
    error: ValueError | None = None
    kernel: Kernel | None = None
    try:
        plan, kernel = _prepare(q, k, v, comm, call)
    except ValueError as complaint:
        error = complaint
    if comm.world_size > 1 or error is not None:
        comm.agree(describe(q, k, call, kernel), error)
    assert kernel is not None
    numbers.begin(comm.count_call())
    results = forward_pass(q, k, v, plan, comm, kernel, call)
    kept.record(results)
    return results


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors(q, k, v)
    batch, seqlen, nheads, _ = q.shape
    lse = torch.empty(batch, nheads, seqlen, dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)`` in the input dtype, given the results of :func:`_attention`; ``out`` may be ``rowsum(dout *
    out)``, ``[batch, nheads, seqlen]`` in the accumulator dtype, instead."""
    call = Call.of(rest)
    comm = communicator(group, q.device)
    plan, kernel = _prepare(q, k, v, comm, call)
    (number,) = numbers.here()
    if comm.world_size > 1 and q.device.type == "cpu":
        # Ranks that come to backward in different orders would take each other's blocks for their own, and gloo ends
        # the process that gets a longer message than it expects.
        comm.agree(describe(q, k, call, kernel, "backward") | of_call(number), None)
    return backward_pass(dout, dlse, q, k, v, out, lse, plan, comm, kernel, call, number=number)


def _fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


attention_backward_op = define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str group, "
    f"{CALL_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        with numbers.noting() as note:
            out, lse = below_autograd(attention_op, q, k, v, *rest)
        ctx.numbers = note.numbers
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        with numbers.of_backward(ctx.numbers):
            gradients = attention_backward_op(dout, dlse, q, k, v, out, lse, *ctx.rest)
        return (*gradients, *([None] * len(ctx.rest)))


attention_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, str group, {CALL_SCHEMA}) -> (Tensor, Tensor)",
    _attention,
    _fake,
    _Attention,
)
