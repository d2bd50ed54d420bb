"""How a ring's work is cut into steps: what was measured to be best on four H100s (results/ranks/steps-4.txt)."""

from __future__ import annotations

from ..mask import Mask

KEYS_PER_STEP = 32768
"""Tokens of keys that a ring step gathers where shards are shorter: the fewer keys a launch attends, the more its
accumulator's way to memory and back costs, and Python's time. Over more than this, buffers would only grow."""

OWN_LAST_FROM = 8192
"""Tokens of a shard from which half of the own work comes last in backward. With 4096 the smaller launches cost more
than the return of dk and dv that they hide."""


def owners_per_step(shard: int) -> int:
    """How many ranks' keys a ring attends in one step, for a shard of so many tokens."""
    return max(1, KEYS_PER_STEP // max(1, shard))


def has_own_work_last(layout: str, transfer: str, world_size: int, mask: Mask) -> bool:
    """Whether a ring's backward schedule keeps half of the own work for its end."""
    plain = mask.causal and mask.window_size is None and mask.cu_seqlens is None
    long = mask.seqlen >= OWN_LAST_FROM * world_size
    return layout == "zigzag" and transfer == "pull" and world_size > 1 and plain and long
