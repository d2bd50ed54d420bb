"""A plan: one model on one cluster at one context. All of its numbers are predictions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from .hardware import GPUS_PER_NODE, LINKS, Gpu, Link
from .memory import RESERVED, Memory, arena_limit, predict_memory
from .models import Model
from .policy import ACTIVATIONS, ATTENTION, METHODS, Cluster, Policy, exchanges
from .step import Step, predict_step

TILES = (None, 16384)
"""What ``best_plan`` tries for ``tile_mlp``."""


class DoesNotFitError(ValueError):
    """No open policy fits; the message says what would."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory and time of one training step; ``context`` as asked, ``tokens`` per GPU after padding."""

    model: Model
    gpu: Gpu
    cluster: Cluster
    context: int
    policy: Policy
    tokens: int
    memory: Memory
    step: Step

    @property
    def capacity(self) -> float:
        """Bytes for torch's tensors."""
        return capacity(self.gpu)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.context / self.step.total

    @property
    def mfu(self) -> float:
        flops = self.model.flops_per_token(self.context) * self.tokens_per_second
        return flops / (self.cluster.gpus * self.gpu.peak_tflops * 1e12)


def capacity(gpu: Gpu) -> float:
    return gpu.memory_gib * 2**30 - RESERVED


def make_cluster(gpus: int, link: Link, between: Link | None = None) -> Cluster:
    """``between``: of nodes, where ``link`` ends at a node's border; "ib400" if it is not said."""
    if not link.within_node:
        if between is not None and between != link:
            raise ValueError(f"expected no link between nodes where all GPUs use {link.name}, got {between.name}")
        between = link
    return Cluster(gpus, link, LINKS["ib400"] if between is None else between)


def shard_of(context: int, gpus: int) -> int:
    """Tokens per GPU: a multiple of 2, which the sequence is padded to."""
    if context < 1:
        raise ValueError(f"expected context to be a positive number of tokens, got {context}")
    return 2 * -(-context // (2 * gpus))


def make_plan(model: Model, gpu: Gpu, cluster: Cluster, context: int, policy: Policy) -> Plan:
    """Whether it fits or not; ValueError for heads that do not divide."""
    tokens = shard_of(context, cluster.gpus)
    memory = predict_memory(model, cluster, policy, tokens, arena_limit(cluster, policy, gpu.memory_gib * 2**30))
    step = predict_step(model, gpu, cluster, policy, tokens)
    return Plan(model, gpu, cluster, context, policy, tokens, memory, step)


def longest(model: Model, gpu: Gpu, cluster: Cluster, policy: Policy, limit: int = 1 << 30) -> int:
    """The longest context that fits, in tokens, to 1/64 of itself; 0 if none does."""

    arena = arena_limit(cluster, policy, gpu.memory_gib * 2**30)

    def fits(context: int) -> bool:
        memory = predict_memory(model, cluster, policy, shard_of(context, cluster.gpus), arena)
        return memory.total <= capacity(gpu)

    unit = 1024 * cluster.gpus
    low, high = 0, 1
    while high * unit <= limit and fits(high * unit):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def policies(
    model: Model,
    gpus: int,
    method: str = "best",
    attention: str = "best",
    activations: str = "best",
    tile_mlp: int | str | None = "best",
    ulysses: int | None = None,
) -> list[Policy]:
    """Every policy that "best" leaves open and the model's heads allow."""
    found = []
    for name in METHODS if method == "best" else (method,):
        degrees: list[int | None] = [ulysses]
        if name == "usp" and ulysses is None:
            degrees = [n for n in exchanges(model, gpus) if 1 < n < gpus and n <= GPUS_PER_NODE]
            if not degrees and method == "usp":
                possible = ", ".join(map(str, exchanges(model, gpus)))
                raise ValueError(
                    f"expected GPUs that form a grid for method 'usp', got {gpus} with {model.heads} heads, of which "
                    f"{possible} could exchange heads: choose 'ring'"
                )
        if name == "ulysses" and method == "best" and gpus not in exchanges(model, gpus):
            continue
        if name == "double_ring" and method == "best" and gpus <= GPUS_PER_NODE:
            continue  # one node's is the ring
        for d, a, h, t in product(
            degrees,
            ATTENTION if attention == "best" else (attention,),
            ACTIVATIONS if activations == "best" else (activations,),
            TILES if tile_mlp == "best" else (tile_mlp,),
        ):
            assert not isinstance(t, str)
            found.append(Policy(name, a, h, t, d if name == "usp" else None))
    return found


def best_plan(model: Model, gpu: Gpu, cluster: Cluster, context: int, open_policies: list[Policy]) -> Plan:
    """The fastest that fits; DoesNotFitError that says how long it could be if none does."""
    plans = [make_plan(model, gpu, cluster, context, policy) for policy in open_policies]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.step.total)
    least = min(plans, key=lambda plan: plan.memory.total)
    most = longest(model, gpu, cluster, least.policy)
    gib = 2**30
    raise DoesNotFitError(
        f"expected a context that fits {cluster.gpus} x {gpu.name}, got {context} tokens, predicted to need "
        f"{least.memory.total / gib:.1f} of {least.capacity / gib:.1f} GiB at least ({least.policy}): "
        + (f"up to {most} tokens should fit" if most else "no context fits: use more GPUs or a smaller model")
    )
