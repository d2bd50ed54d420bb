"""All ranks of a group in one process, on the CPU or one GPU: for tests, profiling and virtual ranks."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .base import Message


@dataclass(frozen=True)
class LoopbackGroup:
    """``world_size`` virtual ranks in this process.

    Tensors given with this group hold the shards of all ranks one after the other along the sequence dimension.
    """

    world_size: int
    is_loopback = True

    def __post_init__(self) -> None:
        if not isinstance(self.world_size, int) or self.world_size < 1:
            raise ValueError(f"expected world_size to be a positive int, got {self.world_size!r}")


class _Done:
    def wait(self) -> None:
        pass


class _Event:
    """Transfers on a side stream; holds the tensors until the compute stream is ordered behind them."""

    def __init__(self, device: torch.device, event: torch.cuda.Event, tensors: list[torch.Tensor]):
        self.device, self.event, self.tensors = device, event, tensors

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)
        self.tensors = []


class Loopback:
    """Copies between virtual ranks, on a side stream for CUDA tensors so that they overlap as real transfers do."""

    name = "loopback"
    arena = None

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.local_ranks = tuple(range(world_size))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def exchange(
        self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]], *, slow: bool = False
    ) -> _Done | _Event:
        sent: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
        for rank, messages in enumerate(sends):
            for peer, tensor in messages:
                sent[rank, peer].append(tensor)
        copies = [
            (tensor, sent[peer, rank].popleft()) for rank, messages in enumerate(receives) for peer, tensor in messages
        ]
        assert not any(sent.values()), "a message was sent that nobody receives"
        if not copies or not copies[0][0].is_cuda:
            for tensor, source in copies:
                tensor.copy_(source)
            return _Done()
        device = copies[0][0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for tensor, source in copies:
                tensor.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return _Event(device, event, [tensor for pair in copies for tensor in pair])

    def count_call(self) -> None:
        """Virtual ranks cannot be in different calls."""

    def give_way(self, why: str) -> bool:
        return False

    def open(self, slow: bool) -> None:
        pass

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        if error is not None:
            raise error
