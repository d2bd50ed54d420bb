"""GPUs and links by their rates: each figure says whether it was measured, published or assumed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

SOURCES = ("measured", "published", "assumed")

Curve = tuple[tuple[float, float], ...]
"""Points ``(size, rate)`` by growing size; between them rates follow the size's logarithm, beyond them they stay."""


def on_curve(curve: Curve, size: float) -> float:
    """The rate at ``size``."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (low, before), (high, after) in itertools.pairwise(curve):
        if size <= high:
            return before + (after - before) * math.log(size / low) / math.log(high / low)
    return curve[-1][1]


@dataclass(frozen=True)
class Attention:
    """TFLOP/s of one attention call by its tokens, at 4 (forward) and 10 (backward) operations per attended pair,
    head and element of the head dimension."""

    forward: Curve
    backward: Curve


@dataclass(frozen=True, eq=False)
class Gpu:
    """One device. Rates are those of work that lasts: of calls long enough to reach the card's power limit."""

    name: str
    memory_gib: float
    """What torch reports in all."""
    peak_tflops: float
    """Dense bf16: what MFU is a share of."""
    attention: dict[int, Attention]
    """By head dimension."""
    gemm_tflops: float
    copy_gbps: float
    """Device memory, read and written bytes together, GB/s."""
    host_gbps: float
    """Page-locked host memory, GB/s in one direction."""
    head: Curve
    """TFLOP/s of linear_cross_entropy by words of the vocabulary: 6 operations per token and weight, all included."""
    launch_us: float
    """Host and device time between two kernels that wait for each other."""
    sources: dict[str, str]
    """Field -> "measured", "published" or "assumed", and of what."""

    def attention_of(self, headdim: int) -> tuple[Attention, int]:
        """The rates of the nearest head dimension that has some, and which that is."""
        found = min(self.attention, key=lambda d: (abs(math.log2(d / headdim)), d))
        return self.attention[found], found


@dataclass(frozen=True)
class Link:
    """``gbps``: GB/s that one GPU sends and receives at the same time, each; ``latency_us`` per message."""

    name: str
    gbps: float
    latency_us: float
    within_node: bool
    source: str


_H100 = Gpu(
    name="h100-80g",
    memory_gib=79.2,
    peak_tflops=989.0,
    attention={
        64: Attention(((4096, 485.0), (16384, 545.0)), ((4096, 452.0), (16384, 518.0))),
        128: Attention(
            ((4096, 669.0), (8192, 719.0), (262144, 717.0)), ((4096, 540.0), (8192, 584.0), (262144, 581.0))
        ),
        256: Attention(((16384, 801.0),), ((16384, 451.0),)),
    },
    gemm_tflops=708.0,
    copy_gbps=3010.0,
    host_gbps=50.0,
    head=((32000, 662.0), (128256, 651.0)),
    launch_us=20.0,
    sources={
        "memory_gib": "measured: what torch reports",
        "peak_tflops": "published: H100 SXM, dense bf16",
        "attention": "measured: results/cuda/attention.json (full masks), and for 262144 tokens, a call that lasts, "
        "the single-device call of results/cuda/peer/ring.json",
        "gemm_tflops": "measured: results/loss/loss.json, 128256 words: 3 products, the loss of rows taken off",
        "copy_gbps": "measured: results/loss/loss.json, 'copy of half'",
        "host_gbps": "assumed: PCIe 5 x16 at 80%",
        "head": "measured: results/loss/loss.json, ours_linear_ce",
        "launch_us": "measured: results/cuda/ring.json, host time per forward step",
    },
)

_A100 = Gpu(
    name="a100-80g",
    memory_gib=79.2,
    peak_tflops=312.0,
    attention={128: Attention(((16384, 200.0),), ((16384, 180.0),))},
    gemm_tflops=250.0,
    copy_gbps=1830.0,
    host_gbps=25.0,
    head=((32000, 224.0), (128256, 196.0)),
    launch_us=20.0,
    sources={
        "memory_gib": "assumed: as the H100's",
        "peak_tflops": "published: A100 SXM, dense bf16",
        "attention": "published: FlashAttention-2 on an A100, forward 200, backward 180",
        "gemm_tflops": "assumed: 80% of the peak",
        "copy_gbps": "assumed: 2039 GB/s (published), at the H100's share of its own",
        "host_gbps": "assumed: PCIe 4 x16 at 80%",
        "head": "assumed: at the H100's ratio to its matrix products",
        "launch_us": "assumed: as the H100's",
    },
)

_H200 = Gpu(
    name="h200",
    memory_gib=139.8,
    peak_tflops=989.0,
    attention=_H100.attention,
    gemm_tflops=_H100.gemm_tflops,
    copy_gbps=4310.0,
    host_gbps=50.0,
    head=_H100.head,
    launch_us=20.0,
    sources={
        "memory_gib": "assumed: 141 GB, less what the driver keeps",
        "peak_tflops": "published: H200 SXM, dense bf16",
        "attention": "assumed: as the H100's, which has the same processors",
        "gemm_tflops": "assumed: as the H100's",
        "copy_gbps": "assumed: 4800 GB/s (published), at the H100's share of its own",
        "host_gbps": "assumed: PCIe 5 x16 at 80%",
        "head": "assumed: as the H100's",
        "launch_us": "assumed: as the H100's",
    },
)

GPUS = {gpu.name: gpu for gpu in (_H100, _A100, _H200)}

LINKS = {
    link.name: link
    for link in (
        Link("nvlink4", 360.0, 10.0, True, "assumed: 80% of 450 GB/s (published)"),
        Link("nvlink3", 240.0, 10.0, True, "assumed: 80% of 300 GB/s (published)"),
        Link("ib400", 45.0, 20.0, False, "assumed: one 400 Gb/s adapter per GPU at 90%"),
        Link("ib200", 22.5, 20.0, False, "assumed: one 200 Gb/s adapter per GPU at 90%"),
    )
}

GPUS_PER_NODE = 8
"""That share ``within_node`` links."""


def find_gpu(name: str) -> Gpu:
    """ValueError that lists what there is, and how to have another."""
    if name not in GPUS:
        raise ValueError(
            f"expected gpu to be one of {', '.join(GPUS)}, got {name!r}: for another GPU, run benchmarks/calibrate.py "
            "on it and pass --calibration FILE"
        )
    return GPUS[name]


def of_device(name: str) -> Gpu | None:
    """The built-in GPU that a device's name is of, as torch reports it; None for others, such as cards of the same chip
    with other limits."""
    other = any(word in name.upper() for word in ("PCIE", "NVL", "GH200"))
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0].upper() in name.upper()]
    return found[0] if found and not other else None


def find_link(name: str) -> Link:
    if name not in LINKS:
        raise ValueError(f"expected link to be one of {', '.join(LINKS)}, got {name!r}")
    return LINKS[name]
