"""One rank's share of sequence-parallel attention on one GPU, against the single-device call divided by W.

    python3 benchmarks/ring.py --out benchmarks/results

Every rank of W takes turns on this GPU with its real kernels, accumulators and buffers; what would come over a link
is a copy on a side stream: inside its memory, or with --transfers peer from that of a second GPU, while what would be
sent goes there (or, with --transfers none, nothing). "of ideal" is (single-device call on
the whole sequence) / W / (slowest rank). "makespan" plays the measured step times of all ranks through
``simulate_schedule`` with all dependencies between ranks: once with free links, once with the link given by --link
(GB/s each way); those two columns are simulated. "host us/step" is Python's time per task of the schedule (the keys of
one owner) in calls that follow each other, without the stand-in for the transfers, and "GPU us/step" the GPU's.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics

from common import clocks, describe, machine, markdown, parser, peak_memory  # first: finds the checkout

# isort: split
import torch
from files import write
from one_rank import Share, bytes_per_token

from seqpar_attn.schedule import Rates, simulate_schedule

TRANSFERS = {
    "device": "transfers are copies inside its memory",
    "peer": "transfers are copies from and to a second GPU, by copy engines over the link between them",
    "none": "nothing is transferred",
}
HOST_PASSES = 9
METHODS = {"zigzag": ("ring", "zigzag"), "dist_flash": ("dist_flash", "contiguous")}


def median_steps(share: Share, direction: str) -> list[float]:
    return [statistics.median(values) for values in zip(*share.times[direction].steps)]


def measure(world_size: int, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    """Rows for one shard length: rounds of the single call and every rank of every method in random order."""
    heads = (arguments.nheads, arguments.nheads_kv, arguments.headdim)
    rest = (arguments.transfers, arguments.backend)
    single = Share("ring", "contiguous", 1, 0, tokens * world_size, heads, *rest)
    shares = {
        name: [Share(method, layout, world_size, rank, tokens, heads, *rest) for rank in range(world_size)]
        for name, (method, layout) in METHODS.items()
    }
    everyone = [single, *(share for ranks in shares.values() for share in ranks)]
    size = sum(torch.Size(shape).numel() for shape in single.shapes)
    pool = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    rounds = max(2, min(arguments.rounds, int(arguments.rounds * 8192 / tokens)))
    shuffle = random.Random(0).shuffle
    for n in range(rounds + 1):
        shuffle(everyone)  # nobody always follows the long single call, which leaves the GPU hot and its clock low
        for share in everyone:
            share.run(pool, keep=n > 0)
    rows = []
    for name, ranks in shares.items():
        row: dict = {
            "tokens_per_gpu": tokens,
            "method": name,
            "backend": single.kernel.name,
            "world_size": world_size,
            "rounds": rounds,
        }
        row["peak_bytes"] = peak_memory(lambda share=ranks[world_size // 2]: share.run(pool, keep=False), pool.device)
        both: dict[str, float] = {}
        # Ranks differ by a launch or two, so those that attend only later ranks' keys, both, and only earlier ones'.
        hosts = [ranks[rank].host(pool, HOST_PASSES) for rank in (0, world_size // 2, world_size - 1)]
        for direction in ("forward", "backward"):
            ideal = statistics.median(single.times[direction].total) / world_size
            totals = [statistics.median(share.times[direction].total) for share in ranks]
            slowest = ranks[totals.index(max(totals))].times[direction].total
            steps = [median_steps(share, direction) for share in ranks]
            schedule = ranks[0].plan.backward if direction == "backward" else ranks[0].plan.forward

            def seconds(step: int, rank: int, steps=steps) -> float:
                return steps[rank][step] / 1e3

            weights = bytes_per_token(*heads, direction == "backward")
            free = simulate_schedule(schedule, Rates(1.0, weights), step_seconds=seconds)
            link = simulate_schedule(
                schedule,
                Rates(1.0, weights, bytes_per_second=arguments.link * 1e9, latency=1e-5),
                step_seconds=seconds,
            )
            tasks = sum(len(row[0].tasks) for row in schedule.steps)
            row[direction] = {
                "ideal_ms": ideal,
                "single_tflops": flops(single, direction, arguments) / statistics.median(single.times[direction].total),
                "rank_ms": totals,
                "slowest_ms": max(totals),
                "slowest_rounds_ms": [min(slowest), max(slowest)],
                "of_ideal": ideal / max(totals),
                "makespan_free_ms": free.makespan * 1e3,
                "makespan_link_ms": link.makespan * 1e3,
                "host_us_per_step": max(host[direction] for host in hosts) * 1e3 / tasks,
                "gpu_us_per_step": min(totals) * 1e3 / tasks,
            }
            for key in ("ideal_ms", "slowest_ms", "makespan_free_ms", "makespan_link_ms"):
                both[key] = both.get(key, 0.0) + row[direction][key]
        row["both"] = both | {"of_ideal": both["ideal_ms"] / both["slowest_ms"]}
        rows.append(row)
        for direction in ("forward", "backward", "both"):
            for key in ("makespan_free", "makespan_link"):
                row[direction][f"{key}_of_zigzag"] = row[direction][f"{key}_ms"] / rows[0][direction][f"{key}_ms"]
    return rows


def flops(share: Share, direction: str, arguments: argparse.Namespace) -> float:
    """In units of 1e9, so that dividing by milliseconds gives TFLOP/s."""
    factor = 2.5 if direction == "backward" else 1.0
    return 4e-9 * factor * share.attended[direction] * arguments.nheads * arguments.headdim


def copy_rate(megabytes: int = 256, copies: int = 8) -> dict[str, float]:
    """GB/s of plain copies from a second GPU to this one, alone and with as many the other way: what "peer" has."""
    here, there = torch.cuda.current_device(), torch.cuda.current_device() + 1
    blocks = [
        torch.empty(megabytes << 20, dtype=torch.uint8, device=torch.device("cuda", x)) for x in (here, there) * 2
    ]
    back = torch.cuda.Stream(here), torch.cuda.Stream(there)
    rates = {}
    for name, both in (("alone", False), ("both ways", True)):
        for counts in (False, True):  # the first time makes the connection
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(there)
            torch.cuda.synchronize(here)
            begin.record()
            for _ in range(copies):
                if both:
                    with torch.cuda.stream(back[1]), torch.cuda.stream(back[0]):
                        blocks[3].copy_(blocks[2], non_blocking=True)
                blocks[0].copy_(blocks[1], non_blocking=True)
            end.record()
            end.synchronize()
            torch.cuda.synchronize(there)
            if counts:
                rates[name] = copies * (megabytes << 20) / begin.elapsed_time(end) / 1e6
    return rates


def render(payload: dict) -> str:
    header = ["W", "tokens/GPU", "method", "direction", "ideal ms", "slowest rank ms", "of ideal"]
    header += ["makespan ms, free links*", "/ zigzag's", f"at {payload['link']:g} GB/s*", "/ zigzag's"]
    header += ["single TFLOP/s", "host us/step", "GPU us/step"]
    lines = []
    for row in payload["rows"]:
        for direction in ("forward", "backward", "both"):
            x = row[direction]
            cells = [str(row["world_size"]), str(row["tokens_per_gpu"]), row["method"], direction]
            cells += [f"{x['ideal_ms']:.2f}", f"{x['slowest_ms']:.2f}", f"{100 * x['of_ideal']:.1f}%"]
            for key in ("makespan_free", "makespan_link"):
                cells += [f"{x[key + '_ms']:.2f}", f"{x[key + '_of_zigzag']:.3f}"]
            if direction == "both":
                cells += ["", "", ""]
            else:
                cells += [f"{x['single_tflops']:.0f}", f"{x['host_us_per_step']:.0f}", f"{x['gpu_us_per_step']:.0f}"]
            lines.append(cells)
    note = (
        f"Backend {payload['rows'][0]['backend']}. One rank at a time on one GPU; "
        + TRANSFERS[payload["transfers"]]
        + ". "
        "* simulated from the measured step times."
    )
    if "copy_rate" in payload:
        rates = ", ".join(f"{rate:.0f} {name}" for name, rate in payload["copy_rate"].items())
        note += f" Plain copies between the GPUs, GB/s: {rates}."
    return "\n".join([describe(payload["machine"]), note, "", markdown(header, lines)])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", help="per GPU, at W = 8; default: 4096 8192 32768")
    options.add_argument("--world-sizes", type=int, nargs="*", help="at 8192 tokens per GPU; default: 2 to 7")
    options.add_argument("--nheads", type=int, default=32)
    options.add_argument("--nheads-kv", type=int, default=8)
    options.add_argument("--headdim", type=int, default=128)
    options.add_argument("--rounds", type=int, default=7, help="fewer above 8192 tokens per GPU, at least 2")
    options.add_argument("--transfers", choices=tuple(TRANSFERS), default="device", help="what stands in for the links")
    options.add_argument("--backend", default="auto", help="whose kernels")
    options.add_argument("--link", type=float, default=400.0, help="GB/s each way, for the simulated makespan")
    arguments = options.parse_args()
    # 32768 tokens and other numbers of ranks take minutes.
    arguments.tokens = arguments.tokens or ([4096, 8192] if arguments.quick else [4096, 8192, 32768])
    if arguments.world_sizes is None:
        arguments.world_sizes = [] if arguments.quick else [2, 3, 4, 5, 6, 7]
    if arguments.transfers == "peer" and torch.cuda.device_count() < 2:
        options.error(f"expected at least 2 GPUs for --transfers peer, got {torch.cuda.device_count()}")
    torch.manual_seed(0)
    payload: dict = {"machine": machine(arguments.commit), "link": arguments.link, "rows": []}
    payload |= {key: getattr(arguments, key) for key in ("nheads", "nheads_kv", "headdim", "transfers")}
    if arguments.transfers == "peer":
        payload["copy_rate"] = copy_rate()
    for world_size, tokens in [(8, tokens) for tokens in arguments.tokens] + [(w, 8192) for w in arguments.world_sizes]:
        payload["rows"] += measure(world_size, tokens, arguments)
        gc.collect()
        torch.cuda.empty_cache()
    payload["machine"]["clocks_after"] = clocks()
    write(arguments.out, "ring", payload, render(payload))
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
