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
    """One warp group loads, the others compute (sm_90, needs ``tma`` and num_warps=4). Such a kernel has one loop."""
    maxnreg: int | None = None
    """Cap on registers per thread, to let more programs share a multiprocessor."""


Chooser = Callable[[str, int, int, int, MaskKind], Tile]
"""``(direction, arch, bytes per element, headdim, mask kind) -> Tile``; direction: "forward", "dkdv" or "dq"."""


@functools.cache
def choose(direction: str, arch: int, itemsize: int, headdim: int, kind: MaskKind) -> Tile:
    return Tile(64, 64, 4, 2)
