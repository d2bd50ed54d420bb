"""What a schedule costs: an event model with kernel rates and link bandwidths. No devices are involved."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from .data import Kind, Schedule, Transfer


@dataclass(frozen=True)
class Rates:
    """Speeds of one device and its links.

    ``pairs_per_second``: attended (query, key) pairs, all heads together; ``bytes_per_token``: what one token of each
    kind of transfer weighs; ``bytes_per_second``: each direction of one device's link; ``latency``: per message, and
    ``launch``: per task, in seconds.
    """

    pairs_per_second: float
    bytes_per_token: dict[Kind, float]
    bytes_per_second: float = float("inf")
    latency: float = 0.0
    launch: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """Seconds: ``makespan`` until the last rank is done; per rank ``busy`` computing and ``exposed`` waiting for
    transfers; ``bytes_sent`` per rank."""

    makespan: float
    busy: tuple[float, ...]
    exposed: tuple[float, ...]
    bytes_sent: tuple[float, ...]

    @property
    def efficiency(self) -> float:
        """Mean busy time over the makespan; 1 is perfect balance with hidden communication."""
        return sum(self.busy) / len(self.busy) / self.makespan if self.makespan else 1.0


def simulate_schedule(
    schedule: Schedule,
    rates: Rates,
    *,
    step_seconds: Callable[[int, int], float] | None = None,
    bandwidth: Callable[[int, int], float] | None = None,
    host: Callable[[int], int] | None = None,
) -> Simulation:
    """Play the schedule in time.

    A rank starts a step when it has computed the step before and the transfers to and from it that end with that step
    are done. A message starts when both ends have posted it and both links are free. ``step_seconds(step, rank)``
    replaces the constant rate, e.g. by measured times; ``bandwidth(source, target)`` replaces ``bytes_per_second``,
    e.g. where hosts are joined by slower links. If ``host(rank)`` tells them apart, a rank has two links that work at
    the same time: one to the ranks of its host, and an adapter to all others.
    """
    world_size = schedule.world_size
    hosts = [0 if host is None else host(rank) for rank in range(world_size)]

    def seconds(step: int, rank: int) -> float:
        if step_seconds is not None:
            return step_seconds(step, rank)
        return sum(rates.launch + task.area / rates.pairs_per_second for task in schedule.steps[step][rank].tasks)

    def size(transfer: Transfer) -> float:
        return schedule.length(transfer.block) * rates.bytes_per_token[transfer.kind]

    start = [0.0] * world_size
    busy, exposed, sent = ([0.0] * world_size for _ in range(3))
    # Per link, those within hosts and then the adapters.
    out_free, in_free = [0.0] * 2 * world_size, [0.0] * 2 * world_size
    arrivals: dict[int, list[float]] = defaultdict(lambda: [0.0] * world_size)
    for step, row in enumerate(schedule.steps):
        # Whatever can start first does; of equals, a rank's earlier message. (In the order of ranks instead, messages
        # would wait for each other in chains as long as the ring.)
        waiting = [
            (max(start[source], start[transfer.peer]), number, source, transfer)
            for source in range(world_size)
            for number, transfer in enumerate(row[source].sends)
        ]
        heapq.heapify(waiting)
        while waiting:
            posted, number, source, transfer = heapq.heappop(waiting)
            target = transfer.peer
            link = 0 if hosts[source] == hosts[target] else world_size
            begin = max(posted, out_free[link + source], in_free[link + target])
            if begin > posted:
                heapq.heappush(waiting, (begin, number, source, transfer))
                continue
            speed = rates.bytes_per_second if bandwidth is None else bandwidth(source, target)
            end = begin + rates.latency + size(transfer) / speed
            out_free[link + source] = in_free[link + target] = end
            ends = arrivals[step + transfer.steps - 1]
            ends[source], ends[target] = max(ends[source], end), max(ends[target], end)
            sent[source] += size(transfer)
        arrived = arrivals.pop(step, start)
        for rank in range(world_size):
            duration = seconds(step, rank)
            busy[rank] += duration
            computed = start[rank] + duration
            exposed[rank] += max(arrived[rank] - computed, 0.0)
            start[rank] = max(computed, arrived[rank])
    return Simulation(max(start), tuple(busy), tuple(exposed), tuple(sent))
