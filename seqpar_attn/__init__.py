"""Exact attention over sequences that do not fit one GPU.

``ring_attention`` and ``dist_flash_attention`` compute attention over a sequence that is split over the ranks of a
group; ``cross_entropy`` and ``linear_cross_entropy`` are the loss over such tokens; ``shard_batch`` splits a batch;
``ShardedKV`` keeps a prompt's keys split while new tokens attend them; ``LoopbackGroup`` runs several virtual ranks in
one process. Importing this package loads neither triton nor transformers and does not touch CUDA.
"""

from . import memory
from .api import dist_flash_attention, ring_attention
from .batch import ShardedBatch, pad_batch, shard_batch
from .comm import CommunicationError, LoopbackGroup
from .decode import ShardedKV
from .layout import Contiguous, Layout, Striped, Zigzag, gather, get_layout
from .loss import cross_entropy, linear_cross_entropy

__version__ = "0.1.0"

__all__ = [
    "CommunicationError",
    "Contiguous",
    "Layout",
    "LoopbackGroup",
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
    "shard_batch",
]
