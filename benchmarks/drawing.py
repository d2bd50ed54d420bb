"""Pictures of results. A PNG carries a fingerprint of the files that it was drawn from, so a stale one is found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from files import read
from rows import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GIB = 2**30
KEY = "Fingerprint"
NAMES = {
    "cuda": "ours, CUDA", "triton": "ours, Triton", "fa4": "FlashAttention-4", "cudnn": "cuDNN",
    "flex": "FlexAttention", "fa2": "FlashAttention-2",
}  # fmt: skip
METHODS = {"ring": "single ring", "double_ring": "double ring", "usp": "USP", "ulysses": "Ulysses"}


def fingerprint(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def fingerprint_of(picture: Path) -> str | None:
    """Of the files that ``picture`` was drawn from."""
    from PIL import Image

    with Image.open(picture) as image:
        found = image.info.get(KEY)
    return None if found is None else str(found)


def _save(figure: Any, path: Path, sources: Sequence[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={KEY: fingerprint(sources), "Software": None})
    plt.close(figure)


def bars(rows: Sequence[Row], path: Path, title: str, sources: Sequence[Path]) -> bool:
    """The quantity that most rows have, a bar each, with its spread; hatched where it is not measured. False if no
    quantity has two rows."""
    names = [row.quantity for row in rows]
    quantity = max(names, key=names.count) if names else ""
    # Of long tables the first: a picture is for a look.
    chosen = [row for row in rows if row.quantity == quantity][:40]
    if len(chosen) < 2:
        return False
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.28 * len(chosen)), layout="constrained")
    for y, row in enumerate(chosen):
        hatch = None if row.kind == "measured" else "//"
        axes.barh(y, row.value, color=f"C{sorted({x.who for x in chosen}).index(row.who) % 10}", hatch=hatch, alpha=0.8)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color="black", linewidth=1)
    labels = [f"{row.case}: {row.who}{'' if row.kind == 'measured' else f' ({row.kind})'}" for row in chosen]
    axes.set_yticks(range(len(chosen)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=f"{quantity}, {chosen[0].unit}; lines: spread over rounds; hatched: not measured", title=title)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path, sources)
    return True


def attention(source: Path, path: Path) -> None:
    """TFLOP/s of all contenders at head dimension 128, forward and backward."""
    payload = read(source, "attention")
    figure, both = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, direction in zip(both, ("forward", "backward")):
        rows = [
            row
            for row in payload["rows"]
            if row["direction"] == direction and row["shape"]["headdim"] == 128 and row["shape"]["nheads_kv"] == 32
        ]
        who = [name for name in NAMES if any(name in row["results"] for row in rows)]
        width = 0.8 / len(who)
        for n, name in enumerate(who):
            found = [(x, row["results"][name]["tflops"]) for x, row in enumerate(rows) if name in row["results"]]
            at = [x + (n - (len(who) - 1) / 2) * width for x, _ in found]
            medians = [speed["median"] for _, speed in found]
            spread = [[y["median"] - y["min"] for _, y in found], [y["max"] - y["median"] for _, y in found]]
            axes.bar(at, medians, width, yerr=spread, label=NAMES[name], error_kw={"linewidth": 0.7})
        labels = [f"{row['shape']['seqlen']}\n{row['shape']['mask']}" for row in rows]
        axes.set_xticks(range(len(rows)), labels)
        axes.set(title=direction)
        axes.grid(axis="y", alpha=0.3)
    both[0].set_ylabel("TFLOP/s, median and spread")
    both[0].legend(ncols=2, fontsize=8, loc="lower left")
    figure.suptitle(f"One call, 32 heads of 128, {payload['machine']['gpu']}: measured, all in one run")
    _save(figure, path, [source])


def memory(sources: Sequence[Path], path: Path, capacity: float = 79.2) -> None:
    """Peak memory per GPU against context, a line per setting. ``capacity``: GiB of a GPU."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = {}
    for source in sources:
        payload = read(source, "memory")
        label = f"{payload['model']}: attention {payload['attention']}, activations {payload['activations']}"
        rows = [*payload["rows"], *payload.get("longest", {}).get("tried", [])]
        points = [(row["context"] / 1024, row["peak_bytes"] / GIB) for row in rows if "peak_bytes" in row]
        lines[label] = sorted([*lines.get(label, []), *points])
    for label, points in lines.items():
        axes.plot(*zip(*points), marker="o", label=label)
    axes.axhline(capacity, color="black", linestyle="--", linewidth=1, label="80 GB GPU")
    axes.set(xlabel="context (K tokens), one rank of 8", ylabel="peak memory per GPU (GiB), measured")
    axes.set(ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path, sources)


def scale(source: Path, path: Path) -> None:
    """MFU against the number of GPUs, predicted."""
    payload = read(source, "scale")
    rows = payload["rows"]
    contexts = sorted({r["context"] for r in rows})
    figure, grid = plt.subplots(
        1, len(contexts), figsize=(4 * len(contexts), 4), layout="constrained", sharey=True, squeeze=False
    )
    for ax, context in zip(grid[0], contexts):
        for method, name in METHODS.items():
            found = [r for r in rows if r["context"] == context and r["method"] == method and "mfu" in r]
            ax.plot([r["gpus"] for r in found], [100 * r["mfu"] for r in found], marker="o", label=name)
        ticks = sorted({r["gpus"] for r in rows})
        ax.set(xscale="log", xlabel="GPUs", title=f"{context >> 20}M tokens", ylim=(0, None))
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    grid[0][0].set_ylabel("MFU in %, predicted")
    grid[0][0].legend()
    figure.suptitle(f"{payload['setting']}; predicted, not measured")
    _save(figure, path, [source])
