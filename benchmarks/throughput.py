"""EasyContext's throughput table on this machine's GPUs: Llama-2-7B, real steps, tokens/s and MFU beside theirs.

    python3 benchmarks/throughput.py --out benchmarks/results/throughput
    python3 benchmarks/throughput.py --out out/dry --dry-run --gpus 2
    python3 benchmarks/throughput.py --out out/one --one-rank      # the default where there is one GPU

With one GPU the table is that of one rank of 8: see throughput_one_rank.py.

Every row is one torchrun (benchmarks/throughput_row.py). Their rows are of 8 GPUs: with N of them the tokens per GPU
stay and the context is N / 8 of theirs, so tokens/s do not compare, and MFU does only as far as attention's share is
alike; such rows are marked. MFU is by their formula: FLOPs per token = 6 (parameters without the embedding) +
12 layers hidden context / 2, over --peak TFLOP/s per GPU (theirs: 312). A row's memory policy is the fastest that an
estimate says fits; where not even all offloading fits, or with --layers, fewer layers run, and the row says so (its MFU
counts the layers that ran). A row that --out has is left out, unless --force; with --deadline no row starts that an
estimate says would not end in time: run again for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from common import clocks, describe, machine, markdown  # first: finds the checkout

# isort: split
import many
import throughput_one_rank
import torch
from easy_context_rows import ROWS, THEIR_GPUS, THEIR_PEAK, Row
from files import known, stamp, write
from one_rank_model import MODELS, flops_per_token, parameters_in_gemms

GIB = 2**30
START_S = 45.0
"""A generous guess of what a row takes before its first step."""


@dataclass(frozen=True)
class Policy:
    attention: str
    activations: str
    layers: int


def estimate(sizes: dict[str, Any], policy: Policy, tokens: int, gpus: int) -> float:
    """Bytes that a rank needs: states, what is kept for the backward pass, and what a block works with.

    The last was read off one rank of Llama-2-7B at 89600 tokens (benchmarks/results/memory): about 36 times the bytes
    of its hidden states.
    """
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    parameters = parameters_in_gemms({**sizes, "num_hidden_layers": policy.layers}) + sizes["vocab_size"] * hidden
    kept = 2 * hidden * (policy.activations == "keep") + (2 * hidden + 4 * heads) * (policy.attention == "save")
    return 16.0 * parameters / gpus + tokens * (policy.layers * kept + 36 * 2 * hidden) + 1.5 * GIB


def host_bytes(sizes: dict[str, Any], policy: Policy, tokens: int) -> float:
    """Of page-locked memory that a rank needs."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    inputs = 2 * hidden * (policy.activations == "offload")
    return float(tokens * policy.layers * (inputs + (2 * hidden + 4 * heads) * (policy.attention == "offload")))


POLICIES = (("save", "keep"), ("save", "offload"), ("offload", "offload"), ("recompute", "offload"))
"""Attention's results and the blocks' inputs; from the fastest to the smallest."""


def choose(sizes: dict[str, Any], tokens: int, gpus: int, room: float, host: float, layers: int | None) -> list[Policy]:
    """Policies that fit ``room`` bytes of a GPU and all ranks together in ``host``; never none."""
    count = layers or sizes["num_hidden_layers"]
    while True:
        all_of_them = [Policy(attention, activations, count) for attention, activations in POLICIES]
        found = [
            x
            for x in all_of_them
            if estimate(sizes, x, tokens, gpus) <= room and gpus * host_bytes(sizes, x, tokens) <= host
        ]
        if found:
            return found
        if layers or count == 1:
            return all_of_them[-1:]  # as asked for; whether it fits is seen
        count = max(1, count // 2)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(row: Row, policy: Policy, gpus: int, a: argparse.Namespace, steps: int, limit: float) -> dict[str, Any]:
    """The row that the processes wrote, or how they failed: {"failed": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}", "--nnodes=1"]
        command += ["--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
        command += [str(Path(__file__).with_name("throughput_row.py")), f"--into={into}", f"--model={a.model}"]
        command += [f"--attention={policy.attention}", f"--activations={policy.activations}"]
        command += [f"--context={row.context(gpus)}", f"--tokens={row.tokens}", f"--layers={policy.layers}"]
        command += [f"--steps={steps}", f"--tile-mlp={a.tile_mlp}", *(["--cpu"] if a.dry_run else [])]
        command += ["--profile"] if a.profile else []
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        log = Path(folder) / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its processes
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return {"failed": f"did not end within {limit:.0f} s"}
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(into.read_text())
            return found
        lines = log.read_text().splitlines()
        print("\n".join(lines[-60:]), file=sys.stderr, flush=True)
        if any("out of memory" in x for x in lines):
            return {"failed": "out of memory"}
        errors = [x for x in lines if "Error" in x and "ChildFailedError" not in x]
        return {"failed": (errors or lines or ["no output"])[0][-300:]}


def finish(row: Row, policy: Policy, gpus: int, a: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    sizes = {**MODELS[a.model], "num_hidden_layers": policy.layers}
    context = row.context(gpus)
    found = {"row": row.name, "context": context, "tokens_per_gpu": row.tokens, "data_parallel": row.data_parallel}
    found |= {"layers": policy.layers, "of_layers": MODELS[a.model]["num_hidden_layers"], "tile_mlp": a.tile_mlp}
    found |= {"attention": policy.attention, "activations": policy.activations, "theirs": row.theirs, **measured}
    if "step_s" in measured:
        rate = row.tokens * gpus / measured["step_s"]
        found["tokens_per_second"] = rate
        found["mfu"] = flops_per_token(sizes, context) * rate / (gpus * a.peak * 1e12)
    return found


def render(payload: dict[str, Any]) -> str:
    header = [
        "EasyContext's row",
        "context here",
        "tokens/GPU",
        "layers",
        "policy",
        "peak GiB",
        "host GiB/rank",
        "step s",
    ]
    header += ["tokens/s", "MFU", "EasyContext tokens/s, 8 GPUs", "their MFU", "MFU / theirs"]
    lines = []
    for x in payload["rows"]:
        marks = "" if payload["gpus"] == THEIR_GPUS or x["data_parallel"] else f" (x {payload['gpus']}/8)"
        whole = x["layers"] == x["of_layers"]
        cells = [x["row"], f"{x['context']}{marks}", str(x["tokens_per_gpu"])]
        cells += [str(x["layers"]) if whole else f"{x['layers']} of {x['of_layers']}"]
        cells += [f"attention {x['attention']}, inputs {x['activations']}"]
        if "failed" in x:
            cells += [f"failed: {x['failed']}"]
        else:
            cells += [f"{x['peak_bytes'] / GIB:.1f}", f"{x['host_bytes'] / GIB:.1f}", f"{x['step_s']:.2f}"]
            cells += [f"{x['tokens_per_second']:.0f}{'' if whole else ' (fewer layers)'}", f"{100 * x['mfu']:.1f}%"]
            if x["theirs"]:
                rate, mfu = x["theirs"]
                cells += [str(rate), f"{100 * mfu:.1f}%", f"{x['mfu'] / mfu:.2f}"]
        lines.append(cells + [""] * (len(header) - len(cells)))
    dry = "REHEARSAL on a CPU over gloo: these figures mean nothing. " if payload["dry"] else ""
    scaled = ""
    if payload["gpus"] != THEIR_GPUS:
        scaled = (
            f" Contexts are {payload['gpus']}/8 of EasyContext's, with as many tokens per GPU: tokens/s do not compare."
        )
    title = (
        f"{dry}{payload['model']}, {payload['gpus']} GPUs, FSDP2, AdamW, zigzag; measured: the median of the "
        f"steps after the first; MFU over {payload['peak']:g} TFLOP/s per GPU, theirs over {THEIR_PEAK:g} "
        f"(8 A100 80GB).{scaled}"
    )
    machines = [f"{x['row']}: {describe(x['machine'])}" for x in payload["rows"]]
    profiles = [
        f"{x['row']}, one step on rank 0, s: {_profile(x['profile'])}" for x in payload["rows"] if "profile" in x
    ]
    return "\n".join([title, "", markdown(header, lines), "", *machines, *profiles])


def _profile(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {x:.2f}" if isinstance(x, float) else f"{name} {x}" for name, x in found.items())


def attempt(
    row: Row, policies: list[Policy], gpus: int, a: argparse.Namespace, deadline: float, tried: list[Any]
) -> tuple[Policy, dict[str, Any]] | None:
    """The row by the first policy that turns out to fit, or None if none could have ended before the deadline.

    ``tried``: what ran out of memory, in earlier runs too.
    """
    found = None
    for policy in policies:
        if [row.name, *astuple(policy)] in tried and policy != policies[-1]:
            continue
        spare = deadline - time.monotonic()
        work = flops_per_token({**MODELS[a.model], "num_hidden_layers": policy.layers}, row.context(gpus)) * row.tokens
        step = work / (0.5 * a.peak * 1e12)  # at a good MFU
        steps = a.steps if START_S + (a.steps + 1) * step <= spare else 1
        if START_S + (steps + 1 + a.profile) * step > spare:
            break
        found = policy, launch(row, policy, gpus, a, steps, min(spare, 1800.0))
        if found[1].get("failed") != "out of memory":
            break
        tried.append([row.name, *astuple(policy)])
    return found


def main() -> None:
    parser = many.parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--rows", nargs="+", choices=[x.name for x in ROWS], help="default: all")
    parser.add_argument("--layers", type=int, help="time fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=2, help="timed ones, after a first; 1 where time is short")
    parser.add_argument("--tile-mlp", type=int, default=16384)
    parser.add_argument("--profile", action="store_true", help="one step more, and where its time goes on rank 0")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU; H100 and H200: 989")
    parser.add_argument("--one-rank", action="store_true", help="one rank of 8 on one GPU, as where there is only one")
    parser.add_argument("--predict", action="store_true", help="likewise, with nothing measured: needs no GPU")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds from now; no row may run then")
    a = parser.parse_args()
    deadline = time.monotonic() + a.deadline
    rows = [x for x in ROWS if not a.rows or x.name in a.rows]
    if a.one_rank or a.predict or (a.gpus is None and not a.dry_run and torch.cuda.device_count() == 1):
        sys.exit(throughput_one_rank.run(a, rows, parser.error))
    gpus = many.count(parser, a)
    room = host = float("inf")
    if a.dry_run:
        a.model, a.steps, a.tile_mlp = "tiny", 1, 16
        rows = [Row(x.name, 64 if x.data_parallel else 32, x.data_parallel, x.theirs) for x in rows[:2]]
    else:
        room, host = 0.93 * many.gpu_bytes(), 0.8 * many.host_bytes()
    settings = {**stamp("throughput"), "gpus": gpus, "dry": a.dry_run, "model": a.model, "peak": a.peak}
    name = many.name("throughput", gpus, a.dry_run)
    path = a.out / f"{name}.json"
    try:
        payload = known(path, "throughput", settings) or {**settings, "rows": [], "out_of_memory": []}
    except ValueError as error:
        parser.error(str(error))
    left = []
    for row in rows:
        if not a.force and any(x["row"] == row.name and "failed" not in x for x in payload["rows"]):
            continue
        policies = choose(dict(MODELS[a.model]), row.tokens, gpus, room, host, a.layers)
        if a.dry_run and not row.data_parallel:  # one of the two rows tries the copies to the host
            policies = policies[1:]
        header = machine(a.commit)
        ran = attempt(row, policies, gpus, a, deadline, payload["out_of_memory"])
        if ran is None:
            left.append(row.name)
            continue
        header["clocks_after"] = clocks()
        payload["rows"] = [x for x in payload["rows"] if x["row"] != row.name]
        payload["rows"].append(finish(row, ran[0], gpus, a, ran[1]) | {"machine": header})
        order = [x.name for x in ROWS]
        payload["rows"].sort(key=lambda x: order.index(x["row"]))
        write(a.out, "throughput", payload, render(payload), name)
        print(f"{row.name}: {ran[1].get('failed', 'done')}", flush=True)
    print(render(payload), flush=True)
    if left:
        print(f"not started, as they would not end in time: {', '.join(left)}; run again", flush=True)
        sys.exit(3)
    if any("failed" in x for x in payload["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
