"""Attention with heads exchanged for tokens, as one operator with a gradient: Ulysses, alone or within a ring.

The ranks of a group exchange heads for tokens (:mod:`.heads`), so that each has some heads of all their tokens. Over
these it plays a ring's schedule: with the ranks that have the same heads of other tokens (USP), or alone (Ulysses).
What was exchanged is kept for the backward pass, which therefore moves as many tensors as the forward pass; gradients
of key heads that went to several ranks travel in the accumulator dtype. A recomputation in a checkpoint takes the
attention's result from what was kept (:mod:`.kept`) and exchanges again only what backward needs.
"""

from __future__ import annotations

from typing import Any

import torch

from . import kept, kernels, numbers
from .autograd import describe, of_call
from .comm import Communicator, agree, communicator, count_ranks
from .heads import key_copies, to_heads, to_tokens
from .kernels.base import Kernel, accumulator_dtype
from .layout import Contiguous, Layout, get_layout
from .mask import Mask
from .operator import below_autograd, define
from .passes import backward_pass, forward_pass
from .plan import Plan, make_plan
from .validation import CALL_SCHEMA, Call, check_call, check_tensors


class _Grid:
    """The two groups of this process, and which of the two a call's layout is of.

    ``heads`` is the layout of a row, the tokens of one Ulysses group; ``ring`` names that of the rows.
    """

    def __init__(self, group: str, ring: str, call: Call, device: torch.device):
        self.comm, self.ring_comm = communicator(group, device), communicator(ring, device)
        self.call = call
        self.rows = len(self.ring_comm.local_ranks)

    @property
    def comms(self) -> tuple[Communicator, Communicator]:
        return self.comm, self.ring_comm

    @property
    def heads(self) -> Layout:
        if self.call.method == "ulysses":
            return get_layout(self.call.layout, self.comm.world_size)
        return Contiguous(self.comm.world_size)

    def plan(self, tokens: int) -> Plan:
        """Of the ring, for a process that has so many tokens; ValueError where lengths or names are wrong."""
        call, size = self.call, self.comm.world_size
        seqlen = tokens * size * self.ring_comm.world_size // (len(self.comm.local_ranks) * self.rows)
        check_call(call, seqlen)
        mask = Mask(seqlen, call.causal, call.window_size, call.cu_seqlens)
        if call.method == "ulysses":
            self.heads.shard_length(seqlen)
            return make_plan("ring", call.transfer, "contiguous", 1, mask)
        get_layout(call.layout, self.ring_comm.world_size)  # an unknown one is named here as it was given
        get_layout(f"{call.layout}/{size}", size * self.ring_comm.world_size).shard_length(seqlen)
        return make_plan("ring", call.transfer, call.layout, self.ring_comm.world_size, mask)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Plan, Kernel]:
        """Check this rank's input and choose; ValueError if anything is wrong with it."""
        check_tensors(q, k, v)
        if q.shape[2] % self.comm.world_size:
            raise ValueError(
                f"expected nheads divisible by the {self.comm.world_size} ranks that exchange heads, got {q.shape[2]}"
            )
        plan, call = self.plan(q.shape[1]), self.call
        args = (call.backend, q.device, q.dtype, q.shape[3], plan.kinds, call.softcap, call.deterministic)
        return plan, kernels.resolve(*args)

    def to_heads(self, *tensors: tuple[torch.Tensor, int], number: int | None = None) -> list[torch.Tensor]:
        return to_heads(tensors, self.comm, self.heads, self.rows, number)

    def to_tokens(self, *tensors: tuple[torch.Tensor, int], number: int | None = None) -> list[torch.Tensor]:
        return to_tokens(tensors, self.comm, self.heads, self.rows, number)


def _as_head(lse: torch.Tensor) -> torch.Tensor:
    """``[b, h, s]`` as ``[b, s, h, 1]``."""
    return lse.transpose(1, 2).unsqueeze(-1)


def _as_lse(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(-1).transpose(1, 2).contiguous()


Exchanged = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: str,
    ring: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of this process's shards, then ``q, k, v, out, lse`` as exchanged, for the backward pass; see
    :func:`seqpar_attn.ulysses_attention`. ``rest``: a :class:`Call`, its method "ulysses" or "usp"."""
    call = Call.of(rest)
    known = kept.replayed(q)
    grid = _Grid(group, ring, call, q.device)
    if known is not None:
        copies = key_copies(q.shape[2], k.shape[2], grid.comm.world_size)
        out, lse = known
        *exchanged, lse_heads = grid.to_heads((q, 1), (k, copies), (v, copies), (out, 1), (_as_head(lse), 1))
        return (out, lse, *exchanged, _as_lse(lse_heads))  # type: ignore[return-value]
    error: ValueError | None = None
    kernel: Kernel | None = None
    try:
        plan, kernel = grid.prepare(q, k, v)
    except ValueError as complaint:
        error = complaint
    agree(grid.comms, describe(q, k, call, kernel), error)
    assert kernel is not None
    numbers.begin(*(comm.count_call() for comm in grid.comms))
    copies = key_copies(q.shape[2], k.shape[2], grid.comm.world_size)
    q_heads, k_heads, v_heads = grid.to_heads((q, 1), (k, copies), (v, copies))
    out_heads, lse_heads = forward_pass(q_heads, k_heads, v_heads, plan, grid.ring_comm, kernel, call)
    out, lse = grid.to_tokens((out_heads, 1), (_as_head(lse_heads), 1))
    lse = _as_lse(lse)
    kept.record((out, lse))
    return out, lse, q_heads, k_heads, v_heads, out_heads, lse_heads


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: str, ring: str, *args: Any) -> Exchanged:
    check_tensors(q, k, v)
    size, local = count_ranks(group)
    batch, tokens, nheads, headdim = q.shape
    dtype = accumulator_dtype(q.dtype)
    slots = k.shape[2] * key_copies(nheads, k.shape[2], size) // size
    row = local * batch, tokens // local * size
    return (
        q.new_empty(q.shape),
        q.new_empty(batch, nheads, tokens, dtype=dtype),
        q.new_empty(*row, nheads // size, headdim),
        k.new_empty(*row, slots, headdim),
        v.new_empty(*row, slots, headdim),
        q.new_empty(*row, nheads // size, headdim),
        q.new_empty(row[0], nheads // size, row[1], dtype=dtype),
    )


def _ulysses_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    nheads_kv: int,
    group: str,
    ring: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)`` of the shards, given ``dout, dlse`` of the shards and the rest as it was exchanged."""
    call = Call.of(rest)
    grid = _Grid(group, ring, call, q.device)
    known = numbers.here(2)
    plan, kind = grid.plan(dout.shape[1]), (q.device, q.dtype, q.shape[3])
    kernel = kernels.resolve(call.backend, *kind, plan.kinds, call.softcap, call.deterministic)
    if q.device.type == "cpu":  # as in autograd.attention_backward_op
        agree(grid.comms, describe(q, k, call, kernel, "backward"), None, [of_call(number) for number in known])
    given = [(dout, 1)] if dlse is None else [(dout, 1), (_as_head(dlse), 1)]
    dout_heads, *dlse_heads = grid.to_heads(*given, number=known[0])
    dlse = _as_lse(dlse_heads[0]) if dlse_heads else None
    copies = key_copies(dout.shape[2], nheads_kv, grid.comm.world_size)
    # The copies of a key head have their gradients added, so these must not be rounded before.
    ring_comm, wide = grid.ring_comm, copies > 1
    given_heads = (dout_heads, dlse, q, k, v, out, lse)
    dq, dk, dv = backward_pass(*given_heads, plan, ring_comm, kernel, call, wide_keys=wide, number=known[1])
    dq, dk, dv = grid.to_tokens((dq, 1), (dk, copies), (dv, copies), number=known[0])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    nheads_kv: int,
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, _, headdim = dout.shape
    keys = batch, tokens, nheads_kv, headdim
    return q.new_empty(dout.shape), k.new_empty(keys), v.new_empty(keys)


ulysses_backward_op = define(
    "ulysses_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"SymInt nheads_kv, str group, str ring, {CALL_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _ulysses_backward,
    _fake_backward,
)


class _Ulysses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        with numbers.noting() as note:
            results = below_autograd(ulysses_op, q, k, v, *rest)
        ctx.numbers = note.numbers
        ctx.save_for_backward(*results[2:])
        ctx.mark_non_differentiable(*results[2:])
        ctx.shape, ctx.nheads_kv, ctx.rest = q.shape, k.shape[2], rest
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = q.new_zeros(ctx.shape)
        with numbers.of_backward(ctx.numbers):
            gradients = ulysses_backward_op(dout, dlse, q, k, v, out, lse, ctx.nheads_kv, *ctx.rest)
        return (*gradients, *([None] * len(ctx.rest)))


ulysses_op = define(
    f"ulysses(Tensor q, Tensor k, Tensor v, str group, str ring, {CALL_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ulysses,
    _fake,
    _Ulysses,
)
