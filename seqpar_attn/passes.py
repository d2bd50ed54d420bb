"""Plays schedules. A pass is made once per schedule, kernel and geometry, and played again and again.

Between two passes over a schedule with inputs of the same shapes and strides nothing changes but addresses. So a pass
keeps the views of what is its own (:mod:`.pieces`), the messages that name them, and what the kernel launched, if it
says so (:mod:`.kernels.tape`). What is left per step is to post messages and to launch.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch

from .comm import Arena, CommunicationError, Communicator, Handle, Message, Shape, in_turn
from .kernels.base import BlockMask, Kernel, accumulator_dtype
from .kernels.device import on_device_of
from .kernels.tape import Tape, recording
from .pieces import Field, Pieces, Tensors, joined
from .plan import Plan
from .program import Add, Compute, Exchange, Moment, Program
from .schedule import Kind
from .validation import Call

Rows = Sequence[Sequence[tuple[int, int]]]
"""Per local rank its messages: (peer, view)."""

_Prepared = tuple[Exchange, list[list[Message]] | None, list[list[Message]] | None, dict[str, Any]]
"""An exchange, its messages where they are the same in every pass, and what else the communicator is told."""

Reserve = Callable[[int], torch.Tensor] | None
"""Bytes for slots, if they must lie in memory of the communicator's."""

_BLANK = {Kind.OUT: (0.0, float("-inf")), Kind.DQ: (0.0,), Kind.DKV: (0.0, 0.0)}
"""What makes a new accumulator one that can be carried, per field."""


class Pass:
    """One pass over a schedule for the ranks of this process; played by one thread at a time.

    If playing fails it must not be played again: transfers may still use its memory. Where the communicator writes into
    peers' slots (its ``arena``), these lie in memory of its own.
    """

    def __init__(self, plan: Plan, program: Program, kernel: Kernel, call: Call, pieces: Pieces):
        self.plan, self.program, self.kernel, self.call, self.pieces = plan, program, kernel, call, pieces
        self._tape = Tape() if kernel.recordable else None
        self._addresses: list[int] = []
        foreign = set(pieces.foreign)
        self._moments = [
            (number, moment, [self._prepared(number, exchange, foreign) for exchange in moment.exchanges])
            for number, moment in enumerate(program.moments)
        ]
        self._last_query_work = max(
            (
                number
                for number, moment in enumerate(program.moments)
                if moment.computes or any(add.kind is not Kind.DKV for add in moment.adds)
            ),
            default=len(program.moments) - 1,
        )
        exchanges = [exchange for moment in program.moments for exchange in moment.exchanges]
        used = {view for x in exchanges for row in (*x.sends, *x.receives) for _, view in row}
        self._posted = sorted(used & foreign)

    def _prepared(self, number: int, exchange: Exchange, foreign: set[int]) -> _Prepared:
        more: dict[str, Any] = {}
        if exchange.targets:
            more |= {"targets": self._messages(exchange.targets), "where": self._where(number)}
        if exchange.slow:
            more["slow"] = True
        sends, receives = (self._same_messages(rows, foreign) for rows in (exchange.sends, exchange.receives))
        return exchange, sends, receives, more

    def _same_messages(self, rows: Rows, foreign: set[int]) -> list[list[Message]] | None:
        """Messages that are the same in every pass; None if they are not."""
        return None if any(view in foreign for row in rows for _, view in row) else self._messages(rows)

    def _messages(self, rows: Rows) -> list[list[Message]]:
        views = self.pieces.views
        return [[(peer, x) for peer, view in row for x in cast(Tensors, views[view])] for row in rows]

    def _where(self, number: int) -> str:
        name = "backward" if self.program.schedule.backward else "forward"
        return f"step {number + 1} of {len(self.program.moments)} of the {name} pass"

    def begin(self, given: Tensors) -> list[torch.Tensor]:
        """What is returned, not filled yet."""
        if self._tape is None:
            return self.pieces.begin(given)
        if not self._tape.complete:
            given = [x.detach() for x in given]  # which is which, even if one tensor is given twice
        returned = self.pieces.begin(given)
        self._addresses = self.pieces.addresses()
        return returned

    def run(self, comm: Communicator, call: int | None = None) -> None:
        """All moments. ``call``: for a backward pass, the number of its forward call, where peers can be told."""
        told: dict[str, Any] = {} if call is None or comm.arena is None else {"call": call}
        for view in self._posted:
            self.pieces.view(view)
        moving: dict[int, list[Handle]] = defaultdict(list)
        try:
            for number, moment, exchanges in self._moments:
                for exchange, sends, receives, more in exchanges:
                    handle = comm.exchange(
                        self._messages(exchange.sends) if sends is None else sends,
                        self._messages(exchange.receives) if receives is None else receives,
                        **more,
                        **told,
                    )
                    moving[exchange.end].append(handle)
                self.launch(number, self._work, moment)
                if number == self._last_query_work:
                    self.queries_done()
                for handle in moving.pop(number, ()):  # in the order in which they were posted, on every rank
                    handle.wait()
        except CommunicationError as error:
            raise CommunicationError(f"{self._where(number)}: {error}") from error

    def end(self) -> None:
        if self._tape is not None:
            self._tape.finish()
        self.pieces.end()

    def launch(self, part: Hashable, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` or, if the tape knows what it launches, launch that."""
        tape = self._tape
        if tape is None:
            function(*arguments)
        elif not tape.complete:
            with tape.recording(part):
                function(*arguments)
        elif not tape.replay(part, self._addresses):
            function(*arguments)

    def _work(self, moment: Moment) -> None:
        for add in moment.adds:
            self.add(add)
        for compute in moment.computes:
            for fresh in (*compute.query_fresh, *compute.key_fresh):
                self._blank(fresh)
            self.compute(compute)

    def _blank(self, index: int) -> None:
        """Make a new accumulator one that can be carried."""
        pieces, values = self.pieces, _BLANK[self.program.views[index].kind]

        def blank(_: Sequence[int]) -> None:
            for x, value in zip(pieces.view(index), values):
                x.fill_(value) if value else x.zero_()

        blank(())
        tape = recording()
        if tape is not None:
            tape.append(blank)

    def view(self, index: int, join: bool = False) -> Tensors:
        """For the kernel; ``join``: its fields as one tensor."""
        tensors = self.pieces.view(index)
        if join:
            tensors = [joined(tensors)]
        tape = recording()
        if tape is not None:
            self.pieces.locate(index, tensors, tape)
        return tensors

    def mask(self, compute: Compute) -> BlockMask:
        mask = self.plan.block_mask(compute.task, self.pieces.device)
        tape = recording()
        if tape is not None:
            tape.hold(mask.key_lo, mask.key_hi, mask.query_lo, mask.query_hi)
        return mask

    def queries_done(self) -> None:
        """Launch what is left to do for the own queries; what is in flight for the keys hides it."""

    def add(self, add: Add) -> None:
        raise NotImplementedError

    def compute(self, compute: Compute) -> None:
        raise NotImplementedError


class Forward(Pass):
    """Tensors: q, k, v; out, lse; the accumulator of out, unless it is finished by one launch."""

    def __init__(
        self, plan: Plan, program: Program, kernel: Kernel, call: Call, given: Tensors, reserve: Reserve = None
    ):
        q = given[0]
        batch, seqlen, nheads, _ = q.shape
        dtype = accumulator_dtype(q.dtype)
        scratch: list[Shape] = [] if program.single else [(q.shape, dtype)]
        acc, lse, out = Field(3 if program.single else 5, 1), Field(4, 2), Field(3, 1)
        own = {Kind.QUERY: (Field(0, 1),), Kind.KV: (Field(1, 1), Field(2, 1)), Kind.OUT: (acc, lse, out)}
        returned: list[Shape] = [(q.shape, q.dtype), ((batch, nheads, seqlen), dtype)]
        pieces = Pieces(program, given, returned, scratch, own, own | {Kind.OUT: (acc, lse)}, reserve)
        super().__init__(plan, program, kernel, call, pieces)

    def play(self, comm: Communicator, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)`` of ``q, k, v``."""
        with on_device_of(given[0]):
            out, lse = self.begin(given)
            self.run(comm)
            self.end()
        return out, lse

    def add(self, add: Add) -> None:
        out_acc, lse, out = self.view(add.into)
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
            self.mask(compute),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry=carry,
            keep=compute.keep,
        )


class Backward(Pass):
    """Tensors: q, k, v, dout, lse, out; the gradient of q; dk and dv or their accumulators; that of dq; delta.

    ``out`` may be ``rowsum(dout * out): [batch, nheads, seqlen]`` in the accumulator dtype instead, of who needs the
    memory of ``out``; nothing else is made of it."""

    def __init__(
        self,
        plan: Plan,
        program: Program,
        kernel: Kernel,
        call: Call,
        given: Tensors,
        wide_keys: bool,
        reserve: Reserve = None,
    ):
        q, k, v, *_ = given
        dtype = accumulator_dtype(q.dtype)
        self._round = not wide_keys and not program.keys_once and dtype != k.dtype
        """Whether dk and dv are accumulators that are rounded at the end."""
        keys: list[Shape] = [(x.shape, dtype if self._round or wide_keys else k.dtype) for x in (k, v)]
        returned: list[Shape] = [(q.shape, q.dtype), *([] if self._round else keys)]
        batch, seqlen, nheads, _ = q.shape
        scratch: list[Shape] = [*(keys if self._round else []), (q.shape, dtype), ((batch, nheads, seqlen), dtype)]
        own = {
            Kind.QUERY: (Field(0, 1), Field(3, 1), Field(4, 2), Field(10, 2)),
            Kind.KV: (Field(1, 1), Field(2, 1)),
            Kind.DQ: (Field(9, 1),),
            Kind.DKV: (Field(7, 1), Field(8, 1)),
        }
        super().__init__(plan, program, kernel, call, Pieces(program, given, returned, scratch, own, own, reserve))

    def play(
        self, comm: Communicator, dlse: torch.Tensor | None, number: int | None, *given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(dq, dk, dv)`` of ``q, k, v, dout, lse, out``, in the input dtype (wide keys: accumulators)."""
        with on_device_of(given[0]):
            self.begin(given)
            grad, dk, dv, _, delta = self.pieces.tensors[6:]
            if given[5].ndim == 3:
                delta.copy_(given[5])
            else:
                self.launch("delta", self._delta)
            if dlse is not None:
                delta -= dlse  # d lse / d score = p, which enters dS = P (dP - delta) with the opposite sign of delta
            self.run(comm, number)
            if self._round:
                dk, dv = dk.to(given[1].dtype), dv.to(given[2].dtype)
            self.end()
        return grad, dk, dv

    def _whole(self, *numbers: int) -> Tensors:
        """Tensors by their numbers, for the kernel."""
        tensors, tape = [self.pieces.tensors[number] for number in numbers], recording()
        if tape is not None:
            for x, number in zip(tensors, numbers):
                tape.locate(x, number, x)
        return tensors

    def _delta(self) -> None:
        out, dout, delta = self._whole(5, 3, 10)
        self.kernel.delta(out, dout, into=delta)

    def queries_done(self) -> None:
        self.launch("finish", self._finish)

    def _finish(self) -> None:
        dq, grad = self._whole(9, 6)
        self.kernel.finish_dq(dq, grad, self.call.softmax_scale)

    def add(self, add: Add) -> None:
        # One launch for dk and dv where they lie next to each other.
        join = self._round and add.kind is Kind.DKV
        for x, part in zip(self.view(add.into, join), self.view(add.part, join)):
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
            self.mask(compute),
            softmax_scale=self.call.softmax_scale,
            softcap=self.call.softcap,
            carry_dq=compute.carry_query,
            carry_dkv=compute.carry_key,
            deterministic=self.call.deterministic,
        )


_GEOMETRIES = 256
"""For how many passes are kept, of all programs together. A pass holds host memory for every view of its program, some
100 KiB: were it so many per program, a process whose batches change would pile up hundreds of MiB."""
_kept: deque[tuple[weakref.ref[Program], Hashable]] = deque()
"""The programs of these passes, and their keys there, the oldest first."""


def _key(kernel: Kernel, call: Call, given: Tensors, arena: Arena | None, wide_keys: bool) -> Hashable:
    """All that a pass depends on besides its program."""
    key: list[Any] = [kernel, call.softmax_scale, call.softcap, call.deterministic, given[0].device, given[0].dtype]
    key += [wide_keys, arena and arena.generation]
    together = 0
    for x in given:
        key += (x.shape, x.stride())
        together |= x.data_ptr()
    if together % 16:  # mostly all are aligned, and then there is nothing to add
        key += [x.data_ptr() % 16 for x in given]
    return tuple(key)


def _shelf(
    program: Program, kernel: Kernel, call: Call, given: Tensors, arena: Arena | None, wide_keys: bool = False
) -> tuple[list[Any], Tensors]:
    """Where such passes wait to be played, and ``given`` as they need it."""
    shelf = program.passes.get(_key(kernel, call, given, arena, wide_keys))
    if shelf is None:
        given = [_regular(x) if x.ndim == 4 else x for x in given]  # lse, of three dimensions, is our own
        key = _key(kernel, call, given, arena, wide_keys)
        shelf = program.passes.get(key)
        if shelf is None:
            shelf = program.passes.setdefault(key, [])
            _kept.append((weakref.ref(program), key))
            if len(_kept) > _GEOMETRIES:
                _forget_oldest()
    return shelf, given


def _forget_oldest() -> None:
    """If it is still in use it is made again: once in so many new ones, which costs less than to keep them in order."""
    reference, key = _kept.popleft()
    program = reference()
    if program is not None:  # plans are forgotten with all their passes
        program.passes.pop(key, None)


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
    """The forward schedule on checked input: ``(out, lse)`` of the local ranks' shards."""
    if not q.numel():
        batch, seqlen, nheads, _ = q.shape
        lse = torch.empty(batch, nheads, seqlen, dtype=accumulator_dtype(q.dtype), device=q.device)
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse

    def play(arena: Arena | None) -> tuple[torch.Tensor, torch.Tensor]:
        program = plan.program(False, comm.local_ranks, arena is not None)
        comm.open(program.slow)
        shelf, given = _shelf(program, kernel, call, (q, k, v), arena)
        try:
            played: Forward = shelf.pop()
        except IndexError:  # none yet, or other threads are at them
            played = Forward(plan, program, kernel, call, given, None if arena is None else arena.reserve)
        result = played.play(comm, *given)
        shelf.append(played)
        return result

    return in_turn(comm, play)


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
    *,
    wide_keys: bool = False,
    number: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward schedule: ``(dq, dk, dv)`` of the local ranks' shards, in the input dtype; with ``wide_keys``, dk
    and dv in the accumulator dtype, for who adds something to them. ``out``: that, or ``rowsum(dout * out)`` as
    ``[batch, nheads, seqlen]`` in the accumulator dtype. ``number``: of the forward call, in the group of ``comm``."""
    if not q.numel():
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return dq, dk, dv

    def play(arena: Arena | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        program = plan.program(True, comm.local_ranks, arena is not None)
        comm.open(program.slow)
        shelf, given = _shelf(program, kernel, call, (q, k, v, dout, lse, out), arena, wide_keys)
        try:
            played: Backward = shelf.pop()
        except IndexError:
            played = Backward(plan, program, kernel, call, given, wide_keys, None if arena is None else arena.reserve)
        result = played.play(comm, dlse, number, *given)
        shelf.append(played)
        return result

    return in_turn(comm, play)
