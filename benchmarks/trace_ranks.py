"""A profiler trace of one zigzag forward and backward per rank, and a picture of rank 0's lanes.

    python3 benchmarks/trace_ranks.py --out benchmarks/results/trace

Writes ``trace-N.zip`` (a Chrome trace per rank, for Perfetto or chrome://tracing) and ``trace-N.png``: what ran on
rank 0's GPU when, kernels of attention above, transfers below. NCCL's kernels also wait for the other rank, so their
length is not that of the data. With --transport loopback it is --gpus virtual ranks on one GPU, and one trace.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from common import describe, machine  # first: finds the checkout

# isort: split
import many
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import seqpar_attn
from seqpar_attn.comm import set_transport

Bar = tuple[float, float, str]
"""Begin and length in ms, and the lane."""

LANES = ("computation", "transfers", "copies")
LOOPBACK = "loopback"


def run(
    rank: int,
    processes: int,
    ranks: int,
    tokens: int,
    heads: tuple[int, int, int],
    backend: str,
    transport: str,
    dry: bool,
) -> str:
    """This rank's trace, as JSON. Virtual ranks' tokens are all here."""
    os.environ.update(many.NO_MULTICAST)
    device, (nheads, nheads_kv, headdim) = many.device(dry), heads
    group = None
    if transport == LOOPBACK:
        group, tokens = seqpar_attn.LoopbackGroup(ranks), tokens * ranks
    else:
        set_transport(None, transport)
    torch.manual_seed(rank)
    shapes = [(1, tokens, n, headdim) for n in (nheads, nheads_kv, nheads_kv, nheads)]
    dtype = torch.float32 if dry else torch.bfloat16
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    for x in (q, k, v):
        x.requires_grad_()

    def once() -> None:
        with record_function("forward"):
            out = seqpar_attn.ring_attention(q, k, v, group=group, backend=backend)
        with record_function("backward"):
            torch.autograd.grad(out, (q, k, v), dout)

    def settle() -> None:
        if not dry:
            torch.cuda.synchronize()
        dist.barrier()

    for _ in range(3):
        once()
    settle()
    activities = [ProfilerActivity.CPU, *([] if dry else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as warm_up:  # the profiler's own first use takes time
        settle()
    del warm_up
    with profile(activities=activities) as profiled:
        settle()
        if not dry:
            torch.cuda._sleep(10_000_000)  # the host runs ahead, as in a model
        once()
        if not dry:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return path.read_text()


def bars(trace: str, dry: bool) -> list[Bar]:
    """What the trace says ran on the device; of a CPU, what its operators and gloo did."""
    found: list[Bar] = []
    events = [event for event in json.loads(trace)["traceEvents"] if event.get("ph") == "X"]
    # What comes before the end of the head start is the barrier's.
    start = max((x["ts"] + x["dur"] for x in events if x.get("cat") == "kernel" and "spin" in x["name"]), default=0.0)
    for event in events:
        if event["ts"] < start:
            continue
        name, kind, lane = event["name"], event.get("cat", ""), ""
        if dry:
            if name.startswith("gloo:"):
                lane = LANES[1]
            elif kind == "cpu_op" and name in ("aten::bmm", "aten::baddbmm", "aten::exp", "aten::matmul", "aten::mul"):
                lane = LANES[0]
        elif kind in ("gpu_memcpy", "gpu_memset"):
            lane = LANES[2]
        elif kind == "kernel":
            lane = LANES[1] if "nccl" in name.lower() else LANES[0]
        if lane:
            found.append((event["ts"] / 1e3, event["dur"] / 1e3, lane))
    if not found:
        raise ValueError("expected kernels in the trace, found none")
    first = min(begin for begin, _, _ in found)
    return sorted((begin - first, length, lane) for begin, length, lane in found)


def draw(found: Sequence[Bar], title: str, into: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 3))
    for row, (lane, colour) in enumerate(zip(LANES, ("tab:blue", "tab:orange", "tab:gray"))):
        spans = [(begin, length) for begin, length, own in found if own == lane]
        axes.broken_barh(spans, (len(LANES) - 1 - row - 0.4, 0.8), facecolors=colour, edgecolors="black", linewidth=0.3)
    axes.set_yticks(range(len(LANES)), reversed(LANES))
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(into, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = many.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="per GPU")
    parser.add_argument("--nheads", type=int, default=32)
    parser.add_argument("--nheads-kv", type=int, default=8)
    parser.add_argument("--headdim", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--transport", choices=("p2p", "symmetric", LOOPBACK), default="p2p")
    a = parser.parse_args()
    virtual = a.transport == LOOPBACK
    count = a.gpus or 4 if virtual else many.count(parser, a)
    name = many.name("trace" if a.transport == "p2p" else f"trace-{a.transport}", count, a.dry_run)
    picture = a.out / f"{name}.png"
    if picture.exists() and not a.force:
        print(f"{picture.name}: there already", flush=True)
        return
    if a.dry_run:
        a.tokens, a.nheads, a.nheads_kv, a.headdim = 64, 4, 2, 16
    header = machine(a.commit)
    heads = (a.nheads, a.nheads_kv, a.headdim)
    with many.pool(1 if virtual else count, a.dry_run or virtual, timeout=300) as pool:
        traces = pool.run(run, count, a.tokens, heads, a.backend, a.transport, a.dry_run)
    a.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(a.out / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for rank, trace in enumerate(traces):
            archive.writestr(f"rank{rank}.json", trace)
    dry = "REHEARSAL on a CPU over gloo\n" if a.dry_run else ""
    title = (
        f"{dry}zigzag, forward and backward, {'all' if virtual else 'rank 0'} of {count}, {a.tokens} tokens per GPU, "
        f"{a.nheads}/{a.nheads_kv} heads of {a.headdim}, {a.transport}\n{describe(header)}"
    )
    found = bars(traces[0], a.dry_run)
    draw(found, title, picture)
    end = max(begin + length for begin, length, _ in found)
    busy = {lane: sum(length for _, length, own in found if own == lane) for lane in LANES}
    print(f"{picture.name}: {end:.2f} ms, " + ", ".join(f"{lane} {ms:.2f} ms" for lane, ms in busy.items()))


if __name__ == "__main__":
    main()
