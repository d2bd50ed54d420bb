"""Sequence-parallel attention on several GPUs, one process each over NCCL, against one GPU's time divided by them.

    python3 benchmarks/ranks.py --out benchmarks/results/ranks                 # all GPUs, all methods, beside peers
    python3 benchmarks/ranks.py --out out/dry --dry-run --gpus 3               # tiny, on a CPU

Every contender is compared with our zigzag before it is timed, and zigzag with one GPU where that holds the sequence.
"of ideal" is (one GPU's call on the whole sequence) / GPUs / (slowest rank of a round), the median over rounds in which
all take turns. All GPUs run the one-GPU call at the same time, so that they share power and cooling as in the other
rows; rank 0's time counts. Beyond --longest-single tokens the call is on so many only, and its time is multiplied by
the square of what is missing; such rows say "computed". "hidden" is 1 - (the time that a rank's computation stands
still for transfers) / (the same schedule with nothing computed): the share of the transfers' own time that is not
waited for. "computation ms" is that of the same schedule with nothing moved; from it a step differs by the cards'
power, too. "host ms" is what Python and the driver's calls take per call, the slowest rank's. "copy engines" is the
symmetric transport.
Peers: ring-flash-attention, where it is installed (benchmarks/flash_attn_stand_in.py), and torch's context_parallel.
A length that --out has is left out, unless --force.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import clocks, describe, machine, markdown  # first: finds the checkout

# isort: split
import many
import torch
from files import known, stamp, write
from rank_contenders import REFERENCE, Problem
from rank_times import SINGLE, WATCHED, Options, run

DIRECTIONS = ("forward", "backward", "both")


def _slowest(ranks: Sequence[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """Per round."""
    own = [dict(rank["times"][name]) for rank in ranks]
    for times in own:
        # A rank's two directions add up; the slowest in one need not be the slowest in the other.
        for what in [name.removesuffix("forward") for name in times if name.endswith("forward")]:
            times[f"{what}both"] = [a + b for a, b in zip(times[f"{what}forward"], times[f"{what}backward"])]
    return {name: [max(x) for x in zip(*(times[name] for times in own))] for name in own[0]}


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def rows(ranks: list[dict[str, Any]], problem: Problem) -> list[dict[str, Any]]:
    """What a length's results amount to."""
    first, count = ranks[0], len(ranks)
    seqlen, single_tokens = problem.tokens * count, first["single_tokens"]
    scale = (seqlen / single_tokens) ** 2 / count
    single = _slowest([first], SINGLE)
    reference = _slowest(ranks, REFERENCE)
    found: list[dict[str, Any]] = []
    apart = [name for name in first["times"] if name.endswith(" alone")]
    for name in first["times"]:
        if name == SINGLE or name in apart:
            continue
        times = _slowest(ranks, name)
        for direction in DIRECTIONS:
            ms, ideal = times[direction], [x * scale for x in single[direction]]
            row: dict[str, Any] = {
                "method": name, "direction": direction,
                "ideal_ms": statistics.median(ideal), "ideal": "measured" if seqlen == single_tokens else "computed",
                "slowest_ms": {"median": statistics.median(ms), "min": min(ms), "max": max(ms)},
                "of_ideal": _ratio(ideal, ms),
                "tflops_per_gpu": problem.flops(seqlen, direction) / count / statistics.median(ms) / 1e9,
                "of_zigzag": _ratio(ms, reference[direction]),
                "host_ms": statistics.median(times[f"host {direction}"]),
            }  # fmt: skip
            if f"{name}, computation alone" in apart:
                alone = _slowest(ranks, f"{name}, computation alone")[direction]
                moved = _slowest(ranks, f"{name}, transfers alone")[direction]
                waited = _slowest(ranks, f"{name}, {WATCHED}")[f"waited {direction}"]
                row["computation_ms"], row["transfers_ms"] = statistics.median(alone), statistics.median(moved)
                row["waiting_ms"] = statistics.median(waited)
                row["not_waited_for"] = statistics.median(1 - x / y for x, y in zip(waited, moved))
            found.append(row)
    return found


def render(payload: dict[str, Any]) -> str:
    header = ["tokens/GPU", "method", "direction", "ideal ms", "slowest rank ms (spread)", "of ideal", "TFLOP/s/GPU"]
    header += ["time / zigzag's", "host ms", "computation ms", "transfers ms", "waiting ms", "hidden"]
    lines, notes = [], []
    for length in payload["lengths"]:
        tokens = str(length["tokens_per_gpu"])
        for x in length["rows"]:
            ms = x["slowest_ms"]
            cells = [tokens, x["method"], x["direction"]]
            cells += [f"{x['ideal_ms']:.2f}{' computed' if x['ideal'] == 'computed' else ''}"]
            cells += [f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})", f"{100 * x['of_ideal']:.1f}%"]
            cells += [f"{x['tflops_per_gpu']:.0f}", f"{x['of_zigzag']:.3f}", f"{x['host_ms']:.2f}"]
            if "not_waited_for" in x:
                cells += [f"{x[key]:.2f}" for key in ("computation_ms", "transfers_ms", "waiting_ms")]
                cells += [f"{100 * x['not_waited_for']:.1f}%"]
            lines.append(cells + [""] * (len(header) - len(cells)))
        notes.append(f"{tokens} tokens per GPU, {length['rounds']} rounds: {describe(length['machine'])}")
        worst = ", ".join(f"{name} {max(x):.1e}" for name, x in length["checks"].items())
        notes.append(f"  largest relative difference of out, dq, dk, dv from zigzag's: {worst}.")
        notes += [f"  {name}: {note}." for name, note in length["notes"].items()]
        notes += [f"  {name} did not take part: {why}." for name, why in length["absent"].items()]
    dry = "REHEARSAL on a CPU over gloo: these figures mean nothing. " if payload["dry"] else ""
    transport = "gloo" if payload["dry"] else "NCCL"
    title = (
        f"{dry}{payload['gpus']} ranks, {transport}; our backend {payload['backend']}, {payload['nheads']}/"
        f"{payload['nheads_kv']} heads of {payload['headdim']}, causal."
    )
    return "\n".join([title, "", markdown(header, lines), "", *notes])


def earlier(path: Path, settings: dict[str, Any], but: Sequence[int] = ()) -> dict[str, Any]:
    """What an earlier run left, if it measured the same; ``but`` for these lengths."""
    found = known(path, "ranks", settings) or {**settings, "lengths": []}
    return found | {"lengths": [x for x in found["lengths"] if x["tokens_per_gpu"] not in but]}


def main() -> None:
    parser = many.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 32768, 131072], help="per GPU")
    parser.add_argument("--nheads", type=int, default=32)
    parser.add_argument("--nheads-kv", type=int, default=8)
    parser.add_argument("--headdim", type=int, default=128)
    parser.add_argument("--backend", default="auto", help="whose kernels")
    parser.add_argument("--rounds", type=int, default=15, help="fewer where a length takes long, at least 3")
    parser.add_argument("--seconds", type=float, default=70, help="that a length's rounds may take")
    parser.add_argument("--longest-single", type=int, default=262144, help="tokens that one GPU attends")
    a: argparse.Namespace = parser.parse_args()
    count = many.count(parser, a)
    if a.dry_run:
        a.tokens, a.rounds, a.longest_single = [64], 3, 200
        a.nheads, a.nheads_kv, a.headdim = 4, 2, 16
    settings = {key: getattr(a, key) for key in ("nheads", "nheads_kv", "headdim", "backend")}
    settings |= stamp("ranks") | {"gpus": count, "dry": a.dry_run}
    name = many.name("ranks", count, a.dry_run)
    try:
        payload = earlier(a.out / f"{name}.json", settings, a.tokens if a.force else ())
    except ValueError as error:
        parser.error(str(error))
    options = Options(a.rounds, a.seconds, a.longest_single, a.dry_run)
    with many.pool(count, a.dry_run, timeout=500) as pool:
        for tokens in a.tokens:
            if any(x["tokens_per_gpu"] == tokens for x in payload["lengths"]):
                continue
            problem = Problem(tokens, a.nheads, a.nheads_kv, a.headdim, torch.bfloat16, a.backend)
            header = machine(a.commit)
            ranks = pool.run(run, problem, options)
            header["clocks_after"] = clocks()
            first = ranks[0]
            length = {"tokens_per_gpu": tokens, "machine": header, "rounds": len(first["times"][SINGLE]["forward"])}
            length |= {key: first[key] for key in ("single_tokens", "checks", "absent", "notes", "calls", "peak_bytes")}
            length["options"] = asdict(options)
            payload["lengths"].append(length | {"rows": rows(ranks, problem)})
            payload["lengths"].sort(key=lambda x: x["tokens_per_gpu"])
            write(a.out, "ranks", payload, render(payload), name)
            print(f"{tokens} tokens per GPU: done", flush=True)
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
