"""What a plan may choose: the method of attention, and what a block keeps for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import GPUS_PER_NODE, Link
from .models import Model

METHODS = ("ring", "dist_flash", "ulysses", "usp", "double_ring")
"""``double_ring``: a ring of nodes around a ring of GPUs, which is ``ring_attention(transfer="double")``."""
ATTENTION = ("save", "offload", "recompute")
ACTIVATIONS = ("keep", "offload")


@dataclass(frozen=True)
class Policy:
    """``ulysses``: how many ranks exchange heads ("usp" only); the rest is :func:`seqpar_attn.memory.apply`'s."""

    method: str = "ring"
    attention: str = "save"
    activations: str = "offload"
    tile_mlp: int | None = 16384
    ulysses: int | None = None
    tile_block: int | None = None
    head_groups: int = 1
    checkpoint_every: int = 1
    keep_last: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("attention", ATTENTION), ("activations", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.tile_mlp is not None and self.tile_mlp < 1:
            raise ValueError(f"expected tile_mlp to be a positive number of tokens or none, got {self.tile_mlp}")
        if self.tile_block is not None and (self.tile_block < 1 or self.tile_mlp is not None):
            raise ValueError(
                f"expected tile_block to be a positive number of tokens without tile_mlp, got {self.tile_block} with "
                f"tile_mlp {self.tile_mlp}"
            )
        if self.head_groups < 1 or (self.head_groups > 1 and self.tile_block is None):
            raise ValueError(f"expected head_groups to be positive, and 1 without tile_block, got {self.head_groups}")
        if self.checkpoint_every < 1 or self.keep_last < 0:
            raise ValueError(
                f"expected checkpoint_every of at least 1 and keep_last of at least 0, got {self.checkpoint_every} and "
                f"{self.keep_last}"
            )
        if self.ulysses is not None and self.method != "usp":
            raise ValueError(f"expected ulysses with method 'usp' only, got {self.ulysses} with {self.method!r}")

    @property
    def again(self) -> float:
        """Forwards that blocks run once more because the next one's input was not kept, per block."""
        return (self.checkpoint_every - 1) / self.checkpoint_every

    def __str__(self) -> str:
        degree = f" (Ulysses {self.ulysses})" if self.ulysses else ""
        tiles = f"MLP tiles of {self.tile_mlp}" if self.tile_mlp else "MLP whole"
        if self.tile_block:
            tiles = f"block tiles of {self.tile_block}, {self.head_groups} groups of heads"
        if self.checkpoint_every > 1:
            tiles += f", a checkpoint every {self.checkpoint_every} blocks"
        if self.keep_last:
            tiles += f", the last {self.keep_last} on the GPU"
        return f"{self.method}{degree}, attention {self.attention}, activations {self.activations}, {tiles}"


@dataclass(frozen=True)
class Cluster:
    """``gpus`` of one kind. Up to a node's number they are joined by ``link``, beyond it nodes are by ``between``."""

    gpus: int
    link: Link
    between: Link

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"expected gpus to be at least 1, got {self.gpus}")
        if self.link.within_node and self.gpus > GPUS_PER_NODE and self.gpus % GPUS_PER_NODE:
            near = self.gpus // GPUS_PER_NODE * GPUS_PER_NODE
            raise ValueError(
                f"expected whole nodes of {GPUS_PER_NODE} GPUs, got {self.gpus} GPUs: use {near} or "
                f"{near + GPUS_PER_NODE}, or a link such as ib400 for all of them"
            )

    @property
    def per_node(self) -> int:
        """GPUs that ``link`` joins; 1 where every GPU has its own adapter."""
        return min(self.gpus, GPUS_PER_NODE) if self.link.within_node else 1

    @property
    def nodes(self) -> int:
        return self.gpus // self.per_node

    def node(self, gpu: int) -> int:
        return gpu // self.per_node

    def gbps(self, gpu: int, other: int) -> float:
        return (self.link if self.node(gpu) == self.node(other) else self.between).gbps


def exchanges(model: Model, gpus: int) -> list[int]:
    """How many ranks can exchange heads: divisors of ``gpus`` that divide the heads."""
    return [n for n in range(1, gpus + 1) if gpus % n == 0 and model.heads % n == 0]


def degree(model: Model, gpus: int, policy: Policy) -> int:
    """Ranks that exchange heads under a policy, 1 for rings; ValueError where heads do not divide."""
    if model.kv_heads % policy.head_groups:
        raise ValueError(f"expected head_groups to divide {model.kv_heads} key heads, got {policy.head_groups}")
    if policy.method not in ("ulysses", "usp"):
        return 1
    possible = exchanges(model, gpus)
    wanted = gpus if policy.method == "ulysses" else policy.ulysses
    if wanted is None:
        inside = [n for n in possible if n <= GPUS_PER_NODE]
        wanted = max(inside)
    if wanted not in possible:
        raise ValueError(
            f"expected the ranks that exchange heads to be one of {', '.join(map(str, possible))} for {model.heads} "
            f"heads on {gpus} GPUs, got {wanted}: or choose method 'ring', or 'usp' with one of these"
        )
    if model.heads // policy.head_groups % wanted:
        raise ValueError(
            f"expected groups of heads that the {wanted} ranks which exchange them divide, got "
            f"{model.heads // policy.head_groups} heads in each of {policy.head_groups} groups"
        )
    return wanted
