"""Tile configurations: a plain table, filled from ``benchmarks/tune_triton.py``; nothing is tuned at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...mask import MaskKind


@dataclass(frozen=True, eq=False)
class Tile:
    """How one kernel cuts its block. Compared by identity: a hash of all fields costs host time at every launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Load tiles with the copy engine where strides allow it (sm_90)."""
    specialized: bool = False
    """One warp group loads, two compute (sm_90; needs ``tma`` and num_warps=4, which then counts the warps of one
    group). Triton 3.6 splits a kernel with a single loop that loads through the copy engine only: no intervals."""
    otherwise: Tile | None = None
    """Used in place of this one where strides or addresses do not allow the copy engine."""
    ragged: Tile | None = None
    """Used in place of this one, strides permitting, where a length or the head dimension does not fill its tiles: the
    bounds that pointers need there would spill, and the copy engine has them for nothing."""
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
    tile = _SM90[direction][column]
    if kind is MaskKind.FULL:
        tile = _SM90_FULL.get((direction, column), tile)
    specialized = _SM90_SPECIALIZED.get((direction, column))
    if specialized is None or kind is MaskKind.INTERVAL or not _specialization_is_proved():
        return tile
    return replace(specialized, otherwise=tile)


@functools.cache
def _specialization_is_proved() -> bool:
    """Triton's warp specialisation is an experiment that can give wrong results in silence: only the version that
    the GPU tests ran on gets it."""
    import triton

    return triton.__version__.startswith("3.6.")


def _specialized(block_m: int, block_n: int, num_stages: int) -> Tile:
    return Tile(block_m, block_n, 4, num_stages, tma=True, specialized=True)


# One entry per padded head dimension: up to 64, 128, 256.
_SM90 = {
    "forward": (Tile(128, 64, 4, 3, tma=True), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2, tma=True)),
    "dkdv": (
        Tile(64, 64, 4, 3),
        Tile(64, 128, 8, 3, ragged=Tile(64, 128, 8, 2, tma=True)),
        Tile(32, 64, 8, 2, tma=True),
    ),
    "dq": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
}
_SM90_FULL = {("dq", 0): Tile(128, 64, 8, 3)}
# Not dkdv, though it is 1.1 to 1.3 times as fast specialised: under Triton 3.6 its dk gets NaN now and then, mostly
# with a soft cap. The cause is not known.
_SM90_SPECIALIZED = {("forward", 1): _specialized(128, 128, 2), ("dq", 1): _specialized(128, 64, 2)}
# Not measured: chosen so that nothing spills inside a loop.
_SM80 = {
    "forward": (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    "dkdv": (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 1)),
    "dq": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
}
# No tensor cores in full precision: small tiles, since every multiply-add is unrolled.
_FP32 = {
    "forward": (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    "dkdv": (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    "dq": (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
