"""Result files: one writer, a schema number for every part, and a reader that refuses what it would misread.

Standard library only, so that tables and pictures are made from files where there is no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Schema:
    """``version`` grows when fields change. ``fields``: what a payload must have; ``rows``: per list of rows, what each
    of them must have."""

    version: int
    fields: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    also: tuple[int, ...] = ()
    """Older versions that can be read: they lack fields that no reader needs, and the others mean the same."""


SCHEMAS = {
    "attention": Schema(
        1,
        ("machine", "skipped"),
        {
            "rows": ("shape", "case", "direction", "difference", "results", "ratios"),
            "carry": ("shape", "case", "direction", "backend", "results", "cost"),
        },
    ),
    "grouped": Schema(1, ("machine", "backend"), {"rows": ("case", "direction", "results", "rate")}),
    "ring": Schema(
        1,
        ("machine", "link", "nheads", "nheads_kv", "headdim", "transfers"),
        {"rows": ("tokens_per_gpu", "method", "backend", "world_size", "rounds", "forward", "backward", "both")},
    ),
    "loss": Schema(
        1,
        ("machine", "skipped"),
        {
            "linear": ("shape", "case", "error", "results", "memory", "ratios"),
            "logits": ("shape", "case", "results", "gb_per_s", "of_copy", "ratios"),
        },
    ),
    "memory": Schema(
        1, ("machine", "model", "gpus", "attention", "activations", "tile_mlp", "peak"), {"rows": ("context",)}
    ),
    "one_rank": Schema(
        1,
        ("machine", "model", "gpus", "peak", "checked"),
        {"rows": ("row", "context", "tokens_per_gpu", "theirs", "measured", "predictions")},
    ),
    "throughput": Schema(
        1, ("gpus", "dry", "model", "peak"), {"rows": ("row", "context", "layers", "of_layers", "theirs", "machine")}
    ),
    "ranks": Schema(4, ("gpus", "dry", "backend"), {"lengths": ("tokens_per_gpu", "machine", "rows")}, also=(2, 3)),
    "soak": Schema(
        1,
        ("machine", "ranks", "transport", "options"),
        {"samples": ("call", "memory", "checks"), "verdicts": ("rule", "holds")},
    ),
    "scale": Schema(1, ("predicted", "setting", "sources"), {"rows": ("predicted", "gpus", "context", "method")}),
    "smollm2": Schema(1, ("machine", "model", "ranks", "methods", "logits", "gradients"), {}),
    "calibrate": Schema(1, ("name", "attention", "sources", "machine", "spread"), {}),
}
"""Of "calibrate" the planner reads the file as well (``seqpar_attn.planner.calibration``): a test holds the numbers
together."""


def stamp(part: str) -> dict[str, Any]:
    """The fields that say how to read a file; they come first in it."""
    return {"schema": SCHEMAS[part].version, "part": part}


def check(payload: Any, part: str, where: str) -> dict[str, Any]:
    """``payload`` if it is a result of ``part`` with today's schema, else ValueError."""
    schema = SCHEMAS[part]
    found = (payload.get("part"), payload.get("schema")) if isinstance(payload, dict) else (None, None)
    if found not in [(part, version) for version in (schema.version, *schema.also)]:
        raise ValueError(
            f"expected {where} to be a result of {part!r} with schema {schema.version}, got {found[0]!r} with schema "
            f"{found[1]!r}: measure again, or read it with the commit that wrote it"
        )
    missing = [key for key in (*schema.fields, *schema.rows) if key not in payload]
    for rows, keys in schema.rows.items():
        missing += [
            f"{key} in {rows}[{n}]" for n, x in enumerate(payload.get(rows, ())) for key in keys if key not in x
        ]
    if missing:
        raise ValueError(f"expected {where} to have what schema {schema.version} of {part!r} has, got no {missing[0]}")
    found_payload: dict[str, Any] = payload
    return found_payload


def read(path: Path, part: str) -> dict[str, Any]:
    """ValueError for a file of another part or schema, or that is no JSON."""
    try:
        payload = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected {path} to be a result of {part!r}, got {error}") from error
    return check(payload, part, str(path))


def write(out: Path, part: str, payload: dict[str, Any], text: str, name: str | None = None) -> None:
    """``NAME.json`` and ``NAME.md`` in ``out``; NAME is the part's unless said. Nothing is written that ``read`` would
    refuse."""
    payload = check(stamp(part) | payload | stamp(part), part, "what is written")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name or part}.json").write_text(json.dumps(payload, indent=1) + "\n")
    (out / f"{name or part}.md").write_text(text + "\n")


def known(path: Path, part: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left in ``path``, if it measured with the same settings. A file that ``read`` refuses is not
    replaced: ValueError."""
    if not path.exists():
        return None
    found = read(path, part)
    return found if all(found.get(key) == value for key, value in settings.items()) else None
