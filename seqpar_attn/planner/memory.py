"""Bytes on one GPU at the worst moment of a training step, by part.

Parameters, gradients and AdamW's states are float32 shards of FSDP2, computation is bfloat16, every block is
checkpointed by :func:`seqpar_attn.memory.apply`, and the loss is :func:`seqpar_attn.linear_cross_entropy`. The blocks
are Hugging Face's, eager. The worst moment is one of six: attention's backward, the MLP's backward, each in the block
that is first and the one that is last on the way back, the loss, or attention's forward. Blocks in stages
(``tile_block``) have a list of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..schedule import Kind, Schedule
from .attention import key_copies, schedule_of
from .models import Model
from .policy import Cluster, Policy, degree

LOGITS_BYTES = 512 << 20
"""As in :mod:`seqpar_attn.loss.linear`."""
RESERVED = 2 << 30
"""Bytes that the CUDA context, NCCL and libraries take besides torch's tensors: assumed."""
ARENA_SHARE = 1 / 6
"""Of a GPU's memory, what copy engines' slots may take where nobody set a limit, as in :mod:`seqpar_attn.comm.choice`;
a ring that needs more goes by NCCL."""
ARENA = "attention: copy engines' slots"

Parts = dict[str, float]


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a shard's tensors in bfloat16."""

    tokens: int
    hidden: int
    query: int
    """Also out, its gradient and that of queries."""
    key: int
    """Keys alone; values are as many."""
    middle: int
    """One intermediate of the MLP."""
    lse: int


def _sizes(model: Model, tokens: int) -> _Sizes:
    query, key = model.heads * model.headdim, model.kv_heads * model.headdim
    two = 2 * tokens
    return _Sizes(
        tokens, two * model.hidden, two * query, two * key, two * model.intermediate, 4 * tokens * model.heads
    )


Slots = dict[Kind, int]


@functools.lru_cache(maxsize=64)
def _slots(schedule: Schedule) -> list[Slots]:
    """Of every rank: with DistFlashAttn some get queries and others keys."""
    return [{kind: schedule.slots(kind, rank) for kind in Kind} for rank in range(schedule.world_size)]


def _ring_buffers(s: _Sizes, key: int, schedule: Schedule, backward: bool) -> Parts:
    """Attention's own buffers beside its operands and results, of the rank that needs most."""
    ranks = [_rank_buffers(s, key, slots, backward) for slots in _slots(schedule)]
    return max(ranks, key=lambda parts: sum(parts.values()))


def _rank_buffers(s: _Sizes, key: int, slots: Slots, backward: bool) -> Parts:
    """``key`` with the copies of Ulysses."""
    operands = slots[Kind.KV] * 2 * key + slots[Kind.QUERY] * ((2 * s.query + 2 * s.lse) if backward else s.query)
    if not backward:
        partial = slots[Kind.OUT] * (2 * s.query + s.lse)
        return {"attention: received": operands + partial, "attention: accumulators": 2 * s.query}
    partial = slots[Kind.DQ] * 2 * s.query + slots[Kind.DKV] * 4 * key
    # dq, dk and dv in float32 and, when all is added up, in bfloat16 as well; delta.
    own = (2 + 1) * s.query + (4 + 2) * key + s.lse
    return {"attention: received": operands + partial, "attention: accumulators": own}


def _attention(model: Model, cluster: Cluster, policy: Policy, s: _Sizes, backward: bool) -> Parts:
    ulysses = degree(model, cluster.gpus, policy)
    copies = key_copies(model.heads, model.kv_heads, ulysses)
    key = s.key * copies
    # A longer ring needs no more slots: what one held is gone a few steps, or turns of an inner ring, later.
    most = 4 * cluster.per_node if policy.method == "double_ring" else 16
    world_size = min(cluster.gpus // ulysses, most)
    schedule = schedule_of(policy.method, world_size, s.tokens * ulysses, backward, cluster.per_node)
    parts = _ring_buffers(s, key, schedule, backward)
    parts["attention: operands"] = (2 if backward else 1) * s.query + 2 * s.key
    if ulysses > 1:
        # What was exchanged stays for the backward pass (q, k, v, out; there also dout), and a copy to send from.
        held = (3 if backward else 2) * s.query + 2 * key + s.query
        back = s.query + 2 * key if backward else s.query
        parts["attention: exchanged heads"] = held + back
    return parts


def _kept(model: Model, policy: Policy, s: _Sizes, layers: int) -> Parts:
    """What ``layers`` blocks still hold, and the block at work. Offloaded tensors of two are on the device, or of as
    many as stay there. Where not every input is kept, one more is computed again and another one waits for that."""
    stay = max(2, policy.keep_last)
    results = {"save": layers, "offload": stay, "recompute": 1}[policy.attention]
    inputs = layers if policy.activations == "keep" else stay
    if policy.checkpoint_every > 1:
        inputs = max(2, 1 + -(-inputs // policy.checkpoint_every))
    return {
        "attention's results": min(results, layers) * (s.query + s.lse),
        "inputs of blocks": min(inputs, layers) * s.hidden,
    }


def _weights(model: Model, cluster: Cluster, done: int) -> Parts:
    """FSDP2's: two blocks gathered in bfloat16, one block's gradients in bfloat16 and the last one's in float32 on
    their way; embedding and head stay gathered, with the head's gradient; ``done`` blocks' gradients as shards."""
    layer = model.attention_weights + model.mlp_weights
    root = model.head_weights * (1 if model.tied else 2)
    return {
        "gathered weights": 2 * 2 * layer + 2 * root,
        "gradients": 2 * layer + 2 * model.head_weights + (4 * layer if done else 0) + 4 * done * layer / cluster.gpus,
    }


def _moments(model: Model, cluster: Cluster, policy: Policy, tokens: int) -> dict[str, Parts]:
    s = _sizes(model, tokens)
    if policy.tile_block is not None:
        return _staged_moments(model, cluster, policy, s, policy.tile_block)
    norm = 4 * s.hidden
    """A norm keeps its input in float32, and the normalized states before and after the weight."""
    residual = s.hidden
    """The gradient of the residual stream."""
    tile = min(policy.tile_mlp or tokens, tokens) / tokens
    mlp = 7 * s.middle * tile
    """gate, up, silu(gate), their product; and three gradients."""
    static = {"parameters and optimizer": 12 * model.parameters / cluster.gpus}
    moments = {}
    for place, left, done in (("first", model.layers, 0), ("last", 1, model.layers - 1)):
        common = static | _weights(model, cluster, done) | _kept(model, policy, s, left)
        moments[f"attention's backward, {place} block"] = (
            common | _attention(model, cluster, policy, s, True) | {"activations of a block": norm + residual}
        )
        # Attention's operands wait; two more hidden states are the gradient of the MLP's input and of the sum.
        moments[f"the MLP's backward, {place} block"] = common | {
            "attention: operands": s.query + 2 * s.key,
            "activations of a block": 2 * norm + residual + 2 * s.hidden,
            "MLP": mlp,
        }
    everything = static | _weights(model, cluster, 0) | _kept(model, policy, s, model.layers)
    # Hidden states, their norm, and their gradient in float32, scaled float32 and bfloat16; the weight's in float32.
    moments["the loss"] = everything | {
        "activations of a block": norm + 6 * s.hidden,
        "logits": LOGITS_BYTES + 4 * model.head_weights,
    }
    moments["attention's forward"] = (
        everything | _attention(model, cluster, policy, s, False) | {"activations of a block": 3 * s.hidden}
    )
    return moments


def _group(model: Model, cluster: Cluster, policy: Policy, s: _Sizes, backward: bool) -> Parts:
    """Attention's buffers and operands for one group of heads; in backward without dout, which is a part of a whole."""
    n = policy.head_groups
    part = _Sizes(s.tokens, s.hidden, s.query // n, s.key // n, s.middle, s.lse // n)
    found = _attention(model, cluster, policy, part, backward)
    found["attention: operands"] = part.query + 2 * part.key
    if not backward and n > 1:
        found["attention: operands"] += part.query + part.lse  # its result, before it joins the whole
    return found


def _staged_moments(model: Model, cluster: Cluster, policy: Policy, s: _Sizes, tokens: int) -> dict[str, Parts]:
    """Of blocks in stages (:mod:`seqpar_attn.memory.staged`); the table in ``docs/memory.md`` has the same terms."""
    n = policy.head_groups
    layer = model.attention_weights + model.mlp_weights
    static = {
        "parameters and optimizer": 12 * model.parameters / cluster.gpus,
        "rotary embeddings": 4 * s.tokens * model.headdim,
    }
    # A tile: the MLP's seven, and some twenty hidden states, most of them in float32, of norms and sums.
    tile = {"a tile": min(1.0, tokens / s.tokens) * (7 * s.middle + 20 * s.hidden)}
    # Overwritten by their gradients if they are not kept on the device and if the operator takes delta for them.
    results = s.query + 2 * s.lse
    if policy.attention == "save" or policy.method in ("ulysses", "usp"):
        results += s.query
    recomputed = {"attention's results": 0.0} if policy.attention == "recompute" else {}
    moments = {}
    for place, left, done in (("first", model.layers, 0), ("last", 1, model.layers - 1)):
        common = static | _weights(model, cluster, done) | _kept(model, policy, s, left) | recomputed
        common["gradients"] += 4 * layer  # sums over tiles, in float32
        # The gradient of the output becomes that of the input, but for the first block's, which is not a block's.
        common["activations of a block"] = (1 if done else 2) * s.hidden + results
        common["gradients of keys and values"] = 2 * s.key if n > 1 else 0
        moments[f"attention's backward, {place} block"] = common | _group(model, cluster, policy, s, True)
        moments[f"a tile's backward, {place} block"] = common | {"gradients of keys and values": 2 * s.key} | tile
    everything = static | _weights(model, cluster, 0) | _kept(model, policy, s, model.layers) | recomputed
    # The decoder holds the embedding to the end.
    forward = everything | {"activations of a block": s.hidden + s.query + s.lse}
    moments["attention's forward"] = forward | _group(model, cluster, policy, s, False)
    moments["a tile's forward"] = forward | tile | {"activations of a block": 2 * s.hidden + s.query + s.lse}
    # Hidden states; their norm and its gradient in float32, or that in float32 and bfloat16; the weight's in float32.
    moments["the loss"] = everything | {
        "activations of a block": 4 * s.hidden,
        "logits": LOGITS_BYTES + 4 * model.head_weights,
    }
    return moments


@dataclass(frozen=True)
class Memory:
    """``parts`` in bytes at ``moment``, the worst of a step; ``host`` bytes of page-locked memory per GPU."""

    moment: str
    parts: tuple[tuple[str, float], ...]
    host: float

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)


def arena_limit(cluster: Cluster, policy: Policy, gpu_bytes: float) -> float:
    """0 where transfers are NCCL's. Ulysses' and USP's exchanges are planned as NCCL's everywhere."""
    one_host = cluster.nodes == 1 and cluster.per_node > 1
    return ARENA_SHARE * gpu_bytes if one_host and policy.method in ("ring", "dist_flash") else 0.0


def _with_arena(moments: dict[str, Parts], limit: float) -> dict[str, Parts]:
    """What is received lies in memory that is kept for good, if it may."""
    received = "attention: received"
    size = max(parts.get(received, 0.0) for parts in moments.values())
    if not 0 < size <= limit:
        return moments
    return {
        moment: {name: x for name, x in parts.items() if name != received} | {ARENA: size}
        for moment, parts in moments.items()
    }


def predict_memory(model: Model, cluster: Cluster, policy: Policy, tokens: int, limit: float = 0.0) -> Memory:
    """For ``tokens`` per GPU. ``limit``: of copy engines' slots, see :func:`arena_limit`; 0: there are none."""
    moments = _with_arena(_moments(model, cluster, policy, tokens), limit)
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    s = _sizes(model, tokens)
    away = max(0, model.layers - policy.keep_last)
    host = away * (s.query + s.lse) * (policy.attention == "offload")
    host += -(-away // policy.checkpoint_every) * s.hidden * (policy.activations == "offload")
    return Memory(worst, tuple((name, size) for name, size in moments[worst].items() if size), host)
