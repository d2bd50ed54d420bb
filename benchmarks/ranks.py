"""Sequence-parallel attention on several GPUs, one process each over NCCL, against one GPU's time divided by them.

    python3 benchmarks/ranks.py --out benchmarks/results/ranks

"of ideal" is (single-device call on the whole sequence) / ranks / (slowest rank of a round), the median over rounds in
which all take turns. All GPUs run the single-device call at the same time, so that they share power and cooling as in
the other rows. The time of a round begins on every rank after a barrier.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import describe, machine, markdown, write  # first: finds the checkout

# isort: split
import torch
import torch.distributed as dist
from one_rank import HEAD_START_CYCLES

import seqpar_attn
from seqpar_attn.testing.distributed import RankPool

METHODS = {
    "zigzag": (seqpar_attn.ring_attention, {}),
    "zigzag, neighbours": (seqpar_attn.ring_attention, {"transfer": "ring"}),
    "dist_flash": (seqpar_attn.dist_flash_attention, {}),
}


def _timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    result = function(*arguments)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def run(
    rank: int, world_size: int, tokens: int, heads: tuple[int, int, int], backend: str, rounds: int
) -> dict[str, Any]:
    """Milliseconds per round of this rank: ``{name: {"forward": [...], "backward": [...]}}``."""
    nheads, nheads_kv, headdim = heads
    torch.manual_seed(rank)

    def inputs(seqlen: int) -> list[torch.Tensor]:
        shapes = [(1, seqlen, n, headdim) for n in (nheads, nheads_kv, nheads_kv, nheads)]
        return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_(i < 3) for i, s in enumerate(shapes)]

    whole, own = inputs(tokens * world_size), inputs(tokens)
    alone = seqpar_attn.LoopbackGroup(1)
    calls: dict[str, tuple[Any, dict[str, Any], list[torch.Tensor]]] = {
        "one GPU": (seqpar_attn.ring_attention, {"group": alone}, whole),
        **{name: (function, options, own) for name, (function, options) in METHODS.items()},
    }
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in calls}
    for n in range(rounds + 2):
        for name, (function, options, (q, k, v, dout)) in calls.items():
            forward, out = _timed(lambda f=function, o=options, x=(q, k, v): f(*x, backend=backend, **o))
            backward, _ = _timed(out.backward, dout)
            for x in (q, k, v):
                x.grad = None
            if n > 1:
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    return times


def rows(ranks: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """What a length's results amount to."""
    found: list[dict[str, Any]] = []
    slowest = {
        name: {direction: [max(x) for x in zip(*(rank[name][direction] for rank in ranks))] for direction in directions}
        for name, directions in ranks[0].items()
    }
    for times in slowest.values():
        times["both"] = [sum(x) for x in zip(times["forward"], times["backward"])]
    single = slowest.pop("one GPU")
    for name, times in slowest.items():
        for direction, values in times.items():
            ideal = [x / len(ranks) for x in single[direction]]
            found.append(
                {
                    "ranks": len(ranks), "tokens_per_gpu": tokens, "method": name, "direction": direction,
                    "ideal_ms": statistics.median(ideal), "slowest_ms": statistics.median(values),
                    "of_ideal": statistics.median(a / b for a, b in zip(ideal, values)),
                }
            )  # fmt: skip
    return found


def render(payload: dict[str, Any]) -> str:
    header = ["GPUs", "tokens/GPU", "method", "direction", "ideal ms", "slowest rank ms", "of ideal"]
    lines = [
        [
            *(str(x[key]) for key in ("ranks", "tokens_per_gpu", "method", "direction")),
            *(f"{x[key]:.2f}" for key in ("ideal_ms", "slowest_ms")),
            f"{100 * x['of_ideal']:.1f}%",
        ]
        for x in payload["rows"]
    ]
    note = (
        f"Backend {payload['backend']}, {payload['nheads']}/{payload['nheads_kv']} heads of {payload['headdim']}; NCCL."
    )
    return "\n".join([describe(payload["machine"]), note, "", markdown(header, lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 32768], help="per GPU")
    parser.add_argument("--nheads", type=int, default=32)
    parser.add_argument("--nheads-kv", type=int, default=8)
    parser.add_argument("--headdim", type=int, default=128)
    parser.add_argument("--backend", default="auto", help="whose kernels")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    count = arguments.gpus or gpus
    if not 2 <= count <= gpus:
        parser.error(f"expected 2 to {gpus} GPUs (all that torch sees), got {count}")
    payload: dict[str, Any] = {"machine": machine(arguments.commit), "rows": []}
    payload |= {key: getattr(arguments, key) for key in ("nheads", "nheads_kv", "headdim", "backend")}
    heads = (arguments.nheads, arguments.nheads_kv, arguments.headdim)
    with RankPool(count, timeout=300, backend="nccl") as pool:
        for tokens in arguments.tokens:
            payload["rows"] += rows(pool.run(run, tokens, heads, arguments.backend, arguments.rounds), tokens)
            write(arguments.out, f"ranks-{count}", payload, render(payload))
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
