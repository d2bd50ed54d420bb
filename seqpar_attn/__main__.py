"""``python -m seqpar_attn COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import info
from .planner import command as plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m seqpar_attn", description="Sequence-parallel exact attention.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (info, plan):  # each adds its own subcommand
        module.add_command(commands)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
