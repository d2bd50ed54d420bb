"""A schedule as a grid of steps and ranks, for people."""

from __future__ import annotations

from .data import Block, Schedule, Step


def _names(block: Block) -> str:
    return ",".join(str(chunk) for chunk in block.chunks)


def _cell(step: Step) -> str:
    work = [f"q{_names(t.query)} k{_names(t.key)} {t.kind.value[0]}" for t in step.tasks]
    work += [f"+{m.kind.value}{_names(m.block)}" for m in step.merges]
    moves = [f"{t.kind.value}{_names(t.block)}{'~' * (t.steps - 1)}>{t.peer}" for t in step.sends]
    return " ; ".join(work or ["-"]) + (f"  [{' '.join(moves)}]" if moves else "")


def format_schedule(schedule: Schedule) -> str:
    """One row per step, one column per rank: tasks (query chunks, key chunks, first letter of the mask kind), merges
    (``+``) and, in brackets, what the rank sends meanwhile (``>`` its receiver; ``~`` for every step more that it may
    take)."""
    header = ["step", *(f"rank {r}" for r in range(schedule.world_size))]
    rows = [[str(s), *(_cell(cell) for cell in row)] for s, row in enumerate(schedule.steps)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in [header, *rows]]
    direction = "backward" if schedule.backward else "forward"
    return "\n".join([f"{schedule.method}, {direction}, {schedule.mask}", *lines])
