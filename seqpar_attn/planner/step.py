"""Seconds of one training step on one GPU, by part: operations over measured rates, bytes over measured bandwidths."""

from __future__ import annotations

from dataclasses import dataclass

from .attention import Cost, attention_cost
from .hardware import Gpu, on_curve
from .models import Model
from .policy import Cluster, Policy

NORM_FORWARD, NORM_BACKWARD = 36, 92
"""Bytes per element of the hidden states that an eager RMSNorm reads and writes, most of it float32."""
ROPE_FORWARD, ROPE_BACKWARD = 20, 30
"""Likewise of rotary embeddings, per element of queries and keys."""
ADD = 6
"""Of a sum of two bfloat16 tensors."""
ADAM = 28
"""Per parameter: reads it, its gradient and two moments, writes all but the gradient."""


@dataclass(frozen=True)
class Runs:
    """How often the forward of a block's parts runs in one step. A recomputation ends where the last tensor is there
    that backward needs, so what comes after it, the last product of an MLP, runs once less."""

    gate_up: float
    down: float
    block: float = 2


def runs(policy: Policy, tokens: int) -> Runs:
    """Tiles of an MLP are checkpoints in the block's: both run again, but the block's stops at the last tile."""
    if policy.tile_block is not None:
        # Norms and projections up to attention: for every group of heads, forward and backward, and in a recomputation
        # of attention; once with what follows, forward and backward, and once for their own gradients. (The output
        # projection, which runs less often, is counted as often.)
        recompute = policy.attention == "recompute"
        groups = policy.head_groups * (2 + recompute)
        again = policy.again * (1 + policy.head_groups * recompute)
        return Runs(2.0 + policy.again, 2.0 + policy.again, groups + 3 + again)
    if policy.tile_mlp is None:
        return Runs(2.0 + policy.again, 1.0 + policy.again, 2 + policy.again)
    last = (tokens % policy.tile_mlp or policy.tile_mlp) / tokens if tokens > policy.tile_mlp else 1.0
    return Runs(3.0 - last + policy.again, 2.0 - last + policy.again, 2 + policy.again)


def elementwise_bytes(model: Model, policy: Policy, tokens: int) -> float:
    """Bytes that a layer's kernels other than products and attention move, forward, recomputation and backward."""
    n = runs(policy, tokens)
    heads = (model.heads + model.kv_heads) * model.headdim
    norms = 2 * (n.block * NORM_FORWARD + NORM_BACKWARD) * model.hidden
    rope = (n.block * ROPE_FORWARD + ROPE_BACKWARD) * heads
    sums = (2 * n.block + 3) * ADD * model.hidden  # residuals; gradients where ways meet, at both, and of gate and up
    silu = (n.gate_up * 10 + 18) * model.intermediate
    tiles = (
        4 * (n.gate_up + 1) * model.hidden if policy.tile_mlp or policy.tile_block else 0
    )  # joined, and cut in backward
    weights = 14 * (model.attention_weights + model.mlp_weights)  # FSDP2: gathered ones in place, gradients widened
    return tokens * (norms + rope + sums + silu + tiles) + weights


def gemm_flops(model: Model, policy: Policy, tokens: int) -> float:
    """Of a layer's matrix products: 2 per weight and token for each run, and 4 backward."""
    n = runs(policy, tokens)
    third = model.mlp_weights / 3
    weights = model.attention_weights * (n.block + 2) + 2 * third * (n.gate_up + 2) + third * (n.down + 2)
    return 2.0 * tokens * weights


def gather_seconds(weights: int, itemsize: int, cluster: Cluster) -> float:
    """An all-gather or reduce-scatter over all GPUs: inside nodes over links, between them over all adapters."""
    if cluster.gpus == 1:
        return 0.0
    size = weights * itemsize
    within = size * (cluster.per_node - 1) / cluster.per_node / cluster.link.gbps / 1e9
    across = size * (cluster.nodes - 1) / cluster.nodes / cluster.per_node / cluster.between.gbps / 1e9
    return max(within, across)


@dataclass(frozen=True)
class Step:
    """``parts`` in seconds; ``transfers``: how long everything that moves between GPUs would take by itself, and
    ``waiting`` what of it the GPU waits for."""

    parts: tuple[tuple[str, float], ...]
    transfers: float
    waiting: float

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def hidden_share(self) -> float:
        return 1.0 - min(1.0, self.waiting / self.transfers) if self.transfers else 1.0


def predict_step(model: Model, gpu: Gpu, cluster: Cluster, policy: Policy, tokens: int) -> Step:
    """For ``tokens`` per GPU."""
    layers = model.layers
    forward, backward, exchange_again = attention_cost(model, gpu, cluster, policy, tokens)
    again = forward if policy.attention == "recompute" else Cost(exchange=exchange_again)
    repeats = 1.0 + policy.again * (policy.attention == "recompute")
    products = gemm_flops(model, policy, tokens) / gpu.gemm_tflops / 1e12
    other = elementwise_bytes(model, policy, tokens) / gpu.copy_gbps / 1e9
    # A quarter of what is not attention is the first forward, roughly: what FSDP's and the host's copies hide behind.
    first = (products + other) / 4 + forward.total
    second = (products + other) * 3 / 4 + backward.total + again.total

    weights = model.attention_weights + model.mlp_weights
    gather, scatter = gather_seconds(weights, 2, cluster), gather_seconds(weights, 4, cluster)
    fsdp = max(0.0, gather - max(0.0, first - forward.transfers - forward.exchange))
    busy = backward.transfers + again.transfers + backward.exchange + again.exchange
    fsdp += max(0.0, gather + scatter - max(0.0, second - busy))

    kept = 2 * model.hidden * (policy.activations == "offload") / policy.checkpoint_every
    kept += (2 * model.headdim + 4) * model.heads * (policy.attention == "offload")
    copy = tokens * kept / gpu.host_gbps / 1e9
    offload = max(0.0, copy - first) + max(0.0, copy - second)

    norm = (NORM_FORWARD + NORM_BACKWARD + 10) * model.hidden * tokens / gpu.copy_gbps / 1e9  # and the embedding
    head = 6.0 * tokens * model.head_weights / on_curve(gpu.head, model.vocab) / 1e12
    ring = forward.exposed + backward.exposed + again.exposed
    heads = forward.exchange + backward.exchange + again.exchange
    parts = {
        "attention, forward": layers * forward.compute,
        "attention, backward": layers * backward.compute,
        "attention, computed again": layers * again.compute * repeats,
        "waiting for the ring": layers * ring,
        "exchanging heads": layers * heads,
        "matrix products of layers": layers * products,
        "elementwise of layers": layers * other,
        "waiting for FSDP's weights": layers * fsdp,
        "waiting for the host's memory": layers * offload,
        "embedding, last norm": norm,
        "head and loss": head,
        "optimizer": ADAM * model.parameters / cluster.gpus / gpu.copy_gbps / 1e9,
    }
    moved = forward.transfers + backward.transfers + again.transfers + heads
    transfers = layers * (moved + 2 * gather + scatter)
    return Step(tuple((k, v) for k, v in parts.items() if v), transfers, layers * (ring + heads + fsdp))
