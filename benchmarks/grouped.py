"""What packed documents and grouped heads cost our kernels, against the same work without them, on one GPU.

    python3 benchmarks/grouped.py --out benchmarks/results

Documents: one call over all of them with an interval mask, against one causal call per document. Grouped heads: the
same number of query heads over fewer key heads, against as many key heads. Contenders take turns and inputs rotate, as
in attention.py; the backward is measured whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import Contender, clocks, describe, interleaved, machine, markdown, parser  # first: finds the checkout

# isort: split
import torch
from contenders import Data, Entry, Shape, make_data, own
from files import write

from seqpar_attn import kernels
from seqpar_attn.kernels.base import Kernel, interval_mask
from seqpar_attn.mask import MaskKind


def _one_after_another(entries: list[Entry]) -> Entry:
    def all_of(direction: str) -> Contender:
        calls: list[Callable[[int], Any]] = [getattr(entry, direction).call for entry in entries]
        return Contender(lambda i: [call(i) for call in calls])

    return Entry(all_of("forward"), all_of("backward"))


def documents(kernel: Kernel, tokens: int, document: int, heads: tuple[int, int, int], device: torch.device):
    """Entries and FLOPs of ``tokens // document`` documents: in one call, and in one call each."""
    data = make_data(Shape(1, tokens, *heads, "causal"), device)
    i = torch.arange(tokens, device=device)
    packed = interval_mask((i // document * document).int(), (i + 1).int(), tokens)
    each = Shape(1, document, *heads, "causal")
    separate = [
        own(kernel, each, [Data(*(t[:, begin : begin + document] for t in x)) for x in data])
        for begin in range(0, tokens, document)
    ]
    entries = {
        "separate": _one_after_another(separate),
        "packed": own(kernel, Shape(1, tokens, *heads, ""), data, packed),
    }
    return entries, each.flops * len(separate)


def grouped(kernel: Kernel, tokens: int, nheads: int, headdim: int, mask: str, device: torch.device):
    """Entries and FLOPs of as many key heads as query heads, a fourth and an eighth."""
    shapes = {f"{n}:1": Shape(1, tokens, nheads, nheads // n, headdim, mask) for n in (1, 4, 8)}
    return {name: own(kernel, s, make_data(s, device)) for name, s in shapes.items()}, shapes["1:1"].flops


def rows(kernel: Kernel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    found = []
    cases: list[tuple[str, Callable[[], tuple[dict[str, Entry], float]]]] = [
        (f"documents of 4096 in 65536, {h}:{k}", lambda h=h, k=k: documents(kernel, 65536, 4096, (h, k, 128), device))
        for h, k in ((32, 32), (32, 8))
    ]
    cases += [
        (f"grouped heads, S{s} {m}", lambda s=s, m=m: grouped(kernel, s, 32, 128, m, device))
        for s in (8192, 16384)
        for m in ("full", "causal")
    ]
    for case, make in cases:
        entries, flops = make()
        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            contenders = {name: getattr(entry, direction) for name, entry in entries.items()}
            timings = interleaved(contenders, device, rounds=arguments.rounds, round_ms=arguments.round_ms)
            plain = next(iter(timings.values()))
            found.append({
                "case": case, "direction": direction,
                "results": {name: timing.as_dict(flops * factor) for name, timing in timings.items()},
                "rate": {name: timing.faster_than(plain) for name, timing in timings.items()},
            })  # fmt: skip
        del entries, contenders
        torch.cuda.empty_cache()
    return found


def render(payload: dict[str, Any]) -> str:
    lines = []
    for row in payload["rows"]:
        cells = [
            f"{name} {result['tflops']['median']:.0f} ({row['rate'][name]:.2f})"
            for name, result in row["results"].items()
        ]
        lines.append([row["case"], row["direction"], ", ".join(cells)])
    note = f"Backend {payload['backend']}. TFLOP/s, medians, and the rate over that of the first of the row"
    return "\n".join([describe(payload["machine"]), note, "", markdown(["case", "direction", "measured"], lines)])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backend", default="auto", help="whose kernels")
    options.add_argument("--rounds", type=int, help="default: 15, or 5 with --quick")
    options.add_argument("--round-ms", type=float, default=10.0)
    arguments = options.parse_args()
    arguments.rounds = arguments.rounds or (5 if arguments.quick else 15)
    torch.manual_seed(0)
    kernel = kernels.resolve(arguments.backend, torch.device("cuda", 0), torch.bfloat16, 128, frozenset(MaskKind))
    payload: dict[str, Any] = {"machine": machine(arguments.commit), "backend": kernel.name}
    payload["rows"] = rows(kernel, arguments)
    payload["machine"]["clocks_after"] = clocks()
    write(arguments.out, "grouped", payload, render(payload))
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
