"""Batched point-to-point transfers of torch.distributed: NCCL on GPUs, gloo on CPUs.

NCCL runs them on a stream of its own, behind the work that was on the compute stream when they were posted; gloo on
threads of its own. Either way the transfers of step t + 1 are in flight while step t computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from .base import CommunicationError, Message
from .handshake import Handshake


class _Pending:
    """Works in flight and the tensors they use; ``unpack`` are (strided target, contiguous buffer) pairs."""

    def __init__(
        self,
        rank: int,
        peers: list[int],
        works: list[dist.Work],
        tensors: list[torch.Tensor],
        unpack: list[tuple[torch.Tensor, torch.Tensor]],
    ):
        self.rank, self.peers, self.works, self.tensors, self.unpack = rank, peers, works, tensors, unpack

    def wait(self) -> None:
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as cause:
            raise CommunicationError(f"rank {self.rank}: exchange with ranks {self.peers} failed: {cause}") from cause
        for target, buffer in self.unpack:
            target.copy_(buffer)
        self.works, self.tensors, self.unpack = [], [], []


class P2P:
    """A process group's ranks, one of them here."""

    name = "p2p"

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.local_ranks: tuple[int, ...] = (self.rank,)
        self._peers = [dist.get_global_rank(group, rank) for rank in range(self.world_size)]
        try:
            self.backend = group._get_backend(torch.device(device.type))
        except RuntimeError as cause:
            raise ValueError(
                f"expected a group with a backend for {device.type} tensors, got {dist.get_backend(group)!r}"
            ) from cause
        if device.type == "cuda" and self.backend.name() == "gloo":
            raise ValueError("expected an NCCL group for CUDA tensors, got gloo, which cannot send them peer to peer")
        options = getattr(self.backend, "options", None)
        timeout = getattr(options, "_timeout", None) or timedelta(minutes=30)
        self._handshake = Handshake(
            dist.distributed_c10d._get_default_store(),
            group.group_name,
            self.rank,
            self.world_size,
            timeout,
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
        operations, peers, unpack = [], [], []
        for peer, tensor in sends[0]:
            operations.append(dist.P2POp(dist.isend, tensor.contiguous(), self._peers[peer], self.group))
            peers.append(peer)
        for peer, tensor in receives[0]:
            buffer = tensor
            if not tensor.is_contiguous():
                buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                unpack.append((tensor, buffer))
            operations.append(dist.P2POp(dist.irecv, buffer, self._peers[peer], self.group))
            peers.append(peer)
        _number_messages(operations)
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as cause:
            raise CommunicationError(f"rank {self.rank}: exchange with ranks {peers} failed: {cause}") from cause
        return _Pending(self.rank, sorted(set(peers)), works, [op.tensor for op in operations], unpack)


def _number_messages(operations: list[dist.P2POp]) -> None:
    """Tags count the messages between two ranks, so that gloo matches them in order whatever its threads do."""
    counts: dict[tuple[object, int], int] = {}
    for operation in operations:
        key = (operation.op, operation.peer)
        operation.tag = counts[key] = counts.get(key, -1) + 1
