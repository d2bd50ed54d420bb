"""Result files as rows that are all alike: who did what in which case, how that is known, and how it compares.

Standard library only. ``rows_of`` reads a file that ``files.read`` accepts; ``lines`` are JSON lines of rows; ``table``
prints them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from files import SCHEMAS, read

GIB = 2**30

KINDS = {
    "measured": "a clock or an allocator's counter, on the machine of the row",
    "simulated": "measured step times, played through a schedule with a link that is not there",
    "computed": "from measured parts: fewer layers, or one rank of several, scaled to the whole",
    "predicted": "by the planner, from rates and sizes; nothing of the row was run",
    "published": "by others, on their machine",
}


@dataclass(frozen=True)
class Row:
    part: str
    case: str
    who: str
    quantity: str
    unit: str
    kind: str
    value: float
    low: float | None = None
    """With ``high`` the spread over rounds."""
    high: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    """How many times faster (or higher) than each peer of the same run."""
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}")


Rows = Iterator[Row]


def _speed(part: str, case: str, who: str, result: dict[str, Any], ratios: dict[str, float]) -> Row:
    key, unit = ("tflops", "TFLOP/s") if "tflops" in result else ("ms", "ms")
    x = result[key]
    quantity = "speed" if key == "tflops" else "time"
    return Row(part, case, who, quantity, unit, "measured", x["median"], x["min"], x["max"], ratios)


def _attention(payload: dict[str, Any]) -> Rows:
    for row in payload["rows"]:
        case = f"{row['case']}, {row['direction']}"
        for who, result in row["results"].items():
            yield _speed("attention", case, who, result, row["ratios"].get(who, {}))
        for who, size in row.get("peak_bytes", {}).items():
            yield Row("attention", case, who, "peak memory above inputs", "GiB", "measured", size / GIB)
    for row in payload["carry"]:
        case = f"{row['case']}, {row['direction']}, {row['backend']}"
        for who, result in row["results"].items():
            yield _speed("attention", case, f"carry: {who}", result, {})


def _grouped(payload: dict[str, Any]) -> Rows:
    for row in payload["rows"]:
        first = next(iter(row["results"]))
        for who, result in row["results"].items():
            ratios = {} if who == first else {first: row["rate"][who]}
            yield _speed("grouped", f"{row['case']}, {row['direction']}", who, result, ratios)


def _ring(payload: dict[str, Any]) -> Rows:
    heads = f"{payload['nheads']}:{payload['nheads_kv']} heads"
    for row in payload["rows"]:
        if row.get("peak_bytes"):
            case = f"W {row['world_size']}, {row['tokens_per_gpu']} tokens per GPU, {heads}, both"
            who = f"{row['method']}, {row['backend']}"
            yield Row("ring", case, who, "peak memory above inputs", "GiB", "measured", row["peak_bytes"] / GIB)
        for direction in ("forward", "backward", "both"):
            x = row[direction]
            case = f"W {row['world_size']}, {row['tokens_per_gpu']} tokens per GPU, {heads}, {direction}"
            who = f"{row['method']}, {row['backend']}"
            low, high = x.get("slowest_rounds_ms", (None, None))
            note = f"transfers stand in: {payload['transfers']}"
            yield Row("ring", case, who, "slowest rank", "ms", "measured", x["slowest_ms"], low, high, {}, note)
            share = {"one GPU / W": x["of_ideal"]}
            yield Row("ring", case, who, "of ideal", "%", "measured", 100 * x["of_ideal"], ratios=share, note=note)
            link = f"makespan at {payload['link']:g} GB/s"
            yield Row("ring", case, who, link, "ms", "simulated", x["makespan_link_ms"])


def _loss(payload: dict[str, Any]) -> Rows:
    for row in payload["linear"]:
        case = f"{row['case']}, from hidden states"
        for who, result in row["results"].items():
            yield _speed("loss", case, who, result, row["ratios"].get(who, {}))
        for who, size in row["memory"].items():
            used = size["above_gradients"] / GIB
            yield Row("loss", case, who, "peak memory above gradients", "GiB", "measured", used)
    for row in payload["logits"]:
        for who, result in row["results"].items():
            yield _speed("loss", f"{row['case']}, from logits", who, result, row["ratios"].get(who, {}))


def _memory(payload: dict[str, Any]) -> Rows:
    who = f"attention {payload['attention']}, activations {payload['activations']}"
    for row in [*payload["rows"], *payload.get("longest", {}).get("tried", [])]:
        case = f"{payload['model']}, {row['context'] // 1024}K, one rank of {payload['gpus']}"
        if "peak_bytes" not in row:
            continue
        note = "other ranks stand in"
        yield Row("memory", case, who, "peak memory", "GiB", "measured", row["peak_bytes"] / GIB, note=note)
        yield Row("memory", case, who, "host memory", "GiB", "measured", row["host_bytes"] / GIB, note=note)
        if "step_ms" in row:
            rounds = row.get("step_rounds_ms", [])
            low, high = (min(rounds) / 1e3, max(rounds) / 1e3) if rounds else (None, None)
            layers = "from one and two layers, transfers hidden"
            yield Row("memory", case, who, "step", "s", "computed", row["step_ms"] / 1e3, low, high, {}, layers)


def _one_rank(payload: dict[str, Any]) -> Rows:
    for row in payload["rows"]:
        theirs = row["theirs"]
        if theirs:
            case = f"{row['row']}, {payload['model']}"
            yield Row("one_rank", case, "EasyContext, 8 x A100", "MFU", "%", "published", 100 * theirs[1])
            yield Row("one_rank", case, "EasyContext, 8 x A100", "tokens/s", "1/s", "published", theirs[0])
        for x in [*([row["measured"]] if "mfu" in row["measured"] else []), *row["predictions"]]:
            case = f"{row['row']}, {payload['model']}"
            who = f"ours, {payload['gpus']} x {x['gpu']}"
            ratios = {"EasyContext": x["mfu"] / theirs[1]} if theirs else {}
            yield Row("one_rank", case, who, "MFU", "%", x["kind"], 100 * x["mfu"], ratios=ratios, note=x["note"])
            yield Row("one_rank", case, who, "tokens/s", "1/s", x["kind"], x["tokens_per_second"], note=x["note"])


def _throughput(payload: dict[str, Any]) -> Rows:
    for row in payload["rows"]:
        if "mfu" not in row:
            continue
        case = f"{row['row']}, {row['context']} tokens, {row['layers']} of {row['of_layers']} layers"
        who = f"ours, {payload['gpus']} GPUs"
        ratios = {"EasyContext": row["mfu"] / row["theirs"][1]} if row["theirs"] else {}
        seconds = row["step_seconds"]
        yield Row("throughput", case, who, "step", "s", "measured", row["step_s"], min(seconds), max(seconds))
        yield Row("throughput", case, who, "MFU", "%", "measured", 100 * row["mfu"], ratios=ratios)


def _ranks(payload: dict[str, Any]) -> Rows:
    for length in payload["lengths"]:
        for x in length["rows"]:
            case = f"{payload['gpus']} ranks, {length['tokens_per_gpu']} tokens per GPU, {x['direction']}"
            ms = x["slowest_ms"]
            spread = (ms["median"], ms["min"], ms["max"])
            ratios = {} if x["method"] == "zigzag" else {"zigzag": 1 / x["of_zigzag"]}
            yield Row("ranks", case, x["method"], "slowest rank", "ms", "measured", *spread, ratios)
            kind = "measured" if x["ideal"] == "measured" else "computed"
            yield Row("ranks", case, x["method"], "of ideal", "%", kind, 100 * x["of_ideal"])


def _soak(payload: dict[str, Any]) -> Rows:
    for x in payload["verdicts"]:
        case = f"{payload['options']['calls']} calls, {payload['ranks']} ranks, {payload['transport']}"
        note = f"limit {x['limit']}: {'holds' if x['holds'] else 'BROKEN'}"
        yield Row("soak", case, "ours", x["rule"], "", "measured", float(x["after"]), note=note)


def _scale(payload: dict[str, Any]) -> Rows:
    for x in payload["rows"]:
        if "mfu" in x:
            case = f"{payload['setting'].split(',')[0]}, {x['gpus']} GPUs, {x['context'] // 1024}K"
            yield Row("scale", case, x["method"], "MFU", "%", "predicted", 100 * x["mfu"])


def _calibrate(payload: dict[str, Any]) -> Rows:
    for what, unit in (("gemm_tflops", "TFLOP/s"), ("copy_gbps", "GB/s"), ("host_gbps", "GB/s"), ("launch_us", "us")):
        low, high = payload["spread"].get(what, (None, None))
        yield Row("calibrate", payload["name"], "ours", what, unit, "measured", payload[what], low, high)
    for headdim, curves in payload["attention"].items():
        for direction, points in curves.items():
            for size, rate in points:
                low, high = payload["spread"].get(f"attention {headdim} {direction} {size:.0f}", (None, None))
                case = f"{payload['name']}, {size:g} tokens, {direction}, head dimension {headdim}"
                yield Row("calibrate", case, "ours", "speed", "TFLOP/s", "measured", rate, low, high)
    for words, rate in payload["head"]:
        low, high = payload["spread"].get(f"head {words:.0f}", (None, None))
        case = f"{payload['name']}, loss of {words:g} words"
        yield Row("calibrate", case, "ours", "speed", "TFLOP/s", "measured", rate, low, high)


READERS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "attention": _attention, "grouped": _grouped, "ring": _ring, "loss": _loss, "memory": _memory,
    "one_rank": _one_rank, "throughput": _throughput, "ranks": _ranks, "soak": _soak, "scale": _scale,
    "calibrate": _calibrate,
}  # fmt: skip


def rows_of(payload: dict[str, Any]) -> list[Row]:
    return list(READERS[payload["part"]](payload))


def missing(payload: dict[str, Any]) -> list[str]:
    """Who did not take part where, and why."""
    found = []
    for what, why in payload.get("skipped", {}).items():
        absent = "not installed: " if "No module named" in why else ""
        found.append(f"not measured: {what}: {absent}{why}")
    return found


def lines(path: Path, part: str) -> list[str]:
    """A file's rows as JSON lines; each says who measured, so that a line can be read by itself."""
    payload = read(path, part)
    # Parts that are resumed say who measured in every row or length.
    each = [x["machine"] for x in payload.get("rows", payload.get("lengths", [])) if "machine" in x]
    machine = payload.get("machine") or (each[-1] if each else {})
    head = {"schema": SCHEMAS[part].version, "file": path.name}
    head |= {key: machine.get(key) for key in ("gpu", "torch", "commit", "date")}
    return [json.dumps(asdict(row) | head) for row in rows_of(payload)]


def _number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    header = ["case", "who", "what", "value", "spread", "known by", "times a peer's", "note"]
    cells = [header]
    for x in rows:
        spread = "" if x.low is None or x.high is None else f"{_number(x.low)}-{_number(x.high)}"
        ratios = ", ".join(f"{who} {ratio:.2f}" for who, ratio in x.ratios.items())
        value = f"{_number(x.value)} {x.unit}".rstrip()
        cells.append([x.case, x.who, x.quantity, value, spread, x.kind, ratios, x.note])
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells)
