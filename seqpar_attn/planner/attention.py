"""What one layer's attention costs on one GPU of many: schedules, simulated with kernels' rates and links' bandwidths.

Rings of more than ``LARGEST`` ranks are not simulated: with a fixed shard every step of a ring costs the same, so the
makespan grows by the same time with every rank (or every node of them), and two smaller rings tell it
(``tests/test_planner.py`` compares).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..mask import Mask, Span
from ..schedule import Kind, Rates, Schedule, Task, build_schedule, simulate_schedule
from ..schedule.choice import has_own_work_last, owners_per_step
from .hardware import Gpu, on_curve
from .models import Model
from .policy import Cluster, Policy, degree

LARGEST = 48
FLOPS = {False: 4, True: 10}
"""Per attended pair, head and element of the head dimension: two products forward, five backward."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer: ``compute`` without any waiting, ``exposed`` waiting for transfers of the ring,
    ``exchange`` of heads, which nothing hides; ``transfers``: how long the ring's bytes occupy a link."""

    compute: float = 0.0
    exposed: float = 0.0
    exchange: float = 0.0
    transfers: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.exchange


def spans(method: str, world_size: int, shard: int) -> tuple[tuple[Span, ...], ...]:
    """Two chunks per rank: neighbours for "dist_flash", an early and a late one for rings; see ``layout``."""
    half = shard // 2

    def chunks(rank: int) -> tuple[int, int]:
        return (2 * rank, 2 * rank + 1) if method == "dist_flash" else (rank, 2 * world_size - 1 - rank)

    return tuple(tuple(Span(n * half, half) for n in chunks(rank)) for rank in range(world_size))


@functools.lru_cache(maxsize=64)
def schedule_of(method: str, world_size: int, shard: int, backward: bool, per_node: int = 1) -> Schedule:
    """As :mod:`seqpar_attn.plan` would make it for a causal mask; ``per_node`` matters to "double_ring" only."""
    name = "dist_flash" if method == "dist_flash" else "ring"
    double = method == "double_ring"
    mask, transfer = Mask(world_size * shard), "double" if double else "pull"
    return build_schedule(
        name,
        spans(name, world_size, shard),
        mask,
        backward=backward,
        transfer=transfer,
        owners_per_step=owners_per_step(shard),
        own_last=backward and name == "ring" and has_own_work_last("zigzag", transfer, world_size, mask),
        ranks_per_host=per_node if double else None,
    )


def key_copies(heads: int, kv_heads: int, ulysses: int) -> int:
    """To how many ranks each key head goes; see ``heads``."""
    readers = heads // kv_heads
    return readers // math.gcd(readers, heads // ulysses)


@dataclass(frozen=True)
class _Heads:
    """What one rank of the ring holds of each token."""

    query: int
    """Elements: heads times head dimension."""
    key: int
    count: int
    """Query heads."""

    def bytes_per_token(self, backward: bool) -> dict[Kind, float]:
        """bf16 operands, float32 results; lse and delta are float32 per head."""
        query = (4 * self.query + 8 * self.count) if backward else 2 * self.query
        return {
            Kind.KV: 4 * self.key,
            Kind.QUERY: query,
            Kind.OUT: 4 * self.query + 4 * self.count,
            Kind.DQ: 4 * self.query,
            Kind.DKV: 8 * self.key,
        }


def _simulate(
    method: str, world_size: int, shard: int, backward: bool, heads: _Heads, gpu: Gpu, cluster: Cluster, stride: int
) -> Cost:
    """A ring whose rank r is GPU ``r * stride`` of the cluster."""
    schedule = schedule_of(method, world_size, shard, backward, cluster.per_node)
    rates, _ = gpu.attention_of(heads.query // heads.count)
    curve = rates.backward if backward else rates.forward
    bytes_per_token = heads.bytes_per_token(backward)

    def launch_seconds(tasks: list[Task]) -> float:
        pairs = sum(task.area for task in tasks)
        flops = FLOPS[backward] * pairs * heads.query
        return gpu.launch_us * 1e-6 + flops / on_curve(curve, math.sqrt(pairs)) / 1e12

    def step_seconds(step: int, rank: int) -> float:
        seconds = sum(launch_seconds(tasks) for tasks in schedule.launches(step, rank))
        for merge in schedule.steps[step][rank].merges:  # reads both, writes one of them
            moved = 3 * bytes_per_token[merge.kind] * schedule.length(merge.block)
            seconds += gpu.launch_us * 1e-6 + moved / gpu.copy_gbps / 1e9
        return seconds

    def bandwidth(source: int, target: int) -> float:
        return 1e9 * cluster.gbps(source * stride, target * stride)

    def node(rank: int) -> int:
        return cluster.node(rank * stride)

    latency = (cluster.link if cluster.nodes == 1 else cluster.between).latency_us * 1e-6
    priced = Rates(1.0, bytes_per_token, latency=latency)
    free = Rates(1.0, dict.fromkeys(bytes_per_token, 0.0))
    found = simulate_schedule(schedule, priced, step_seconds=step_seconds, bandwidth=bandwidth, host=node)
    alone = simulate_schedule(schedule, free, step_seconds=step_seconds)
    sent = [0.0] * world_size
    for row in schedule.steps:
        for rank, cell in enumerate(row):
            for send in cell.sends:
                size = schedule.length(send.block) * bytes_per_token[send.kind]
                sent[rank] += latency + size / bandwidth(rank, send.peer)
    return Cost(alone.makespan, max(0.0, found.makespan - alone.makespan), transfers=sum(sent) / world_size)


def _ring(
    method: str, world_size: int, shard: int, backward: bool, heads: _Heads, gpu: Gpu, cluster: Cluster, stride: int
) -> Cost:
    if world_size <= LARGEST:
        return _simulate(method, world_size, shard, backward, heads, gpu, cluster, stride)
    small, large = (_simulate(method, n, shard, backward, heads, gpu, cluster, stride) for n in (LARGEST // 2, LARGEST))
    times = (world_size - LARGEST) / (LARGEST - LARGEST // 2)

    def further(before: float, after: float) -> float:
        return after + times * max(0.0, after - before)

    return Cost(
        further(small.compute, large.compute),
        further(small.exposed, large.exposed),
        transfers=further(small.transfers, large.transfers),
    )


def _exchange_seconds(sent: float, ulysses: int, cluster: Cluster) -> float:
    """An all-to-all in which each rank holds ``sent`` bytes and keeps its own part; within nodes and between them at
    the same time."""
    inside = min(ulysses, cluster.per_node)
    within = sent * (inside - 1) / ulysses / cluster.link.gbps / 1e9
    across = sent * (ulysses - inside) / ulysses / cluster.between.gbps / 1e9
    return max(within, across)


@functools.lru_cache(maxsize=512)
def attention_cost(model: Model, gpu: Gpu, cluster: Cluster, policy: Policy, tokens: int) -> tuple[Cost, Cost, float]:
    """Of one layer, for ``tokens`` per GPU: forward; backward; and seconds of exchanging heads once more in a
    recomputation that has the results."""
    ulysses = degree(model, cluster.gpus, policy)
    copies = key_copies(model.heads, model.kv_heads, ulysses)
    query, key = model.heads * model.headdim, model.kv_heads * model.headdim
    heads = _Heads(query // ulysses, key * copies // ulysses, model.heads // ulysses)
    world_size, shard = cluster.gpus // ulysses, tokens * ulysses
    # The rows of a grid lie in nodes: ring neighbours are ``ulysses`` GPUs apart.
    both = [_ring(policy.method, world_size, shard, b, heads, gpu, cluster, ulysses) for b in (False, True)]
    if ulysses == 1:
        return both[0], both[1], 0.0
    operands = 2 * tokens * (query + 2 * key * copies)
    out = 2 * tokens * query
    # Backward: dout there, dq, dk and dv back, those of copied key heads in float32.
    gradients = out + 2 * tokens * query + 2 * tokens * key * copies * (4 if copies > 1 else 2)
    forward, backward, again = (
        _exchange_seconds(n, ulysses, cluster) for n in (operands + out, gradients, operands + out)
    )
    a, b = both
    return (
        Cost(a.compute, a.exposed, forward, a.transfers),
        Cost(b.compute, b.exposed, backward, b.transfers),
        again,
    )
