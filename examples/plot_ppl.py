"""Perplexity against length, as eval_ppl.py measured it: a PNG and a PDF beside each CSV.

python examples/plot_ppl.py out/ppl.csv --ymax 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import plots


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", type=Path)
    for limit in ("--xmin", "--xmax", "--ymin", "--ymax"):
        parser.add_argument(limit, type=float)
    args = parser.parse_args(argv)
    for path in args.csv:
        plots.save(plots.curves(plots.read(path, ("length", "perplexity")), args), path, pdf=True)


if __name__ == "__main__":
    main()
