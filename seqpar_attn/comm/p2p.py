"""Batched point-to-point transfers of torch.distributed: NCCL on GPUs, gloo on CPUs.

NCCL runs them on a stream of its own, behind the work that was on the compute stream when they were posted; gloo on
threads of its own. Either way the transfers of step t + 1 are in flight while step t computes.

NCCL moves data with thread blocks, and a persistent kernel of attention that has every multiprocessor keeps them out
until it ends: seen in a trace, the transfers then stand between the steps instead of under them. So the compute stream
is held back by a few microseconds, until they have begun (:class:`_Ahead`), and NCCL's stream is one of high priority,
which lets its blocks in as soon as any block of attention ends (docs/communication.md).

So transfers have a communicator of their own, not the group's, where they would also queue up behind the collectives of
others. NCCL's transfers of one communicator follow each other on one stream. Slow ones, which are in flight for several
steps, have another one, lest those of the next step wait for them; gloo only gives them other tags.
"""

from __future__ import annotations

import atexit
import itertools
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .base import CommunicationError, Message
from .handshake import Handshake


class _Pending:
    """Works in flight and their messages; ``unpack`` are (strided target, contiguous buffer) pairs."""

    def __init__(
        self,
        rank: int,
        works: list[dist.Work],
        outgoing: list[Message],
        incoming: list[Message],
        unpack: list[tuple[torch.Tensor, torch.Tensor]],
    ):
        self.rank, self.works, self.outgoing, self.incoming, self.unpack = rank, works, outgoing, incoming, unpack

    def wait(self) -> None:
        done = 0
        try:
            for work in self.works:
                work.wait()
                done += 1
        except RuntimeError as cause:
            # Works are in the order of their messages, unless there is one for all of them.
            number = done if len(self.works) == len(self.outgoing) + len(self.incoming) else None
            raise _failed(self.rank, self.outgoing, self.incoming, cause, number) from cause
        for target, buffer in self.unpack:
            target.copy_(buffer)
        self.works, self.outgoing, self.incoming, self.unpack = [], [], [], []


_SLOW_TAGS = 1 << 20
"""More than there are messages between two ranks in a step."""

_own: WeakKeyDictionary[dist.ProcessGroup, dict[bool, Any]] = WeakKeyDictionary()
"""NCCL's communicators for exchanges that are not slow, and slow. They go with their groups, whose stores they hold."""


@atexit.register
def _abort_all() -> None:
    """Else torch warns of groups that were not destroyed, of which nobody knows."""
    for known in list(_own.values()):
        for communicator in known.values():
            communicator.abort()


def timeout_of(backend: Any) -> timedelta:
    return getattr(getattr(backend, "options", None), "_timeout", None) or timedelta(minutes=30)


class P2P:
    """A process group's ranks, one of them here."""

    name = "p2p"
    arena = None

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        # Nothing here may keep a group or its store alive: who destroys a group to make it again needs its sockets and
        # its store to go with it (a store that is made again where one still lives is the old one, old keys included).
        self._group, self.device = weakref.ref(group), device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.local_ranks: tuple[int, ...] = (self.rank,)
        try:
            backend = group._get_backend(torch.device(device.type))
        except RuntimeError as cause:
            raise ValueError(
                f"expected a group with a backend for {device.type} tensors, got {dist.get_backend(group)!r}"
            ) from cause
        self.staged = device.type == "cuda" and backend.name() == "gloo"
        """Messages go through host memory, for which the host waits, because gloo cannot send CUDA tensors peer to
        peer: right for a few small ones (see :mod:`.transports`)."""
        self.timeout = timeout_of(backend)
        # As in dist.batch_isend_irecv, whose objects and checks per message cost more than the calls below it.
        self._coalesces = type(group) is dist.ProcessGroup and backend.supports_coalescing
        self._ahead = _Ahead(device) if device.type == "cuda" and not self.staged else None
        self.handshake = Handshake(
            dist.distributed_c10d._get_default_store(),
            group.group_name,
            self.rank,
            self.world_size,
            self.timeout,
            every_call=device.type == "cpu",
        )
        self._calls = itertools.count()
        self._connected = device.type == "cpu" or self.staged

    def open(self, slow: bool) -> None:
        """NCCL connects ranks at the first operation, in which all of them must take part; in a window's schedule some
        may have nothing to send."""
        if self.world_size == 1:
            return
        if not self._coalesces:
            if not self._connected:
                dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
                self._connected = True
            return
        group = self.group
        assert group is not None
        known = _own.setdefault(group, {})
        for which, name in ((False, "transfers"), (True, "slow transfers"))[: 1 + slow]:
            if which not in known:
                known[which] = self._communicator(group, name)

    def _communicator(self, group: dist.ProcessGroup, name: str) -> Any:
        """Another one of the group's ranks; all of them call it. Not by new_group, for which ranks outside of the group
        would have to come, too."""
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout
        options.group_name = f"{group.group_name}/{name}"
        options.is_high_priority_stream = True
        store = dist.PrefixStore(self.handshake.unique(name), dist.distributed_c10d._get_default_store())
        made: Any = dist.ProcessGroupNCCL(store, self.rank, self.world_size, options)
        made.allreduce([torch.zeros(1, device=self.device)]).wait()
        # As destroy_process_group does with the group itself; at the end of the process see _abort_all.
        weakref.finalize(group, made.shutdown).atexit = False
        return made

    @property
    def group(self) -> dist.ProcessGroup | None:
        """None once it has been destroyed."""
        return self._group()

    def count_call(self) -> int:
        return next(self._calls)

    def give_way(self, why: str) -> bool:
        return False

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        self.handshake.agree(fields, error)

    def exchange(
        self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]], *, slow: bool = False
    ) -> _Pending:
        unpack = []
        outgoing = [(peer, tensor.contiguous()) for peer, tensor in sends[0]]
        if self.staged:
            outgoing = [(peer, tensor.cpu()) for peer, tensor in outgoing]
        incoming = []
        for peer, tensor in receives[0]:
            buffer = tensor
            if self.staged or not tensor.is_contiguous():
                there = "cpu" if self.staged else self.device
                buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format, device=there)
                unpack.append((tensor, buffer))
            incoming.append((peer, buffer))
        works: list[dist.Work] = []
        try:
            if outgoing or incoming:
                works = self._post(outgoing, incoming, works, slow)
        except RuntimeError as cause:
            number = None if self._coalesces else len(works)
            raise _failed(self.rank, outgoing, incoming, cause, number) from cause
        return _Pending(self.rank, works, outgoing, incoming, unpack)

    def _post(
        self, outgoing: Sequence[Message], incoming: Sequence[Message], works: list[dist.Work], slow: bool
    ) -> list[dist.Work]:
        """``works`` has what was posted even after an error. Tags count the messages between two ranks, so that gloo
        matches them in order whatever its threads do."""
        group = self.group
        assert group is not None
        way: Any = _own[group][slow] if self._coalesces else group
        first_tag = _SLOW_TAGS if slow else 0
        if self._coalesces:
            way._start_coalescing()
        for post, messages in ((way.send, outgoing), (way.recv, incoming)):
            counts: dict[int, int] = {}
            for peer, tensor in messages:
                tag = counts.get(peer, first_tag)
                counts[peer] = tag + 1
                works.append(post([tensor], peer, tag))
        if self._coalesces:
            works = [way._end_coalescing()]  # one work for all
        if self._ahead is not None:
            self._ahead()
        return works


class _Ahead:
    """Lets what other streams have begun to wait for begin before what comes next on the current one.

    Whatever waits for the current stream's present starts one event later than it; what comes next on it, two.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.reached, self.passed = torch.cuda.Event(), torch.cuda.Event()

    def __call__(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.reached.record(current)
        self.stream.wait_event(self.reached)
        self.passed.record(self.stream)
        current.wait_event(self.passed)


def _failed(
    rank: int, outgoing: list[Message], incoming: list[Message], cause: Exception, number: int | None = None
) -> CommunicationError:
    """``number``: which message failed, those that go out first."""
    where = ""
    if number is not None:
        peer, tensor = (*outgoing, *incoming)[number]
        what = "send to" if number < len(outgoing) else "receive from"
        where = f" in {what} rank {peer} of {tensor.nbytes} bytes"
    peers = sorted({peer for peer, _ in (*outgoing, *incoming)})
    return CommunicationError(f"rank {rank}: exchange with ranks {peers} failed{where}: {cause}")
