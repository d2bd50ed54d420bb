"""One rank of W on one GPU: the real kernels, accumulators and buffers of a rank; transfers are stand-ins."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch

from seqpar_attn import kernels
from seqpar_attn.comm.base import Message
from seqpar_attn.mask import Mask
from seqpar_attn.passes import backward_pass, forward_pass
from seqpar_attn.plan import make_plan
from seqpar_attn.schedule import Kind
from seqpar_attn.testing.still import Still
from seqpar_attn.validation import Call

HEAD_START_CYCLES = 10_000_000  # about 5 ms


@functools.cache
def _source(shape: torch.Size, dtype: torch.dtype, device: int) -> torch.Tensor:
    """Random data of this shape, the same for every rank and step."""
    data = torch.randn(shape, device=torch.device("cuda", device)).to(dtype)
    torch.cuda.synchronize(device)
    return data


@functools.cache
def _sink(shape: torch.Size, dtype: torch.dtype, device: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=torch.device("cuda", device))


class _Copied:
    def __init__(self, rank: OneRank, event: torch.cuda.Event):
        self.rank, self.event = rank, event

    def wait(self) -> None:
        start = time.perf_counter()
        torch.cuda.current_stream().wait_event(self.event)
        self.rank.host_seconds += time.perf_counter() - start


class OneRank(Still):
    """Stands in for a group: what would come from a peer is copied from a buffer, on a side stream.

    ``transfers`` "device": copies inside this GPU's memory. They read and write as much of it as a rank that receives
    over a link and is read from at the same time, only faster than any link; but they are kernels. "peer": what is
    received comes from the memory of a second GPU, and what is sent goes there, over the link between the two and by
    copy engines. "none": nothing is copied. Records where steps begin.
    """

    name = "one rank (simulated transfers)"

    def __init__(self, world_size: int, rank: int, transfers: str):
        super().__init__(world_size, (rank,))
        self.transfers = transfers
        self.stream, self.outward = torch.cuda.Stream(), torch.cuda.Stream()
        # A copy between GPUs is ordered by the current streams of both; one more, so that the directions do not wait
        # for each other there.
        self.outward_there = torch.cuda.Stream(torch.cuda.current_device() + 1) if transfers == "peer" else None
        self.begins: list[torch.cuda.Event] = []
        self.host_seconds = 0.0
        """Host time spent in here, which is not that of the package."""

    def exchange(
        self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]], *, slow: bool = False
    ) -> _Copied:
        start = time.perf_counter()
        handle = self._exchange(sends, receives)
        self.host_seconds += time.perf_counter() - start
        return handle

    def _exchange(self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]]) -> _Copied:
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        self.begins.append(begin)
        self.stream.wait_stream(torch.cuda.current_stream())
        other = torch.cuda.current_device() + (self.transfers == "peer")
        messages = receives[0] if self.transfers != "none" else []
        sources = [_source(tensor.shape, tensor.dtype, other) for _, tensor in messages]
        if self.transfers == "peer":
            self.outward.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.outward_there), torch.cuda.stream(self.outward):
                for _, tensor in sends[0]:
                    _sink(tensor.shape, tensor.dtype, other).copy_(tensor, non_blocking=True)
                sent = self.outward.record_event()
        with torch.cuda.stream(self.stream):
            for (_, tensor), source in zip(messages, sources):
                tensor.copy_(source, non_blocking=True)
            if self.transfers == "peer":
                self.stream.wait_event(sent)
            event = torch.cuda.Event()
            event.record()
        return _Copied(self, event)


@dataclass
class Times:
    """Milliseconds of one direction, one value per round; ``steps[i]`` per step of the schedule, medians later."""

    total: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)


class Share:
    """A rank's attention, forward and backward, on its shard of ``tokens``; rank 0 of 1 is the single-device call."""

    def __init__(
        self,
        method: str,
        layout: str,
        world_size: int,
        rank: int,
        tokens: int,
        heads: tuple[int, int, int],
        transfers: str = "device",
        backend: str = "auto",
    ):
        """``heads``: of the queries, of the keys, and their dimension."""
        nheads, nheads_kv, headdim = heads
        self.call = Call(method, "pull", layout, True, None, None, None, headdim**-0.5, backend, False)
        self.plan = make_plan(method, "pull", layout, world_size, Mask(tokens * world_size))
        self.comm = OneRank(world_size, rank, transfers)
        device = torch.device("cuda", torch.cuda.current_device())
        self.kernel = kernels.resolve(backend, device, torch.bfloat16, headdim, self.plan.kinds, None, False)
        self.shapes = [(1, tokens, n, headdim) for n in (nheads, nheads_kv, nheads_kv, nheads)]
        self.times = {"forward": Times(), "backward": Times()}
        self.attended = {
            name: sum(task.area for row in schedule.steps for task in row[rank].tasks)
            for name, schedule in (("forward", self.plan.forward), ("backward", self.plan.backward))
        }

    def _passes(self, pool: torch.Tensor) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """The forward, and the backward of its result, on inputs cut out of ``pool``."""
        offset, tensors = 0, []
        for shape in self.shapes:
            size = torch.Size(shape).numel()
            tensors.append(pool[offset : offset + size].view(shape))
            offset += size
        q, k, v, dout = tensors
        rest = (self.plan, self.comm, self.kernel, self.call)
        return (
            lambda: forward_pass(q, k, v, *rest),
            lambda result: backward_pass(dout, None, q, k, v, *result, *rest),
        )

    def run(self, pool: torch.Tensor, keep: bool) -> None:
        """One forward and one backward, timed into ``times`` if ``keep``."""
        forward, backward = self._passes(pool)
        result = self._timed("forward", keep, forward)
        self._timed("backward", keep, lambda: backward(result))

    def host(self, pool: torch.Tensor, passes: int) -> dict[str, float]:
        """Host milliseconds of a forward and of a backward, medians of passes that follow each other, as in a model:
        nothing waits for the device in between. The stand-in for transfers does not count."""
        forward, backward = self._passes(pool)
        times: dict[str, list[float]] = {"forward": [], "backward": []}

        def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            self.comm.begins, self.comm.host_seconds = [], 0.0
            before = time.perf_counter()
            result = function(*arguments)
            times[name].append((time.perf_counter() - before - self.comm.host_seconds) * 1e3)
            return result

        torch.cuda.synchronize()
        for _ in range(passes):
            timed("backward", backward, timed("forward", forward))
        torch.cuda.synchronize()
        return {name: statistics.median(values) for name, values in times.items()}

    def _timed(self, direction: str, keep: bool, function):
        """The device is kept busy for a while first: in a model the host runs ahead of it."""
        self.comm.begins = []
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = function()
        end.record()
        end.synchronize()
        if keep:
            times = self.times[direction]
            times.total.append(start.elapsed_time(end))
            times.steps.append(self._steps(direction, start, end))
        return result

    def _steps(self, direction: str, start: torch.cuda.Event, end: torch.cuda.Event) -> list[float]:
        """Time of each step; a step that moves nothing has no mark of its own and counts with the one before."""
        moments = self.plan.program(direction == "backward", self.comm.local_ranks).moments
        marks = iter(self.comm.begins)
        begins = [next(marks) if moment.moves else None for moment in moments]
        begins[0] = start
        steps = [0.0] * len(moments)
        known = [i for i, mark in enumerate(begins) if mark is not None]
        for i, following in zip(known, [*known[1:], None]):
            steps[i] = begins[i].elapsed_time(end if following is None else begins[following])
        return steps


BYTES = {  # per token and head of the queries (q) or of the keys (kv), headdim 1, bf16 and fp32 accumulators
    Kind.KV: ("kv", 4),
    Kind.QUERY: ("q", 2),
    Kind.OUT: ("q", 4),
    Kind.DQ: ("q", 4),
    Kind.DKV: ("kv", 8),
}


def bytes_per_token(nheads: int, nheads_kv: int, headdim: int, backward: bool) -> dict[Kind, float]:
    """What a token of each kind of transfer weighs; lse and delta are left out (4 bytes per head)."""
    weights = {kind: size * headdim * (nheads if who == "q" else nheads_kv) for kind, (who, size) in BYTES.items()}
    if backward:
        weights[Kind.QUERY] *= 2  # q and dout
    return weights
