"""Batched point-to-point transfers of torch.distributed: NCCL on GPUs, gloo on CPUs.

NCCL runs them on a stream of its own, behind the work that was on the compute stream when they were posted; gloo on
threads of its own. Either way the transfers of step t + 1 are in flight while step t computes.

NCCL moves data with thread blocks, and a persistent kernel of attention that has every multiprocessor keeps them out
until it ends: seen in a trace, the transfers then stand between the steps instead of under them. So the compute stream
is held back by a few microseconds, until they have begun (:class:`_Ahead`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from .base import CommunicationError, Message
from .handshake import Handshake


class _Pending:
    """Works in flight and the messages they move, which keep the tensors alive: ``outgoing`` before ``incoming``, one
    work each or one for all; ``unpack`` are (strided target, contiguous buffer) pairs."""

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
        number = 0
        try:
            for number, work in enumerate(self.works):  # noqa: B007 (for the error)
                work.wait()
        except RuntimeError as cause:
            peers = {peer for peer, _ in (*self.outgoing, *self.incoming)}
            raise _failed(self.rank, peers, cause, self._transfer(number)) from cause
        for target, buffer in self.unpack:
            target.copy_(buffer)
        self.works, self.outgoing, self.incoming, self.unpack = [], [], [], []

    def _transfer(self, number: int) -> str:
        """In words, what a work moves."""
        sends = len(self.outgoing)
        if len(self.works) != sends + len(self.incoming):
            return ""
        peer, tensor = (*self.outgoing, *self.incoming)[number]
        direction = "sending to" if number < sends else "receiving from"
        return f" {direction} rank {peer} ({tensor.numel() * tensor.element_size()} bytes)"


class P2P:
    """A process group's ranks, one of them here."""

    name = "p2p"

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.local_ranks: tuple[int, ...] = (self.rank,)
        try:
            self.backend = group._get_backend(torch.device(device.type))
        except RuntimeError as cause:
            raise ValueError(
                f"expected a group with a backend for {device.type} tensors, got {dist.get_backend(group)!r}"
            ) from cause
        if device.type == "cuda" and self.backend.name() == "gloo":
            raise ValueError("expected an NCCL group for CUDA tensors, got gloo, which cannot send them peer to peer")
        options = getattr(self.backend, "options", None)
        self.timeout: timedelta = getattr(options, "_timeout", None) or timedelta(minutes=30)
        # As in dist.batch_isend_irecv, whose objects and checks per message cost more than the calls below it.
        self._coalesces = type(group) is dist.ProcessGroup and self.backend.supports_coalescing
        self._ahead = _Ahead(device) if device.type == "cuda" else None
        self._handshake = Handshake(
            dist.distributed_c10d._get_default_store(),
            group.group_name,
            self.rank,
            self.world_size,
            self.timeout,
            every_call=device.type == "cpu",
        )
        self._connected = device.type == "cpu"

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        if self._handshake.agree(fields, error) and not self._connected:
            # NCCL connects a group at its first operation, in which all ranks must take part; in a window's schedule
            # some ranks may have nothing to send.
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
            self._connected = True

    def exchange(self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]]) -> _Pending:
        unpack = []
        outgoing = [(peer, tensor.contiguous()) for peer, tensor in sends[0]]
        incoming = []
        for peer, tensor in receives[0]:
            buffer = tensor
            if not tensor.is_contiguous():
                buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                unpack.append((tensor, buffer))
            incoming.append((peer, buffer))
        peers = {peer for peer, _ in (*outgoing, *incoming)}
        try:
            works = self._post(outgoing, incoming) if peers else []
        except RuntimeError as cause:
            raise _failed(self.rank, peers, cause) from cause
        return _Pending(self.rank, works, outgoing, incoming, unpack)

    def _post(
        self, outgoing: Sequence[tuple[int, torch.Tensor]], incoming: Sequence[tuple[int, torch.Tensor]]
    ) -> list[dist.Work]:
        """Tags count the messages between two ranks, so that gloo matches them in order whatever its threads do."""
        works, group = [], self.group
        if self._coalesces:
            group._start_coalescing(self.device)
        for post, messages in ((group.send, outgoing), (group.recv, incoming)):
            counts: dict[int, int] = {}
            for peer, tensor in messages:
                tag = counts.get(peer, 0)
                counts[peer] = tag + 1
                works.append(post([tensor], peer, tag))
        if self._coalesces:
            works = [group._end_coalescing(self.device)]  # one work for all
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


def _failed(rank: int, peers: set[int], cause: Exception, transfer: str = "") -> CommunicationError:
    return CommunicationError(f"rank {rank}: exchange with ranks {sorted(peers)} failed{transfer}: {cause}")
