"""Plays schedules: the whole sequence-parallel attention as one operator with a gradient.

``seqpar_attn::attention`` takes a group by name, so that torch.compile can trace it and a selective-checkpoint policy
can save its results and skip its kernels and its communication in recomputation.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch

from . import kernels
from .comm import Communicator, Message, communicator
from .kernels.base import BlockMask, Kernel, accumulator_dtype
from .kernels.device import on_device_of
from .kernels.tape import Tape, recording
from .layout import get_layout
from .mask import Mask
from .plan import Plan, make_plan
from .program import Add, Compute, Program
from .schedule import Kind
from .validation import Call, check_call, check_tensors

Field = tuple[torch.Tensor, int]
"""A tensor and its sequence dimension."""


_new_message = functools.partial(tuple.__new__, Message)
"""``Message``, without a Python function in between: there are dozens in a pass."""


class _Cut:
    """The same tokens of every slot of a kind.

    A view costs as much host time as half a launch, so those of all slots are made by one unbind.
    """

    def __init__(self, stacks: list[torch.Tensor], fields: int):
        self.stacks, self.fields = stacks, fields
        self.pieces = [stack.unbind() for stack in stacks]

    def slot(self, index: int) -> Sequence[torch.Tensor]:
        if len(self.stacks) == 1:
            return self.pieces[0][index * self.fields : (index + 1) * self.fields]
        return [pieces[index] for pieces in self.pieces]

    def several(self, index: int, count: int) -> Sequence[torch.Tensor]:
        """The fields of ``count`` slots: ``[count, ...]`` each."""
        if len(self.stacks) == 1:
            first, end, fields = index * self.fields, (index + count) * self.fields, self.fields
            return [self.stacks[0][first + field : end : fields] for field in range(fields)]
        return [stack[index : index + count] for stack in self.stacks]


_TAPES_PER_PROGRAM = 64
_tapes: weakref.WeakKeyDictionary[Program, dict[Hashable, Tape]] = weakref.WeakKeyDictionary()


def _tape_of(program: Program, kernel: Kernel, call: Call, given: Sequence[torch.Tensor]) -> Tape | None:
    """The tape of such a pass, new or recorded; None if the backend takes no part."""
    if not kernel.recordable:
        return None
    together = 0
    for x in given:
        together |= x.data_ptr()
    key: tuple[Hashable, ...] = (
        cast(Hashable, kernel), given[0].device, given[0].dtype, call.softmax_scale, call.softcap, call.deterministic,
        *[(x.shape, x.stride()) for x in given],
    )  # fmt: skip
    if together % 16:  # mostly all are aligned, and then there is nothing to add
        key += tuple([x.data_ptr() % 16 for x in given])
    tapes = _tapes.setdefault(program, {})
    tape = tapes.get(key)
    if tape is None or not tape.complete:  # incomplete: another thread is at it, or something went wrong
        if len(tapes) >= _TAPES_PER_PROGRAM:
            tapes.clear()
        tape = tapes[key] = Tape()
    return tape


class _Pass:
    """One pass over a schedule for the ranks of this process.

    ``own[kind]`` are tensors with the shards of the local ranks one after the other; ``like[kind]`` those of them that
    travel, after which slots of the size of one shard are made when first used.
    """

    own: dict[Kind, tuple[Field, ...]]
    like: dict[Kind, tuple[Field, ...]]
    given: tuple[torch.Tensor, ...]
    """Whose shapes and strides determine those of all others."""

    def __init__(self, plan: Plan, backward: bool, comm: Communicator, kernel: Kernel, call: Call):
        self.plan, self.comm, self.kernel, self.call = plan, comm, kernel, call
        self.program = plan.program(backward, comm.local_ranks)
        self._stacks: dict[tuple[int, Kind], list[torch.Tensor]] = {}
        self._cuts: dict[tuple[int, Kind, int, int], _Cut] = {}
        self._views: list[Sequence[torch.Tensor] | None] = [None] * len(self.program.views)
        self._tape: Tape | None = None
        self._bases: dict[int, int] = {}
        """While a tape records: number of each base."""

    def view(self, index: int) -> Sequence[torch.Tensor]:
        """The tensors of a view, made at its first use; of several slots, with their number as first dimension."""
        tensors = self._views[index]
        if tensors is None:
            local, kind, slot, start, length, slots = self.program.views[index]
            if slot is None:
                tensors = [x if length == x.shape[dim] else x.narrow(dim, start, length) for x, dim in self.own[kind]]
            else:
                key = (local, kind, start, length)
                cut = self._cuts.get(key)
                if cut is None:
                    cut = self._cuts[key] = _Cut(self._slots(*key), len(self.like[kind]))
                tensors = cut.slot(slot) if slots == 1 else cut.several(slot, slots)
            self._views[index] = tensors
            if self._bases:
                self._locate(tensors, [x for x, _ in self.own[kind]] if slot is None else self._stack(local, kind))
        return tensors

    def _locate(self, tensors: Sequence[torch.Tensor], starts: Sequence[torch.Tensor]) -> None:
        """Tell the tape that records of which bases these are pieces; several may be of the same."""
        assert self._tape is not None
        for field, x in enumerate(tensors):
            start = starts[min(field, len(starts) - 1)]
            self._tape.locate(x, self._bases[id(start)], start)

    def _stack(self, local: int, kind: Kind) -> list[torch.Tensor]:
        """The slots of a kind, all together, made when first asked for.

        One tensor ``[slots * fields, ...]`` with the fields of a slot next to each other if they are alike, else one
        ``[slots, ...]`` per field.
        """
        stacks = self._stacks.get((local, kind))
        if stacks is None:
            like = self.like[kind]
            count = self.program.slots[local, kind]
            shapes = []
            for x, dim in like:
                shape = list(x.shape)
                shape[dim] = self.program.shard
                shapes.append(shape)
            first = like[0][0]
            if all(shape == shapes[0] and x.dtype == first.dtype for shape, (x, _) in zip(shapes, like)):
                stacks = [torch.empty([count * len(like), *shapes[0]], dtype=first.dtype, device=first.device)]
            else:
                stacks = [
                    torch.empty([count, *shape], dtype=x.dtype, device=x.device) for shape, (x, _) in zip(shapes, like)
                ]
            self._stacks[local, kind] = stacks
        return stacks

    def _slots(self, local: int, kind: Kind, start: int, length: int) -> list[torch.Tensor]:
        """Tokens ``start ...`` of all slots of a kind."""
        stacks = self._stack(local, kind)
        if length == self.program.shard:
            return stacks
        return [x.narrow(dim + 1, start, length) for x, (_, dim) in zip(stacks, self.like[kind])]

    def _all_bases(self) -> list[torch.Tensor]:
        """What the launches' addresses are relative to, in an order that only the program determines."""
        bases = [x for fields in self.own.values() for x, _ in fields]
        for local, kind in self.program.slots:
            bases += self._stack(local, kind)
        return bases

    def play(self) -> None:
        first = next(iter(self.own.values()))[0][0]
        with on_device_of(first):
            tape = self._tape = _tape_of(self.program, self.kernel, self.call, self.given)
            if tape is None:
                self._play(self.add, self.compute)
                return
            bases = self._all_bases()
            if tape.complete:
                calls = itertools.count()
                addresses = [x.data_ptr() for x in bases]
                addresses.append(0)  # for what stays where it is

                def replay(what: Add | Compute) -> None:
                    tape.replay(next(calls), addresses)

                self._play(replay, replay)
                return
            self._bases = {id(x): number for number, x in enumerate(bases)}

            def recorded(function: Callable[[Any], None]) -> Callable[[Any], None]:
                def call(what: Any) -> None:
                    with tape.recording_call():
                        function(what)

                return call

            self._play(recorded(self.add), recorded(self.compute))
            tape.finish()

    def _messages(self, row: Sequence[tuple[int, int]]) -> list[Message]:
        views, view_of = self._views, self.view
        return [_new_message((peer, x)) for peer, view in row for x in views[view] or view_of(view)]

    def _play(self, add: Callable[[Add], None], compute: Callable[[Compute], None]) -> None:
        for moment in self.program.moments:
            handle = None
            if moment.moves:
                sends = [self._messages(row) for row in moment.sends]
                receives = [self._messages(row) for row in moment.receives]
                handle = self.comm.exchange(sends, receives)
            for merge in moment.adds:
                add(merge)
            for launch in moment.computes:
                for fresh in (*launch.query_fresh, *launch.key_fresh):
                    self.blank(fresh)
                compute(launch)
            if handle is not None:
                handle.wait()

    def mask(self, compute: Compute, device: torch.device) -> BlockMask:
        mask = self.plan.block_mask(compute.task, device)
        tape = recording()
        if tape is not None:
            tape.hold(mask.key_lo, mask.key_hi, mask.query_lo, mask.query_hi)
        return mask

    def blank(self, view: int) -> None:
        """Make a new accumulator one that can be carried."""
        raise NotImplementedError

    def add(self, add: Add) -> None:
        raise NotImplementedError

    def compute(self, compute: Compute) -> None:
        raise NotImplementedError


class _Forward(_Pass):
    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any):
        super().__init__(*args)
        self.given = (q, k, v)
        dtype = accumulator_dtype(q.dtype)
        batch, seqlen, nheads, _ = q.shape
        self.out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.lse = torch.empty(batch, nheads, seqlen, dtype=dtype, device=q.device)
        single = self.program.single
        out_acc = self.out if single else torch.empty(q.shape, dtype=dtype, device=q.device)
        self.own = {
            Kind.QUERY: ((q, 1),),
            Kind.KV: ((k, 1), (v, 1)),
            Kind.OUT: ((out_acc, 1), (self.lse, 2), (self.out, 1)),
        }
        self.like = self.own | {Kind.OUT: self.own[Kind.OUT][:2]}

    def blank(self, view: int) -> None:
        out_acc, lse, *_ = self.view(view)
        out_acc.zero_()
        lse.fill_(float("-inf"))

    def add(self, add: Add) -> None:
        out_acc, lse, out = self.view(add.own)
        part, lse_part = self.view(add.part)
        self.kernel.merge(lse, out_acc, lse_part, part, out if add.finish else None)

    def compute(self, compute: Compute) -> None:
        (q,) = self.view(compute.query)
        k, v = self.view(compute.key)
        result = self.view(compute.query_result)
        carry = compute.carry_query
        self.kernel.forward(
            q,
            k,
            v,
            result[1],
            result[0] if compute.keep or carry else None,
            result[2] if compute.finish else None,
            self.mask(compute, q.device),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry=carry,
            keep=compute.keep,
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
        self.given = (q, k, v, dout, lse, delta)
        dtype = accumulator_dtype(q.dtype)
        dq = torch.empty(q.shape, dtype=dtype, device=q.device)
        dtype_kv = k.dtype if self.program.keys_once else dtype
        dk, dv = (torch.empty(x.shape, dtype=dtype_kv, device=x.device) for x in (k, v))
        self.gradients = (dq, dk, dv)
        self.own = self.like = {
            Kind.QUERY: ((q, 1), (dout, 1), (lse, 2), (delta, 2)),
            Kind.KV: ((k, 1), (v, 1)),
            Kind.DQ: ((dq, 1),),
            Kind.DKV: ((dk, 1), (dv, 1)),
        }

    def blank(self, view: int) -> None:
        for x in self.view(view):
            x.zero_()

    def add(self, add: Add) -> None:
        for x, part in zip(self.view(add.own), self.view(add.part)):
            self.kernel.accumulate(x, part)

    def compute(self, compute: Compute) -> None:
        q, dout, lse, delta = self.view(compute.query)
        k, v = self.view(compute.key)
        (dq,) = self.view(compute.query_result)
        dk, dv = self.view(compute.key_result)
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
            self.mask(compute, q.device),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry_dq=compute.carry_query,
            carry_dkv=compute.carry_key,
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


def _describe(q: torch.Tensor, k: torch.Tensor, call: Call, kernel: Kernel | None) -> dict[str, object]:
    """What all ranks must agree on; that includes the kernel, whose accumulators may be in a form of its own."""
    own = {"q shape": tuple(q.shape), "k shape": tuple(k.shape), "dtype": q.dtype, "device": q.device.type}
    return own | vars(call) | {"chosen backend": kernel and kernel.name}


def _regular(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it if its head dimension is not contiguous or what copy engines cannot address: bases and
    strides that are no multiples of 16 bytes, or, as in an expanded tensor, strides of 0."""
    strides = x.stride()
    together = x.data_ptr()
    for stride, size in zip(strides[:-1], x.shape):
        if stride == 0 and size > 1:
            return x.contiguous()
        together |= stride * x.element_size()
    if strides[-1] == 1 and together % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def forward_pass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Communicator, kernel: Kernel, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Play the forward schedule on checked input: ``(out, lse)`` of the local ranks' shards."""
    q, k, v = (_regular(x) for x in (q, k, v))
    forward = _Forward(q, k, v, plan, False, comm, kernel, call)
    if q.numel():
        forward.play()
    return forward.out, forward.lse


def backward_pass(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    comm: Communicator,
    kernel: Kernel,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play the backward schedule: ``(dq, dk, dv)`` of the local ranks' shards, in the input dtype."""
    q, k, v, dout = (_regular(x) for x in (q, k, v, dout))
    delta = kernel.delta(out, dout)
    if dlse is not None:
        delta -= dlse  # d lse / d score = p, which enters dS = P (dP - delta) with the opposite sign of delta
    backward = _Backward(q, k, v, dout, lse, delta, plan, True, comm, kernel, call)
    if q.numel():
        backward.play()
    dq, dk, dv = backward.gradients
    grad = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernel.finish_dq(dq, grad, call.softmax_scale)
    return grad, dk.to(k.dtype), dv.to(v.dtype)


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
    kernel: Kernel | None = None
    try:
        plan, kernel = _prepare(q, k, v, comm, call)
    except ValueError as complaint:
        error = complaint
    if comm.world_size > 1 or error is not None:
        comm.agree(_describe(q, k, call, kernel), error)
    assert kernel is not None
    return forward_pass(q, k, v, plan, comm, kernel, call)


@attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors(q, k, v)
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
    return backward_pass(dout, dlse, q, k, v, out, lse, plan, comm, kernel, call)


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
