"""Configurations of the Hopper kernels, as plain data; nothing is tuned at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..config import Tile

HEADDIMS = (64, 128, 256)
"""Padded head dimensions that have kernels."""


@dataclass(frozen=True, eq=False)
class ForwardConfig:
    """``consumers`` warpgroups of 64 query rows each, tiles of ``keys`` keys in ``stages`` stages."""

    consumers: int
    keys: int
    stages: int
    pingpong: bool
    """Whether two consumers take turns with the tensor cores."""
    registers: int
    """Per thread of a consumer, and"""
    producer_registers: int
    """of the producer."""
    maxnreg: int
    """Per thread before warpgroups trade registers."""

    @functools.cached_property
    def tile(self) -> Tile:
        return Tile(64 * self.consumers, self.keys, 4, 1, tma=True, maxnreg=self.maxnreg)


# By padded head dimension.
FORWARD = {
    64: ForwardConfig(2, 128, 4, True, 240, 24, 168),
    128: ForwardConfig(2, 128, 2, True, 240, 24, 168),
    256: ForwardConfig(2, 64, 2, True, 240, 24, 168),
}
FORWARD_TALL = {64: ForwardConfig(3, 128, 4, False, 160, 32, 128)}
"""Faster per row, but a tile's rows divide fewer lengths. Spills with a soft cap or intervals."""
_TALL_IS_FASTER = 1.1


@functools.lru_cache(maxsize=1024)
def choose_forward(headdim: int, plain: bool, seqlen_q: int, heads: int, programs: int) -> ForwardConfig:
    """``plain``: neither intervals nor a soft cap; ``heads`` over all batches; ``programs`` that run at once."""
    dim = padded(headdim)
    flat, tall = FORWARD[dim], FORWARD_TALL.get(dim)
    if tall is None or not plain:
        return flat

    def rounds(config: ForwardConfig) -> int:
        """In units of 64 rows; the last one takes as long as any other."""
        tiles = -(-seqlen_q // (64 * config.consumers)) * heads
        return config.consumers * -(-tiles // programs)

    return tall if rounds(tall) < _TALL_IS_FASTER * rounds(flat) else flat


def padded(headdim: int) -> int:
    """Columns past the head dimension are zeros that the copy engine fills in, and are never stored."""
    return 64 if headdim <= 64 else 128 if headdim <= 128 else 256


def beyond(headdim: int) -> int:
    """How many columns past 128 the forward kernel multiplies: of 256 that it has memory for, 192 may do."""
    return 0 if headdim <= 128 else 64 if headdim <= 192 else 128


_L2_BYTES_FOR_KEYS = 40_000_000


def heads_at_once(full: bool, heads: int, bytes_per_head: int) -> int:
    """How many heads take turns in the forward kernel. Without a mask all tiles cost the same, so one head after the
    other reads its keys from the L2; with one, the more heads the better tiles of all lengths mix."""
    return 1 if full else max(1, min(heads, _L2_BYTES_FOR_KEYS // max(1, bytes_per_head)))


@dataclass(frozen=True, eq=False)
class BackwardConfig:
    """Tiles of ``queries``, in ``q_stages`` stages; the other fields as in ``ForwardConfig``."""

    queries: int
    q_stages: int
    registers: int
    producer_registers: int
    maxnreg: int

    @functools.cached_property
    def tile(self) -> Tile:
        return Tile(self.queries, BACKWARD_KEYS, 4, 1, tma=True, maxnreg=self.maxnreg)


BACKWARD_KEYS = 128
BACKWARD_WIDE_KEYS = 64
BACKWARD_WIDE_TILE = Tile(64, BACKWARD_WIDE_KEYS, 4, 1, tma=True, maxnreg=128)
"""For more than 128 columns, whose kernel has one configuration: its tiles fill shared memory and all registers."""
# By padded head dimension; queries times that is always 8192: two warpgroups share a tile of dQ.
BACKWARD = {
    64: BackwardConfig(128, 3, 240, 24, 168),
    128: BackwardConfig(64, 3, 240, 24, 168),
}
_KEY_TILES_TOGETHER = 32 * 132
_WIDE_KEY_TILES_TOGETHER = 4 * 132


def heads_together(heads: int, key_tiles: int, wide: bool = False) -> int:
    """Key heads that take turns tile by tile. All together, the longest tiles of all of them go first and none of them
    is last; but after more than some 32 waves of programs these do not begin together any more (see csrc's
    ``key_heads_at_once``, which found that)."""
    most = _WIDE_KEY_TILES_TOGETHER if wide else _KEY_TILES_TOGETHER
    while heads > 1 and heads * key_tiles > most:
        heads = -(-heads // 2)
    return heads


def shift(dtype: torch.dtype) -> int:
    """P, and with it dS and dq, is 2 to the power of this times itself: as fp16 it then has range and digits enough to
    wait for dP in 16 bits without adding to the error of dS in bf16."""
    return 14 if dtype == torch.bfloat16 else 0


def permuted(headdim: int) -> bool:
    """Whether the columns of dq are in the order of ``dq_position`` until ``finish_dq``."""
    return headdim % 32 == 0
