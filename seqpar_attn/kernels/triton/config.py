"""Tile configurations: a plain table, filled from ``benchmarks/tune_triton.py``; nothing is tuned at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from ...mask import MaskKind


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its block."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Load tiles with the copy engine where strides allow it (sm_90)."""
    specialized: bool = False
    """One warp group loads, two compute (sm_90; needs ``tma`` and num_warps=4, which then counts the warps of one
    group). Triton 3.6 splits a kernel with a single loop that loads through the copy engine only: no intervals."""
    maxnreg: int | None = None
    """Cap on registers per thread, to let more programs share a multiprocessor."""


Chooser = Callable[[str, int, int, int, MaskKind], Tile]
"""``(direction, arch, bytes per element, headdim, mask kind) -> Tile``; direction: "forward", "dkdv" or "dq"."""


@functools.cache
def choose(direction: str, arch: int, itemsize: int, headdim: int, kind: MaskKind) -> Tile:
    column = 0 if headdim <= 64 else 1 if headdim <= 128 else 2
    if itemsize == 4:
        return _FP32[direction][column]
    if arch // 10 != 9:
        return _SM80[direction][column]
    if kind is not MaskKind.INTERVAL and (direction, column) in _SM90_SPECIALIZED:
        return _SM90_SPECIALIZED[direction, column]
    return _SM90[direction][column]


# One entry per padded head dimension: up to 64, 128, 256.
_SM90 = {
    "forward": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    "dkdv": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 64, 8, 2)),
    "dq": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
}
_SM90_SPECIALIZED = {
    ("forward", 0): Tile(128, 128, 4, 2, tma=True, specialized=True),
    ("forward", 1): Tile(128, 128, 4, 2, tma=True, specialized=True),
}
_SM80 = {
    "forward": (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    "dkdv": (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 1)),
    "dq": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
}
# No tensor cores in full precision: small tiles, since a multiply-add per element is unrolled.
_FP32 = {
    "forward": (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    "dkdv": (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    "dq": (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
