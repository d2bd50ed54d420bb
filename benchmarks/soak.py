"""A soak: thousands of calls of random shapes, masks and methods in the same processes, and nothing may pile up.

    python3 benchmarks/soak.py --out benchmarks/results/soak               # 2000 calls on 4 ranks, gloo or NCCL
    python3 benchmarks/soak.py --out out/soak --quick                      # 100 calls
    python3 benchmarks/soak.py --out out/soak --loopback 4                 # virtual ranks of one process

Every call is forward and backward. After every 50th its results are compared with float64 attention on one device, by
the package's rule (at most 1.1 x the error of one call on one device), and memory is sampled on every rank; a process
of its own compares. The run has failed (exit status 1) if

- a comparison broke the rule;
- errors grew: per dtype, the median of (relative error / machine epsilon) over the second half of the comparisons is
  more than 1.5 x that over the first half;
- memory grew: on some rank the median over the last quarter of the samples is above that over the second quarter
  by more than a factor and a slack allow, see LIMITS. The first quarter is warm-up, in which caches fill.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from common import describe, machine, markdown  # first: finds the checkout

# isort: split
import many
import torch
from files import write
from soak_calls import NAMES, Options, draw, judge, play

MIB = 2**20


class Limit(NamedTuple):
    """What a median over the last quarter may be: ``factor`` x that over the second quarter + ``slack``."""

    name: str
    factor: float
    slack: float
    unit: float


LIMITS = {
    "rss": Limit("host RSS, MiB", 1.01, 6 * MIB, MIB),
    "blocks": Limit("Python's blocks, thousands", 1.01, 20e3, 1e3),
    "allocated": Limit("GPU allocated, MiB", 1.0, 8 * MIB, MIB),
    "reserved": Limit("GPU reserved, MiB", 1.1, 64 * MIB, MIB),
}
GROWTH = 1.5
"""Of errors."""
FEWEST = 8
"""Samples: two a quarter."""


class Verdict(NamedTuple):
    rule: str
    before: str
    after: str
    limit: str
    holds: bool


def soak(options: Options, ranks: int) -> list[dict[str, Any]]:
    """All calls; the samples."""
    samples = []
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        judges = stack.enter_context(many.pool(1, dry=True, timeout=300))
        pool = None if options.loopback else stack.enter_context(many.pool(ranks, dry=not options.cuda, timeout=300))
        for last in range(options.every, options.calls + 1, options.every):
            some = (options, ranks, range(last - options.every + 1, last + 1))
            found = [play(0, 1, *some)] if pool is None else pool.run(play, *some)
            seconds = time.perf_counter() - start
            checks = judges.run(judge, options, ranks, last, found[0]["results"])[0]
            problem = draw(options, ranks, last)
            samples.append({
                "call": last, "seconds": seconds, "problem": str(problem), "dtype": str(problem.dtype),
                "memory": [rank["memory"] for rank in found], "checks": checks,
            })  # fmt: skip
            broken = [x["broken"] for x in checks.values() if x["broken"]]
            print(f"{last} calls, {seconds:.0f} s", *broken, sep="; ", file=sys.stderr, flush=True)
    return samples


def flat(name: str, samples: Sequence[dict[str, Any]]) -> Verdict:
    """Of one kind of memory, on the rank that is nearest to the limit or farthest beyond."""
    limits = LIMITS[name]
    quarter = len(samples) // 4
    found = []
    for rank in range(len(samples[0]["memory"])):
        values = [sample["memory"][rank][name] for sample in samples]
        before, after = (statistics.median(x) for x in (values[quarter : 2 * quarter], values[-quarter:]))
        found.append((after - limits.factor * before - limits.slack, rank, before, after))
    excess, rank, before, after = max(found)
    figures = [f"{x / limits.unit:.1f}" for x in (before, after, after - excess)]
    return Verdict(f"{limits.name}, rank {rank}", *figures, excess <= 0)


def drift(samples: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Per dtype, unless it was compared so seldom that chance decides."""
    found = []
    for dtype in sorted({sample["dtype"] for sample in samples}):
        errors = [[x["roundings"] for x in s["checks"].values()] for s in samples if s["dtype"] == dtype]
        half = len(errors) // 2
        if half < 4:
            continue
        before, after = (statistics.median(x for row in rows for x in row) for rows in (errors[:half], errors[-half:]))
        figures = [f"{x:.3f}" for x in (before, after, GROWTH * before)]
        found.append(Verdict(f"error / epsilon, {dtype.removeprefix('torch.')}", *figures, after <= GROWTH * before))
    return found


def verdicts(samples: Sequence[dict[str, Any]]) -> list[Verdict]:
    broken = sum(x["broken"] is not None for sample in samples for x in sample["checks"].values())
    count = len(samples) * len(NAMES)
    rule = Verdict(f"of {count} comparisons, those that break the error rule", "", str(broken), "0", not broken)
    return [rule, *drift(samples), *(flat(name, samples) for name in samples[0]["memory"][0])]


def render(payload: dict[str, Any]) -> str:
    samples, options = payload["samples"], payload["options"]
    kinds = list(samples[0]["memory"][0])
    header = ["call", "s", *(LIMITS[kind].name for kind in kinds), "last call", "error / one device's", "worst element"]
    lines = []
    for x in samples:
        cells = [str(x["call"]), f"{x['seconds']:.0f}"]
        cells += [f"{max(rank[kind] for rank in x['memory']) / LIMITS[kind].unit:.1f}" for kind in kinds]
        ratios = {name: check["relative"] / max(check["single"], 1e-30) for name, check in x["checks"].items()}
        name = max(ratios, key=lambda name: ratios[name])
        check = x["checks"][name]
        element = f"{name}{check['worst']}: {check['actual']:.7g}, float64 {check['expected']:.7g}"
        cells += [x["problem"], f"{ratios[name]:.3f}", element + (" BROKEN" if check["broken"] else "")]
        lines.append(cells)
    rules = [[*list(x.values())[:4], "holds" if x["holds"] else "BROKEN"] for x in payload["verdicts"]]
    return "\n".join([
        f"{options['calls']} calls, forward and backward, on {payload['ranks']} ranks ({payload['transport']}), seed "
        f"{options['seed']}, up to {options['tokens']} tokens.",
        describe(payload["machine"]),
        "",
        markdown(["rule", "before", "after", "limit", ""], rules),
        "",
        "Memory: medians over the second and the last quarter of the samples, on the worst rank. Errors: over the "
        "first and the second half of the comparisons.",
        "",
        f"Drawn: {', '.join(f'{kind} {count}' for kind, count in sorted(payload['drawn'].items()))}.",
        "",
        markdown(header, lines),
        "",
        "Memory: the rank that has most.",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--loopback", type=int, metavar="RANKS", help="virtual ranks, in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="calls from one sample to the next")
    parser.add_argument("--tokens", type=int, help="of the longest sequence; default: 384, or 1024 on GPUs")
    parser.add_argument(
        "--distinct", type=int, help="problems in all: caches of what was worked out for them are full sooner"
    )
    parser.add_argument("--quick", action="store_true", help="120 calls of 9 problems, a sample every 10")
    parser.add_argument("--cpu", action="store_true", help="even if there are GPUs")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    a = parser.parse_args(arguments)
    os.environ.update(many.NO_MULTICAST)
    if a.quick:
        a.calls, a.every, a.distinct = 120, 10, 9
    if a.calls < FEWEST * a.every:
        parser.error(f"expected at least {FEWEST} samples, got {a.calls} calls with one every {a.every}")
    cuda = torch.cuda.is_available() and not a.cpu
    ranks = a.loopback or a.ranks
    options = Options(a.calls, a.every, a.seed, a.tokens or (1024 if cuda else 384), bool(a.loopback), cuda, a.distinct)
    header = machine(a.commit)
    samples = soak(options, ranks)
    transport = "loopback" if options.loopback else "nccl" if cuda else "gloo"
    drawn = Counter(kind for call in range(1, a.calls + 1) for kind in draw(options, ranks, call).kinds)
    payload = {
        "machine": header, "ranks": ranks, "transport": transport, "options": asdict(options),
        "drawn": drawn, "samples": samples, "verdicts": [x._asdict() for x in verdicts(samples)],
    }  # fmt: skip
    text = render(payload)
    write(a.out, "soak", payload, text, f"soak-{transport}-{ranks}")
    print(text, flush=True)
    return 0 if all(x["holds"] for x in payload["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
