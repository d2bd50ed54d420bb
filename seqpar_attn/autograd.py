"""Plays schedules: the whole sequence-parallel attention as one operator with a gradient.

``seqpar_attn::attention`` takes a group by name, so that torch.compile can trace it and a selective-checkpoint policy
can save its results and skip its kernels and its communication in recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import kernels
from .comm import Communicator, Message, communicator
from .kernels.base import Kernel, accumulator_dtype
from .layout import get_layout
from .mask import Mask
from .plan import Plan, make_plan
from .schedule import Block, Kind, Merge, Result, Schedule, Task
from .validation import Call, check_call, check_tensors

Field = tuple[torch.Tensor, int]
"""A tensor and its sequence dimension."""


def _narrow(field: Field, start: int, length: int) -> torch.Tensor:
    return field[0].narrow(field[1], start, length)


class _Pass:
    """One pass over a schedule for the ranks of this process.

    ``own[kind]`` are the tensors of the local ranks, shard after shard; slots are made when first used, each of the
    shape of one shard.
    """

    def __init__(self, plan: Plan, schedule: Schedule, comm: Communicator, kernel: Kernel, call: Call):
        self.plan, self.schedule, self.comm, self.kernel, self.call = plan, schedule, comm, kernel, call
        self.shard = sum(span.length for span in schedule.spans[0])
        self.own: dict[Kind, tuple[Field, ...]] = {}
        self.empty: dict[Kind, tuple[float, ...]] = {Kind.OUT: (0.0, float("-inf"))}
        """What an accumulator holds before anything was added; zeros unless named here."""
        self._slots: dict[tuple[int, Kind, int], tuple[Field, ...]] = {}
        self._where: dict[Block, tuple[int, int]] = {}

    def view(self, rank: int, kind: Kind, block: Block, slot: int | None) -> list[torch.Tensor]:
        """The tensors of ``block`` in a slot or in the rank's own data."""
        if block not in self._where:
            self._where[block] = (self.schedule.start(block), self.schedule.length(block))
        start, length = self._where[block]
        if slot is None:
            start += self.comm.local_ranks.index(rank) * self.shard
            return [_narrow(field, start, length) for field in self.own[kind]]
        key = (rank, kind, slot)
        if key not in self._slots:
            self._slots[key] = tuple((self._shard_like(x, dim), dim) for x, dim in self.own[kind])
        return [_narrow(field, start, length) for field in self._slots[key]]

    def _shard_like(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = self.shard
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    def result(self, rank: int, kind: Kind, block: Block, result: Result) -> tuple[list[torch.Tensor], bool]:
        """Where a task accumulates, and whether the kernel has to carry on from what is there."""
        views = self.view(rank, kind, block, result.slot)
        carry = bool(result.carried)
        if carry and len(result.carried) < len(block.chunks):
            # The kernel carries a block as a whole: give the chunks that are new something to carry.
            for chunk in set(block.chunks) - set(result.carried):
                new = self.view(rank, kind, Block(block.owner, (chunk,)), result.slot)
                for x, value in zip(new, self.empty.get(kind, (0.0, 0.0))):
                    x.fill_(value)
        return views, carry

    def play(self) -> None:
        for row in self.schedule.steps:
            cells = [(rank, row[rank]) for rank in self.comm.local_ranks]
            handle = None
            if any(cell.sends or cell.receives for _, cell in cells):
                sends = [self._messages(rank, cell.sends) for rank, cell in cells]
                receives = [self._messages(rank, cell.receives) for rank, cell in cells]
                handle = self.comm.exchange(sends, receives)
            for rank, cell in cells:
                for merge in cell.merges:
                    self.merge(rank, merge)
                for task in cell.tasks:
                    self.compute(rank, task)
            if handle is not None:
                handle.wait()

    def _messages(self, rank: int, transfers: Sequence[Any]) -> list[Message]:
        return [Message(t.peer, x) for t in transfers for x in self.view(rank, t.kind, t.block, t.slot)]

    def merge(self, rank: int, merge: Merge) -> None:
        raise NotImplementedError

    def compute(self, rank: int, task: Task) -> None:
        raise NotImplementedError


class _Forward(_Pass):
    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any):
        super().__init__(*args)
        dtype = accumulator_dtype(q.dtype)
        batch, seqlen, nheads, _ = q.shape
        self.out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.lse = torch.empty(batch, nheads, seqlen, dtype=dtype, device=q.device)
        local = [step for row in self.schedule.steps for step in (row[r] for r in self.comm.local_ranks)]
        one_call = all(
            set(task.query_result.final) == set(task.query.chunks) and not task.query_result.carried
            for step in local
            for task in step.tasks
        )
        out_acc = self.out if one_call else torch.empty(q.shape, dtype=dtype, device=q.device)
        self.own = {
            Kind.QUERY: ((q, 1),),
            Kind.KV: ((k, 1), (v, 1)),
            Kind.OUT: ((out_acc, 1), (self.lse, 2)),
        }

    def _final(self, rank: int, block: Block, final: tuple[int, ...]) -> torch.Tensor | None:
        if not final:
            return None
        start, length = self._where[block]
        return self.out.narrow(1, start + self.comm.local_ranks.index(rank) * self.shard, length)

    def merge(self, rank: int, merge: Merge) -> None:
        out_acc, lse = self.view(rank, Kind.OUT, merge.block, None)
        part, lse_part = self.view(rank, Kind.OUT, merge.block, merge.slot)
        self.kernel.merge(lse, out_acc, lse_part, part, self._final(rank, merge.block, merge.final))

    def compute(self, rank: int, task: Task) -> None:
        (q,) = self.view(rank, Kind.QUERY, task.query, task.query_slot)
        k, v = self.view(rank, Kind.KV, task.key, task.key_slot)
        result = task.query_result
        (out_acc, lse), carry = self.result(rank, Kind.OUT, task.query, result)
        out = None if result.slot is not None else self._final(rank, task.query, result.final)
        finished = len(result.final) == len(task.query.chunks)
        self.kernel.forward(
            q,
            k,
            v,
            lse,
            None if finished and not carry else out_acc,
            out,
            self.plan.block_mask(task, q.device),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry=carry,
        )


class _Backward(_Pass):
    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        *args: Any,
    ):
        super().__init__(*args)
        dtype = accumulator_dtype(q.dtype)
        self.gradients = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
        dq, dk, dv = self.gradients
        self.own = {
            Kind.QUERY: ((q, 1), (dout, 1), (lse, 2), (delta, 2)),
            Kind.KV: ((k, 1), (v, 1)),
            Kind.DQ: ((dq, 1),),
            Kind.DKV: ((dk, 1), (dv, 1)),
        }

    def merge(self, rank: int, merge: Merge) -> None:
        mine = self.view(rank, merge.kind, merge.block, None)
        for x, part in zip(mine, self.view(rank, merge.kind, merge.block, merge.slot)):
            x.add_(part)

    def compute(self, rank: int, task: Task) -> None:
        q, dout, lse, delta = self.view(rank, Kind.QUERY, task.query, task.query_slot)
        k, v = self.view(rank, Kind.KV, task.key, task.key_slot)
        (dq,), carry_dq = self.result(rank, Kind.DQ, task.query, task.query_result)
        (dk, dv), carry_dkv = self.result(rank, Kind.DKV, task.key, task.key_result)
        self.kernel.backward(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            dq,
            dk,
            dv,
            self.plan.block_mask(task, q.device),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry_dq=carry_dq,
            carry_dkv=carry_dkv,
            deterministic=self.call.deterministic,
        )


def _prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, comm: Communicator, call: Call) -> tuple[Plan, Kernel]:
    """Check this rank's input and choose; ValueError if anything is wrong with it."""
    check_tensors(q, k, v)
    copies = comm.world_size // len(comm.local_ranks)
    seqlen = q.shape[1] * copies
    check_call(call, seqlen)
    get_layout(call.layout, comm.world_size).shard_length(seqlen)
    mask = Mask(seqlen, call.causal, call.window_size, call.cu_seqlens)
    plan = make_plan(call.method, call.transfer, call.layout, comm.world_size, mask)
    kernel = kernels.resolve(call.backend, q.device, q.dtype, q.shape[3], plan.kinds, call.softcap, call.deterministic)
    return plan, kernel


def _describe(q: torch.Tensor, k: torch.Tensor, call: Call) -> dict[str, object]:
    """What all ranks must agree on."""
    return {"q shape": tuple(q.shape), "k shape": tuple(k.shape), "dtype": q.dtype, "device": q.device.type} | vars(
        call
    )


def _heads_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("seqpar_attn::attention", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: str,
    method: str,
    transfer: str,
    layout: str,
    causal: bool,
    window_size: int | None,
    cu_seqlens: list[int] | None,
    softcap: float | None,
    softmax_scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of this process's shards; see :func:`seqpar_attn.ring_attention`."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens)
    call = Call(method, transfer, layout, causal, window_size, bounds, softcap, softmax_scale, backend, deterministic)
    comm = communicator(group, q.device)
    error: ValueError | None = None
    try:
        plan, kernel = _prepare(q, k, v, comm, call)
    except ValueError as complaint:
        error = complaint
    if comm.world_size > 1 or error is not None:
        comm.agree(_describe(q, k, call), error)
    q, k, v = (_heads_contiguous(x) for x in (q, k, v))
    forward = _Forward(q, k, v, plan, plan.forward, comm, kernel, call)
    if q.numel():
        forward.play()
    return forward.out, forward.lse


@attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen, nheads, _ = q.shape
    lse = torch.empty(batch, nheads, seqlen, dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("seqpar_attn::attention_backward", mutates_args=())
def attention_backward_op(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group: str,
    method: str,
    transfer: str,
    layout: str,
    causal: bool,
    window_size: int | None,
    cu_seqlens: list[int] | None,
    softcap: float | None,
    softmax_scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)`` in the input dtype, given the results of :func:`attention_op`."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens)
    call = Call(method, transfer, layout, causal, window_size, bounds, softcap, softmax_scale, backend, deterministic)
    comm = communicator(group, q.device)
    plan, kernel = _prepare(q, k, v, comm, call)
    q, k, v, dout = (_heads_contiguous(x) for x in (q, k, v, dout))
    delta = kernel.delta(out, dout)
    if dlse is not None:
        delta -= dlse  # d lse / d score = p, which enters dS = P (dP - delta) with the opposite sign of delta
    backward = _Backward(q, k, v, dout, lse, delta, plan, plan.backward, comm, kernel, call)
    if q.numel():
        backward.play()
    dq, dk, dv = (x.to(q.dtype) for x in backward.gradients)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = attention_backward_op(dout, dlse, q, k, v, out, lse, *ctx.rest)
    return (*gradients, *([None] * len(ctx.rest)))


attention_op.register_autograd(_backward, setup_context=_setup_context)
