"""Pictures of what the long-context examples measured.

    python examples/plots.py out/extend        # needle.csv and perplexity.csv of a folder, each to .png (and .pdf)
    python examples/plots.py needle.csv perplexity.csv --pdf

A needle.csv has the columns model, distractors, length, depth and accuracy; a perplexity.csv has model, length and
perplexity, perhaps perplexity_of_last_tokens.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

Row = dict[str, str]


def read(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a CSV file. ValueError if there are none or a column is missing."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [c for c in columns if not rows or c not in rows[0]]
    if missing:
        raise ValueError(f"expected rows with columns {', '.join(columns)} in {path}, got none of {', '.join(missing)}")
    return rows


def short(length: float) -> str:
    return f"{length / 1024:g}K" if length >= 1024 else f"{length:g}"


def heat_map(rows: list[Row]) -> Any:
    """A figure: per model and number of distractors a map of accuracy over context length and depth."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.get("model", ""), row.get("distractors", "0")) for row in rows))
    figure = Figure(figsize=(0.8 + 4.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (model, distractors) in zip(axes, panels):
        mine = [row for row in rows if (row.get("model", ""), row.get("distractors", "0")) == (model, distractors)]
        lengths = sorted({int(row["length"]) for row in mine})
        depths = sorted({float(row["depth"]) for row in mine})
        grid = [[float("nan")] * len(lengths) for _ in depths]
        for row in mine:
            grid[depths.index(float(row["depth"]))][lengths.index(int(row["length"]))] = float(row["accuracy"])
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [short(n) for n in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        mean = sum(float(row["accuracy"]) for row in mine) / len(mine)
        title = f"{model}, {distractors} distractors" if distractors != "0" else model
        axis.set(title=f"{title}: {mean:.0%} of all", xlabel="tokens")
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(axes), label="accuracy")
    return figure


def curves(rows: list[Row], limits: argparse.Namespace | None = None) -> Any:
    """A figure: perplexity against length, a line per model, and if known that of the last tokens before a length."""
    from matplotlib.figure import Figure

    last = "perplexity_of_last_tokens"
    kinds = {"perplexity": "of all tokens up to a length"}
    if last in rows[0]:
        kinds[last] = "of the last tokens before it"
    figure = Figure(figsize=(1 + 5 * len(kinds), 4.2), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items()):
        for model in dict.fromkeys(row.get("model", "") for row in rows):
            mine = sorted((int(r["length"]), float(r[kind])) for r in rows if r.get("model", "") == model)
            axis.plot(*zip(*mine), marker=".", label=model)
        lengths = sorted({int(row["length"]) for row in rows})
        axis.set(xlabel="tokens", ylabel="perplexity", title=title, xscale="log", yscale="log")
        ticks = [n for n in lengths if n & (n - 1) == 0] or lengths
        axis.set_xticks(ticks, [short(n) for n in ticks])
        axis.minorticks_off()
        values = [float(row[kind]) for row in rows]
        low, high = min(values), max(values)
        ticks = [
            t for t in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 10_000) if low * 0.8 <= t <= high * 1.2
        ]
        if len(ticks) < 3:  # all values lie close together
            ticks = sorted({float(f"{low * (high / low) ** (i / 4):.3g}") for i in range(5)})
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        if limits is not None:
            axis.set_xlim(limits.xmin, limits.xmax)
            axis.set_ylim(limits.ymin, limits.ymax)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def save(figure: Any, path: Path, pdf: bool) -> None:
    for suffix in (".png", ".pdf") if pdf else (".png",):
        figure.savefig(path.with_suffix(suffix), dpi=130)
        print(f"wrote {path.with_suffix(suffix)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="folders, or CSV files")
    parser.add_argument("--pdf", action="store_true")
    for limit in ("--xmin", "--xmax", "--ymin", "--ymax"):
        parser.add_argument(limit, type=float)
    args = parser.parse_args()
    paths = [p for path in args.paths for p in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
    for path in paths:
        if "needle" in path.name:
            save(heat_map(read(path, ("length", "depth", "accuracy"))), path, args.pdf)
        elif "perplexity" in path.name or "ppl" in path.name:
            save(curves(read(path, ("length", "perplexity")), args), path, args.pdf)


if __name__ == "__main__":
    main()
