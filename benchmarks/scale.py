"""Scale on paper: where each method of attention stops scaling, on 8 to 1024 GPUs, by the planner's simulation.

    python3 benchmarks/scale.py --out benchmarks/results/scale

Nothing here is measured on more than one GPU: rates are the planner's built-in ones (or --calibration's), and a step of
training is predicted for each method, number of GPUs and context. The policy's memory is chosen to fit; where nothing
fits there is no number. ``readme.py`` draws the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from files import ROOT, write

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from seqpar_attn.planner import (
    LINKS,
    Gpu,
    Model,
    Plan,
    best_plan,
    find_gpu,
    find_model,
    make_cluster,
    policies,
    read_calibration,
)
from seqpar_attn.planner.report import amount, parse_amount

METHODS = {"ring": "single ring", "double_ring": "double ring", "usp": "USP", "ulysses": "Ulysses"}


def predict(model: Model, gpu: Gpu, gpus: int, context: int, method: str, between: str) -> Plan | str:
    """The best plan of a method, or why there is none."""
    cluster = make_cluster(gpus, LINKS["nvlink4"], LINKS[between])
    try:
        return best_plan(model, gpu, cluster, context, policies(model, gpus, method, tile_mlp=16384))
    except ValueError as error:
        return str(error).split(":")[0]


def row(plan: Plan | str, gpus: int, context: int, method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"predicted": True, "gpus": gpus, "context": context, "method": method}
    if isinstance(plan, str):
        return found | {"why_not": plan}
    parts, policy = dict(plan.step.parts), plan.policy
    waits = ("waiting for the ring", "exchanging heads", "waiting for FSDP's weights", "waiting for the host's memory")
    waiting = {name: parts.get(name, 0.0) / plan.step.total for name in waits}
    return found | {
        "tokens_per_gpu": plan.tokens,
        "ulysses": policy.ulysses,
        "attention": policy.attention,
        "activations": policy.activations,
        "step_seconds": plan.step.total,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "waiting": waiting,
        "memory_gib": plan.memory.total / 2**30,
    }


def render(rows: list[dict[str, Any]], head: str) -> str:
    """MFU by GPUs and method, one table per context; in brackets the share of the step spent waiting."""
    lines = [f"{head}. PREDICTED by the planner: MFU (share of the step that waits or exchanges).", ""]
    for context in sorted({r["context"] for r in rows}):
        lines += [f"{amount(context)} tokens", "", f"| GPUs | {' | '.join(METHODS.values())} |", "|---" * 5 + "|"]
        for gpus in sorted({r["gpus"] for r in rows if r["context"] == context}):
            cells = []
            for method in METHODS:
                (r,) = (x for x in rows if (x["gpus"], x["context"], x["method"]) == (gpus, context, method))
                if "mfu" not in r:
                    cells.append("heads" if "heads" in r["why_not"] else "memory")
                else:
                    degree = f", U={r['ulysses']}" if r["ulysses"] else ""
                    cells.append(f"{100 * r['mfu']:.1f}% ({100 * sum(r['waiting'].values()):.0f}%{degree})")
            lines.append(f"| {gpus} | {' | '.join(cells)} |")
        lines.append("")
    lines.append('"memory": does not fit; "heads": more ranks than heads would have to exchange them.')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--gpu", default="h100-80g")
    parser.add_argument("--calibration")
    parser.add_argument("--between", default="ib400")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: 8 to 1024")
    parser.add_argument("--contexts", nargs="+", help="default: 1m 4m 16m 64m")
    parser.add_argument("--quick", action="store_true", help="8, 64 and 512 GPUs, 1m tokens")
    arguments = parser.parse_args()
    arguments.gpus = arguments.gpus or ([8, 64, 512] if arguments.quick else [8 << n for n in range(8)])
    arguments.contexts = arguments.contexts or (["1m"] if arguments.quick else ["1m", "4m", "16m", "64m"])
    model = find_model(arguments.model)
    gpu = read_calibration(arguments.calibration) if arguments.calibration else find_gpu(arguments.gpu)
    rows = []
    for text in arguments.contexts:
        context = parse_amount(text)
        for gpus in arguments.gpus:
            for method in METHODS:
                plan = predict(model, gpu, gpus, context, method, arguments.between)
                rows.append(row(plan, gpus, context, method))
    head = f"{model.name} on {gpu.name}, nvlink4 in nodes of 8, {arguments.between} between them"
    name = f"{model.name}-{arguments.between}"
    payload = {"predicted": True, "setting": head, "sources": gpu.sources, "rows": rows}
    write(arguments.out, "scale", payload, render(rows, head), name)
    print(render(rows, head))


if __name__ == "__main__":
    main()
