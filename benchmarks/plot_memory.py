"""Draws what benchmarks/memory.py found: peak memory per GPU against context, one line per setting.

python3 benchmarks/plot_memory.py benchmarks/results/memory --out docs/memory.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of JSON files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--capacity", type=float, default=79.2, help="GiB that a GPU has")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    drawn = 0
    for path in sorted(arguments.results.glob("*.json")):
        payload = json.loads(path.read_text())
        rows = [*payload["rows"], *payload.get("longest", {}).get("tried", [])]
        points = sorted((row["context"] / 1024, row["peak_bytes"] / GIB) for row in rows if "peak_bytes" in row)
        if not points:
            continue
        label = f"{payload['model']}: attention {payload['attention']}, activations {payload['activations']}"
        axes.plot(*zip(*points), marker="o", label=label)
        drawn += 1
    if not drawn:
        parser.error(f"expected result files of memory.py in {arguments.results}, got none with a peak")
    axes.axhline(arguments.capacity, color="black", linestyle="--", linewidth=1, label="80 GB GPU")
    axes.set(
        xlabel="context (K tokens), one rank of 8", ylabel="peak memory per GPU (GiB)", ylim=(0, None), xlim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
