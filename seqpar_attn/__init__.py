"""Exact attention over sequences that do not fit one GPU.

``ring_attention``, ``dist_flash_attention``, ``ulysses_attention`` and ``usp_attention`` compute attention over a
sequence that is split over the ranks of a group; ``set_transport`` sets how their transfers go, if they are not to find
out themselves; ``cross_entropy`` and ``linear_cross_entropy`` are the loss over such tokens; ``shard_batch`` splits a
batch; ``ShardedKV`` keeps a prompt's keys split while new tokens attend them; ``verify`` compares a model on a split
sequence with one device; ``LoopbackGroup`` runs several virtual ranks in one process. Importing this package loads
neither triton nor transformers and does not touch CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import memory
from .api import dist_flash_attention, ring_attention, ulysses_attention, usp_attention
from .batch import ShardedBatch, pad_batch, shard_batch
from .comm import CommunicationError, LoopbackGroup, set_transport
from .decode import ShardedKV
from .layout import Contiguous, Layout, Nested, Striped, Zigzag, gather, get_layout
from .loss import cross_entropy, linear_cross_entropy

if TYPE_CHECKING:
    from .integrations.verify import verify as verify

__version__ = "0.1.0"

__all__ = [
    "CommunicationError",
    "Contiguous",
    "Layout",
    "LoopbackGroup",
    "Nested",
    "ShardedBatch",
    "ShardedKV",
    "Striped",
    "Zigzag",
    "cross_entropy",
    "dist_flash_attention",
    "gather",
    "get_layout",
    "linear_cross_entropy",
    "memory",
    "pad_batch",
    "ring_attention",
    "set_transport",
    "shard_batch",
    "ulysses_attention",
    "usp_attention",
    "verify",
]


def __getattr__(name: str) -> Any:
    """``verify`` knows models, so it lives in ``integrations``, which is loaded when it is asked for and not before."""
    if name == "verify":
        from .integrations.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
