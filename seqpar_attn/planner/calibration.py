"""Rates of a GPU as a JSON file, which ``benchmarks/calibrate.py`` writes and plans read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hardware import Attention, Curve, Gpu

SCHEMA = 1
"""Of the file; one of another version is refused."""

_NUMBERS = ("memory_gib", "peak_tflops", "gemm_tflops", "copy_gbps", "host_gbps", "launch_us")


def to_json(gpu: Gpu, machine: dict[str, Any]) -> dict[str, Any]:
    """What the file holds; ``machine`` says who measured."""
    attention = {str(d): {"forward": a.forward, "backward": a.backward} for d, a in gpu.attention.items()}
    numbers = {name: getattr(gpu, name) for name in _NUMBERS}
    rest = {"attention": attention, "head": gpu.head, "sources": gpu.sources, "machine": machine}
    return {"schema": SCHEMA, "name": gpu.name} | numbers | rest


def _curve(points: Any, what: str) -> Curve:
    if not isinstance(points, Sequence) or not points:
        raise ValueError(f"expected {what} to be a list of [size, rate], got {points!r}")
    curve = tuple((float(size), float(rate)) for size, rate in points)
    if any(a[0] >= b[0] for a, b in itertools.pairwise(curve)) or any(min(point) <= 0 for point in curve):
        raise ValueError(f"expected {what} to have positive rates at growing sizes, got {points!r}")
    return curve


def read(path: str | Path) -> Gpu:
    """ValueError if the file is missing, of another version or not what was written."""
    path = Path(path)
    how = "write one with python3 benchmarks/calibrate.py --out FILE, or leave --calibration out for built-in rates"
    if not path.is_file():
        raise ValueError(f"expected a calibration file, got {str(path)!r}, which does not exist: {how}")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected {path} to be JSON, got {error}: {how}") from error
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA:
        raise ValueError(f"expected {path} to have schema {SCHEMA}, got {version!r}: {how}")
    try:
        attention = {
            int(d): Attention(
                _curve(a["forward"], f"attention forward, {d}"), _curve(a["backward"], f"attention backward, {d}")
            )
            for d, a in found["attention"].items()
        }
        numbers = {name: float(found[name]) for name in _NUMBERS}
        head, name = _curve(found["head"], "head"), str(found["name"])
        sources = {str(key): str(value) for key, value in found["sources"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected {path} to be what benchmarks/calibrate.py writes, got {error!r} in it") from error
    if not attention or any(value <= 0 for value in numbers.values()):
        raise ValueError(f"expected {path} to have positive rates, got {numbers} and {len(attention)} for attention")
    return Gpu(name=name, attention=attention, head=head, sources=sources, **numbers)
