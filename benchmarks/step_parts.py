"""Where the time of a training step goes, by torch's profiler: seconds per kind of kernel, and with nothing running."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("NCCL", ("nccl",)),
    ("attention", ("forward_kernel", "backward_kernel", "backward_wide", "finish_dq", "merge", "delta")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma")),
)
"""By parts of kernels' names; the first that fits. What fits none is elementwise."""

Interval = tuple[float, float]


def kind_of(event: dict[str, Any]) -> str:
    if event["cat"] == "gpu_memcpy":
        return "copies to and from the host" if "HtoD" in event["name"] or "DtoH" in event["name"] else "copies"
    if event["cat"] == "gpu_memset":
        return "elementwise"
    name = event["name"].lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "elementwise")


def covered(intervals: Iterable[Interval]) -> float:
    """Length of their union."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def parts(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds, of a Chrome trace's events. Kinds overlap; "nothing" is the time without any of them but copies to and
    from the host, which have engines of their own."""
    found: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            found[kind_of(event)].append((event["ts"], event["ts"] + event["dur"]))
    if not found:
        return {}
    everything = [x for each in found.values() for x in each]
    span = max(end for _, end in everything) - min(begin for begin, _ in everything)
    busy = covered(x for kind, each in found.items() if kind != "copies to and from the host" for x in each)
    alone = {kind: covered(each) for kind, each in sorted(found.items())}
    # Time in which NCCL runs and attention and products do not is what transfers cost.
    work = [x for kind in ("attention", "matrix products", "elementwise") for x in found.get(kind, [])]
    alone["NCCL and nothing else"] = covered([*work, *found.get("NCCL", [])]) - covered(work)
    return {kind: us / 1e6 for kind, us in (alone | {"nothing": span - busy, "all": span}).items()}


def of_step(step: Callable[[], Any]) -> dict[str, Any]:
    """:func:`parts` of one call, and what the allocator had to do for it."""
    before = torch.cuda.memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        found: dict[str, Any] = dict(parts(json.loads(path.read_text())["traceEvents"]))
    for name in ("num_alloc_retries", "num_device_alloc", "num_device_free"):
        found[name] = after.get(name, 0) - before.get(name, 0)
    return found
