"""EasyContext's table from one GPU: one rank of 8 is measured, what would move between GPUs is priced by the planner.

``throughput.py`` runs this where there is one GPU. Each row is one process of ``memory.py``: peak memory of a step of
the whole model, and the time of one and of two of its layers, from which the whole follows ("computed"). To that are
added the seconds that the planner says a rank waits for the ring and for FSDP's weights. The other GPUs' cells come
from the planner alone ("predicted"); how far it is from what was measured stands beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import clocks, describe, machine, markdown  # first: finds the checkout

# isort: split
import torch
from easy_context_rows import ROWS, THEIR_GPUS, THEIR_PEAK, Row
from files import RESULTS, known, read, stamp, write
from one_rank_model import MODELS

from seqpar_attn.planner import (
    GPUS,
    LINKS,
    Gpu,
    Model,
    Policy,
    find_gpu,
    from_config,
    make_cluster,
    policies,
    predict_memory,
    predict_step,
)
from seqpar_attn.planner.hardware import of_device
from seqpar_attn.planner.plan import capacity

GIB = 2**30
LINK_OF = {"a100-80g": "nvlink3"}
"""Inside a node; of all others nvlink4."""
FULL = 0.85
"""Of a GPU's memory that predicted tensors may take: the allocator holds more than the tensors."""
PRICED = ("waiting for the ring", "waiting for FSDP's weights")
START_S = 45.0
"""A generous guess of what a row takes besides its steps."""


def parts_of(model: Model, gpu: Gpu, policy: Policy, row: Row, gpus: int = THEIR_GPUS) -> dict[str, float]:
    """Seconds of a rank's step, predicted."""
    link = LINKS[LINK_OF.get(gpu.name, "nvlink4")]
    parts = dict(predict_step(model, gpu, make_cluster(gpus, link), policy, row.tokens).parts)
    if not row.data_parallel:
        return parts
    # Attention is that of a sequence per GPU, and moves nothing; what FSDP does is the same.
    alone = dict(predict_step(model, gpu, make_cluster(1, link), policy, row.tokens).parts)
    return (
        {name: seconds for name, seconds in parts.items() if name in PRICED[1:]}
        | alone
        | {"optimizer": parts["optimizer"]}
    )


def rates(model: Model, row: Row, step: float, peak: float) -> dict[str, float]:
    rate = row.tokens * THEIR_GPUS / step
    mfu = model.flops_per_token(row.context(THEIR_GPUS)) * rate / (THEIR_GPUS * peak * 1e12)
    return {"step_s": step, "tokens_per_second": rate, "mfu": mfu}


def choices(model: Model, gpu: Gpu, row: Row) -> list[Policy]:
    """Policies that should fit, the fastest first; if none does, the smallest."""
    cluster = make_cluster(THEIR_GPUS, LINKS["nvlink4"])
    found = policies(model, THEIR_GPUS, "ring", tile_mlp=16384)
    size = {p: predict_memory(model, cluster, p, row.tokens).total for p in found}
    fitting = [p for p in found if size[p] <= FULL * capacity(gpu)]
    return sorted(fitting, key=lambda p: sum(parts_of(model, gpu, p, row).values())) or [
        min(found, key=size.__getitem__)
    ]


def say(policy: Policy) -> str:
    return f"attention {policy.attention}, inputs {policy.activations}"


def checked(model: Model) -> list[dict[str, Any]]:
    """How far the planner is from committed measurements of this model on H100s: predicted / measured - 1 of a step."""
    found = []
    gpu = find_gpu("h100-80g")
    for path in sorted((RESULTS / "memory").glob("*.json")):
        payload = read(path, "memory")
        if payload["model"] != model.name or payload["gpus"] != THEIR_GPUS:
            continue
        policy = Policy("ring", payload["attention"], payload["activations"], payload["tile_mlp"])
        for x in payload["rows"]:
            if "step_ms" in x:
                parts = parts_of(model, gpu, policy, Row("", x["context"] // THEIR_GPUS))
                seconds = sum(s for name, s in parts.items() if not name.startswith("waiting"))
                error = 1e3 * seconds / x["step_ms"] - 1
                found.append({"what": f"one rank of 8, {x['context'] // 1024}K", "file": path.name, "error": error})
    for path in sorted((RESULTS / "throughput").glob("throughput-*.json")):
        payload = read(path, "throughput")
        for x in payload["rows"] if payload["model"] == model.name else []:
            if "step_s" in x and x["layers"] == x["of_layers"]:
                policy = Policy("ring", x["attention"], x["activations"], x["tile_mlp"])
                row = Row("", x["tokens_per_gpu"], x["data_parallel"])
                seconds = sum(parts_of(model, gpu, policy, row, payload["gpus"]).values())
                what = f"{payload['gpus']} GPUs for real, {row.context(payload['gpus']) // 1024}K"
                what += " data parallel" if row.data_parallel else ""
                found.append({"what": what, "file": path.name, "error": seconds / x["step_s"] - 1})
    return found


def note_of(gpu: Gpu, errors: list[dict[str, Any]], row_error: float | None) -> str:
    if gpu.name == "h100-80g" and row_error is not None:
        return f"planner {100 * row_error:+.1f}% from this row's measured part"
    if not errors:
        return "planner not checked for this model"
    low, high = (100 * f(x["error"] for x in errors) for f in (min, max))
    off = f"{low:+.1f} to {high:+.1f}% from {len(errors)} measured steps on H100"
    return f"planner {off}" if gpu.name == "h100-80g" else f"planner not checked on this GPU; {off}"


def predictions(model: Model, row: Row, errors: list[dict[str, Any]], row_error: float | None) -> list[dict[str, Any]]:
    found = []
    for gpu in GPUS.values():
        policy = choices(model, gpu, row)[0]
        step = sum(parts_of(model, gpu, policy, row).values())
        found.append(
            {"gpu": gpu.name, "kind": "predicted", "policy": say(policy), **rates(model, row, step, gpu.peak_tflops)}
            | {"note": note_of(gpu, errors, row_error)}
        )
    return found


def rounds_of(seconds: float) -> int:
    """Of timed steps, where those of one and of two layers take so long together."""
    return max(2, min(5, int(15 / max(seconds, 1e-3))))


def measure(model: Model, gpu: Gpu, policy: Policy, row: Row, a: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One process of memory.py; ``failed`` says why there is no result."""
    layer = sum(parts_of(model, gpu, policy, row).values()) / model.layers
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("memory.py")), "--out", folder, "--name", "row"]
        command += ["--model", model.name, "--gpus", str(THEIR_GPUS), "--contexts", str(row.context(THEIR_GPUS))]
        command += ["--attention", policy.attention, "--activations", policy.activations]
        command += ["--tile-mlp", str(policy.tile_mlp), "--rounds", str(rounds_of(3 * layer))]
        command += ["--sequence-ranks", "1"] if row.data_parallel else []
        command += ["--no-time"] if a.dry_run else []
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            return {"failed": f"did not end within {limit:.0f} s"}
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
            return {"failed": (done.stderr.strip() or "no output").splitlines()[-1][-300:]}
        (found,) = read(Path(folder) / "row.json", "memory")["rows"]
    if "out_of_memory" in found:
        return {"failed": "out of memory"}
    if "step_ms" not in found:
        return {"failed": "no times in a rehearsal"}
    result: dict[str, Any] = {"policy": say(policy), "compute_s": found["step_ms"] / 1e3}
    result |= {"compute_rounds_s": [x / 1e3 for x in found["step_rounds_ms"]], "memory_row": found}
    return result | {"peak_bytes": found["peak_bytes"], "host_bytes": found["host_bytes"]}


def attempt(model: Model, gpu: Gpu, row: Row, a: argparse.Namespace, deadline: float) -> dict[str, Any] | None:
    """The row with the first policy that turns out to fit; None if there is no time left for it."""
    found = None
    for policy in choices(model, gpu, row):
        parts = parts_of(model, gpu, policy, row)
        layer = sum(parts.values()) / model.layers
        needed = START_S + 3 * layer * (1 + rounds_of(3 * layer)) + 0.25 * sum(parts.values())
        spare = deadline - time.monotonic()
        if needed > spare:
            break
        found = measure(model, gpu, policy, row, a, min(spare, 600.0))
        if "compute_s" in found:
            compute = sum(s for name, s in parts.items() if name not in PRICED)
            waits = {name: parts[name] for name in PRICED if name in parts}
            step = found["compute_s"] + sum(waits.values())
            found |= {"kind": "computed", "waits_s": waits, "model_error": compute / found["compute_s"] - 1}
            found |= rates(model, row, step, a.peak if of_device(a.gpu_name) is None else gpu.peak_tflops)
            found["note"] = "one rank of 8 measured on one and two layers; waiting for other GPUs predicted"
        if found.get("failed") != "out of memory":
            break
    return found


def render(payload: dict[str, Any]) -> str:
    header = ["row", "tokens/GPU", "whose", "known by", "policy", "peak GiB", "host GiB", "step s", "tokens/s", "MFU"]
    header += ["MFU / EasyContext's", "note"]
    lines = []
    for x in payload["rows"]:
        first = [x["row"], str(x["tokens_per_gpu"])]
        theirs = x["theirs"]
        if theirs:
            cells = [
                "EasyContext, 8 x a100-80g",
                "published",
                "",
                "",
                "",
                "",
                str(theirs[0]),
                f"{100 * theirs[1]:.1f}%",
            ]
            lines.append([*first, *cells, "1.00", ""])
        one = x["measured"]
        if "mfu" not in one:
            lines.append([*first, "ours, one rank of 8", "", "", "", "", "", "", "", "", one["failed"]])
        for y in [*([one] if "mfu" in one else []), *x["predictions"]]:
            who = f"ours, {payload['gpus']} x {y['gpu']}"
            sizes = [f"{y[key] / GIB:.1f}" if key in y else "" for key in ("peak_bytes", "host_bytes")]
            cells = [who, y["kind"], y["policy"], *sizes, f"{y['step_s']:.2f}", f"{y['tokens_per_second']:.0f}"]
            cells += [f"{100 * y['mfu']:.1f}%", f"{y['mfu'] / theirs[1]:.2f}" if theirs else "", y["note"]]
            lines.append([*first, *cells])
    dry = "REHEARSAL on a CPU: these figures mean nothing. " if payload["dry"] else ""
    title = (
        f"{dry}{payload['model']}, EasyContext's rows. MFU over each GPU's own dense bf16 peak (A100 {THEIR_PEAK:g}, "
        f"H100 and H200 989 TFLOP/s). computed: {payload['how']}."
    )
    checks = [f"- {x['what']} ({x['file']}): {100 * x['error']:+.1f}%" for x in payload["checked"]]
    parts = [describe(payload["machine"]), title, "", markdown(header, lines), ""]
    return "\n".join([*parts, "The planner's steps against measured ones, predicted / measured - 1:", *checks])


def run(a: argparse.Namespace, rows: list[Row], fail: Any) -> int:
    """Rows to ``one_rank.json``; ``a`` is throughput.py's. 3 if some were not started for lack of time."""
    deadline = time.monotonic() + a.deadline
    sizes = dict(MODELS["tiny" if a.dry_run else a.model])
    model = from_config({"model_type": "llama"} | sizes, "tiny" if a.dry_run else a.model)
    if a.dry_run:
        rows = [Row(x.name, 64, x.data_parallel, x.theirs) for x in rows[:2]]
    cuda = torch.cuda.is_available()
    a.gpu_name = torch.cuda.get_device_name() if cuda else ""
    gpu = of_device(a.gpu_name) or find_gpu("h100-80g")
    header = machine(a.commit)
    name = f"{'dry-' if a.dry_run else ''}one_rank"
    settings = stamp("one_rank") | {"model": model.name, "gpus": THEIR_GPUS, "peak": gpu.peak_tflops, "dry": a.dry_run}
    try:
        payload = known(a.out / f"{name}.json", "one_rank", settings) or {**settings, "rows": []}
    except ValueError as error:
        fail(str(error))
    if payload.get("machine", {}).get("commit") != header["commit"] or header["dirty"]:
        payload["rows"] = []  # rows of one file are of one commit
    errors = checked(model)
    payload |= {"machine": header, "checked": errors, "how": "one rank of 8 on one GPU, see throughput_one_rank.py"}
    left = []
    for row in rows:
        if not a.force and any(x["row"] == row.name and "mfu" in x["measured"] for x in payload["rows"]):
            continue
        one: dict[str, Any] = {"failed": "not measured"}
        if not a.predict and (cuda or a.dry_run):
            ran = attempt(model, gpu, row, a, deadline)
            if ran is None:
                left.append(row.name)
            one = ran or {"failed": "not started: no time was left"}
        one |= {"gpu": gpu.name if of_device(a.gpu_name) else a.gpu_name or "no GPU"}
        found = {"row": row.name, "context": row.context(THEIR_GPUS), "tokens_per_gpu": row.tokens}
        found |= {"data_parallel": row.data_parallel, "theirs": row.theirs, "measured": one}
        found["predictions"] = predictions(model, row, errors, one.get("model_error"))
        payload["rows"] = [x for x in payload["rows"] if x["row"] != row.name] + [found]
        order = [x.name for x in ROWS]
        payload["rows"].sort(key=lambda x: order.index(x["row"]))
        payload["machine"]["clocks_after"] = clocks() if cuda else None
        write(a.out, "one_rank", payload, render(payload), name)
        print(f"{row.name}: {one.get('failed', 'done')}", flush=True)
    print(render(payload), flush=True)
    if left:
        print(f"not started, as they would not end in time: {', '.join(left)}; run again", flush=True)
        return 3
    failed = [x for x in payload["rows"] if "failed" in x["measured"]]
    return 1 if failed and cuda and not a.predict else 0
