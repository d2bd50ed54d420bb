"""One block of attention on one GPU: our kernels beside cuDNN, FA2, FlexAttention and, if installed, FA4.

    python3 benchmarks/attention.py --out benchmarks/results
    python3 benchmarks/attention.py --out DIR --quick --shapes 1,8192,32,8,128,causal

A speed counts only as a ratio to a peer in the same run on the same GPU: contenders take turns, inputs rotate, and
every result is compared with a peer's before it is timed. FLOPs: forward 4*Sq*Sk*H*D, halved when causal; backward
2.5 times that. Our backward is measured whole: delta, the gradient kernels, and fp32 accumulators to bf16.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from typing import Any

from common import (
    Contender,
    clocks,
    describe,
    interleaved,
    machine,
    markdown,
    parser,
    peak_memory,
)  # first: finds the checkout

# isort: split
import torch
from contenders import SETS, Data, Entry, Shape, make_data, own, peer
from files import write

from seqpar_attn import kernels

TOLERANCE = 2e-2  # norm of the difference to a peer, relative; bf16 results differ by 2e-3 to 6e-3
NOT_OURS = ("reference", "aten", "cudnn", "flash_attn")
PEERS = ("fa4", "cudnn", "flex", "fa2")


LENGTHS = {128: (16384, 8192, 4096), 64: (16384, 4096), 256: (16384,)}
STANDARD = [Shape(1, s, 32, 32, d, m) for d, lengths in LENGTHS.items() for s in lengths for m in ("full", "causal")]
GROUPED = [Shape(1, 16384, 32, 8, 128, m) for m in ("full", "causal")]
CARRY = [Shape(1, 8192, 32, 32, 128, m) for m in ("full", "causal")]


def gather_entries(
    shape: Shape, data: list[Data], backends: list[str], peers: list[str], skipped: dict[str, str]
) -> dict[str, Entry]:
    """Everyone who can take this shape; why the others cannot goes to ``skipped``."""
    entries: dict[str, Entry] = {}
    kinds = frozenset({shape.block_mask.kind})
    for name in (*backends, *peers):
        try:
            if name in backends:
                kernel = kernels.resolve(name, data[0].q.device, torch.bfloat16, shape.headdim, kinds)
                entries[name] = own(kernel, shape, data)
            else:
                entries[name] = peer(name, shape, data)
        except Exception as error:  # a peer that fails must not cost the run; what it said is in the results
            skipped[f"{name}, {shape}"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return entries


def differences(entries: dict[str, Entry], shape: Shape, skipped: dict[str, str]) -> dict[str, dict[str, float]]:
    """Relative norm of each contender's difference to a peer, per tensor. Who fails or is wrong leaves ``entries``."""
    yardstick: list[torch.Tensor] = []
    found: dict[str, dict[str, float]] = {}
    for name in sorted(entries, key=lambda name: name != "cudnn"):  # the most widely used one first
        try:
            with entries[name].forward.scope():
                results = [x.float() for x in (entries[name].forward.call(1), *entries[name].backward.call(1))]
        except Exception as error:  # FlexAttention compiles its backward only here
            skipped[f"{name}, {shape}"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            del entries[name]
            continue
        yardstick = yardstick or results
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(results, yardstick)]
        found[name] = dict(zip(("out", "dq", "dk", "dv"), errors))
        if not all(error <= TOLERANCE for error in errors):  # NaN is wrong too
            skipped[f"{name}, {shape}"] = f"WRONG, so not timed: {found[name]}"
            del entries[name]
    return found


def _peak(contender: Contender, device: torch.device) -> int | None:
    """Bytes of one call above its inputs."""
    with contender.scope():
        return peak_memory(lambda: contender.call(0), device)


def measure(shape: Shape, arguments: argparse.Namespace, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of one shape: forward and backward, every contender."""
    data = make_data(shape, arguments.device)
    entries = gather_entries(shape, data, arguments.backends, arguments.peers, skipped)
    errors = differences(entries, shape, skipped)
    if not entries:
        return
    for direction, factor in (("forward", 1.0), ("backward", 2.5)):
        contenders = {name: getattr(entry, direction) for name, entry in entries.items()}
        timings = interleaved(contenders, arguments.device, rounds=arguments.rounds, round_ms=arguments.round_ms)
        row = {"shape": shape._asdict(), "case": str(shape), "direction": direction, "difference": errors}
        row["results"] = {name: timing.as_dict(shape.flops * factor) for name, timing in timings.items()}
        row["peak_bytes"] = {name: peak for name, x in contenders.items() if (peak := _peak(x, arguments.device))}
        row["ratios"] = {
            name: {other: timings[name].faster_than(timings[other]) for other in arguments.peers if other in timings}
            for name in arguments.backends
            if name in timings
        }
        yield row


def measure_carry(shape: Shape, arguments: argparse.Namespace, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What carrying costs: the same block alone, first, in the middle and last; gradients written and added to.

    The gradient kernels only, adding to dq: delta, zeroing dq and its conversion to bf16 happen once per pass, not per
    block.
    """
    device, scale, mask = arguments.device, shape.headdim**-0.5, shape.block_mask
    for name in arguments.backends:
        try:
            kinds = frozenset({mask.kind})
            kernel = kernels.resolve(name, device, torch.bfloat16, shape.headdim, kinds)
            ordered = kernels.resolve(name, device, torch.bfloat16, shape.headdim, kinds, deterministic=True)
        except ValueError as error:
            skipped[f"{name}, carry, {shape}"] = str(error)
            continue
        data = make_data(shape, device)
        outs = [torch.empty_like(x.q) for x in data]
        accs = [torch.zeros_like(x.q, dtype=torch.float32) for x in data]
        lses = [torch.zeros(shape.batch, shape.nheads, shape.seqlen, device=device) for _ in data]
        deltas = [torch.zeros_like(lse) for lse in lses]
        grads = [torch.zeros_like(t, dtype=torch.float32) for t in data[0][:3]]

        def forward(carry: bool, use_acc: bool, use_out: bool, *, kernel=kernel, s=(data, accs, outs, lses)):
            def call(i: int) -> None:
                x, acc, out, lse = (t[i % SETS] for t in s)
                targets = (acc if use_acc else None, out if use_out else None)
                flags = {"carry": carry, "keep": not use_out}  # as in a pass: nobody reads the last accumulator
                kernel.forward(x.q, x.k, x.v, lse, *targets, mask, softmax_scale=scale, softcap=None, **flags)

            return Contender(call)

        def backward(carry: bool, fixed: bool = False, *, two=(kernel, ordered), s=(data, lses, deltas), grads=grads):
            def call(i: int) -> None:
                x, lse, delta = (t[i % SETS] for t in s)
                flags = {"carry_dq": True, "carry_dkv": carry, "deterministic": fixed}
                two[fixed].backward(
                    x.q, x.k, x.v, x.dout, lse, delta, *grads, mask, softmax_scale=scale, softcap=None, **flags
                )

            return Contender(call)

        cases = {
            "forward": {
                "only": forward(False, False, True),
                "first": forward(False, True, False),
                "continue": forward(True, True, False),
                "last": forward(True, True, True),
            },
            "backward": {"write": backward(False), "add": backward(True), "fixed order": backward(False, True)},
        }
        for (direction, contenders), factor in zip(cases.items(), (1.0, 2.5)):
            for n in range(SETS):  # the block's own lse and delta: values that a real pass would have
                cases["forward"]["only"].call(n)
                deltas[n].copy_(kernel.delta(outs[n], data[n].dout))
            timings = interleaved(contenders, device, rounds=arguments.rounds, round_ms=arguments.round_ms)
            plain = next(iter(timings.values()))
            yield {
                "shape": shape._asdict(),
                "case": str(shape),
                "direction": direction,
                "backend": name,
                "results": {key: timing.as_dict(shape.flops * factor) for key, timing in timings.items()},
                "cost": {key: plain.faster_than(timing) - 1 for key, timing in timings.items()},
            }


def _speed(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    speed = result["tflops"]
    return f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})"


def render(payload: dict[str, Any], backends: list[str], peers: list[str]) -> str:
    """Short tables: TFLOP/s as median (slowest-fastest round), and our speed over each peer's."""
    rows = payload["rows"]
    names = [name for name in (*backends, *peers) if any(name in row["results"] for row in rows)]
    ours, others = [x for x in names if x in backends], [x for x in names if x in peers]
    header = ["case", "direction", *names, *(f"{a} / {b}" for a in ours for b in others)]
    lines = []
    for row in rows:
        ratios = [row["ratios"].get(a, {}).get(b) for a in ours for b in others]
        cells = [_speed(row["results"].get(name)) for name in names]
        lines.append([row["case"], row["direction"], *cells, *("-" if x is None else f"{x:.2f}" for x in ratios)])
    parts = [describe(payload["machine"]), "TFLOP/s, median (slowest-fastest round); ratios: medians over rounds", ""]
    parts += [markdown(header, lines)] if lines else []
    for direction in ("forward", "backward"):
        chosen = [row for row in payload["carry"] if row["direction"] == direction]
        if chosen:
            steps = list(chosen[0]["results"])
            table = [
                [x["case"], x["backend"], *(f"{_speed(x['results'][s])} {100 * x['cost'][s]:+.1f}%" for s in steps)]
                for x in chosen
            ]
            parts += ["", f"Cost of carrying, {direction}", "", markdown(["case", "backend", *steps], table)]
    if payload["skipped"]:
        parts += ["", "Not measured:", *(f"- {what}: {why}" for what, why in payload["skipped"].items())]
    return "\n".join(parts)


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="B,S,H,HKV,D,MASK", help="these, not the set")
    options.add_argument("--backends", nargs="+", help="ours to measure; default: all that are available")
    options.add_argument("--peers", nargs="*", default=list(PEERS), help=f"default: {' '.join(PEERS)}")
    options.add_argument("--carry", action="store_true", help="only what carrying and a fixed order cost")
    options.add_argument("--rounds", type=int)
    options.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # the plumbing, on a CPU
    arguments = options.parse_args(argv)
    arguments.device = (
        torch.device("cuda", torch.cuda.current_device()) if not arguments.dry_run else torch.device("cpu")
    )
    arguments.rounds = arguments.rounds or (9 if arguments.quick else 21)
    arguments.round_ms = 5.0 if arguments.quick else 10.0
    only_carry, arguments.carry = arguments.carry, [] if arguments.shapes else CARRY
    arguments.shapes = arguments.shapes or ([] if only_carry else STANDARD + GROUPED)
    if arguments.backends is None:
        arguments.backends = [x for x in kernels.names() if x not in NOT_OURS and kernels.unavailable(x) is None]
    both = sorted(set(arguments.backends) & set(arguments.peers))
    if both:
        options.error(f"expected different names in --backends and --peers, got {', '.join(both)} in both")
    if arguments.quick:
        arguments.shapes = [x for x in arguments.shapes if x.seqlen <= 4096 and x.headdim == 128] or arguments.shapes
        arguments.carry = arguments.carry[:1]
    if arguments.dry_run:
        arguments.shapes, arguments.carry = [Shape(1, 64, 4, 2, 32, "causal")], [Shape(1, 64, 4, 4, 32, "full")]
        arguments.backends, arguments.peers, arguments.round_ms = ["reference"], ["math", "fa2", "fa4"], 1.0
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    torch.manual_seed(0)
    payload: dict[str, Any] = {"machine": machine(arguments.commit), "rows": [], "carry": [], "skipped": {}}
    for measured, shapes, function in (
        ("rows", arguments.shapes, measure),
        ("carry", arguments.carry, measure_carry),
    ):
        for shape in shapes:
            try:
                for row in function(shape, arguments, payload["skipped"]):
                    payload[measured].append(row)
                    speeds = "  ".join(f"{name} {_speed(x)}" for name, x in row["results"].items())
                    print(f"{row['case']:32} {row['direction']:9} {speeds}", flush=True)
            except torch.OutOfMemoryError as error:
                payload["skipped"][f"{measured}, {shape}"] = str(error).splitlines()[0]
            gc.collect()
            if arguments.device.type == "cuda":
                torch.cuda.empty_cache()
            # After every shape: a peer that compiles for minutes must not cost what was measured before.
            payload["machine"]["clocks_after"] = clocks()
            write(arguments.out, "attention", payload, render(payload, arguments.backends, arguments.peers))
    print((arguments.out / "attention.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
