"""Measures the rates of this GPU that plans are made from, in under two minutes, and writes them to a file.

    python3 benchmarks/calibrate.py --out my_gpu.json
    python3 -m seqpar_attn plan --model llama-2-7b --context 700k --calibration my_gpu.json

Attention (full masks, 32 heads), matrix products, the loss from hidden states, copies inside the GPU's memory and to
and from page-locked host memory, and what starting a step of a ring costs. Long calls are included because a card that
is busy for long runs at lower clocks; they come last. Attention's rates are those of the backend that "auto" chooses,
which the file names: where the CUDA library is wanted, compile it before (``python -m seqpar_attn info``).
``--dry-run`` goes through everything with tiny sizes, on a CPU as well; its file says that it means nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Contender, clocks, describe, interleaved, machine  # first: finds the checkout

# isort: split
import torch
from files import write
from one_rank import Share
from rows import rows_of, table

import seqpar_attn
from seqpar_attn import kernels
from seqpar_attn.mask import MaskKind
from seqpar_attn.planner import GPUS, Attention, Gpu
from seqpar_attn.planner.attention import FLOPS
from seqpar_attn.planner.calibration import to_json
from seqpar_attn.planner.hardware import of_device

HEADS = 32
SIZES = (4096, 8192, 16384, 131072)
"""Tokens of attention's calls; the last takes seconds, in which the card gets to its power limit."""
Spread = dict[str, tuple[float, float]]


class Bench:
    def __init__(self, dry_run: bool, quick: bool = False):
        self.dry_run, self.quick = dry_run, quick
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.group = seqpar_attn.LoopbackGroup(1)
        self.spread: Spread = {}
        """Slowest and fastest round of every rate."""

    def seconds(self, call: Callable[[], Any]) -> tuple[float, float, float]:
        """Median, least and most of rounds of about 0.3 s each, after calls that do not count."""
        rounds, round_ms = (1, 1.0) if self.dry_run else (3, 50.0) if self.quick else (3, 300.0)
        timed = interleaved({"": Contender(lambda _: call())}, self.device, rounds=rounds, round_ms=round_ms)[""]
        return timed.median / 1e3, min(timed.milliseconds) / 1e3, max(timed.milliseconds) / 1e3

    def rate(self, what: str, work: float, call: Callable[[], Any]) -> float:
        """``work`` per second."""
        median, least, most = self.seconds(call)
        self.spread[what] = (work / most, work / least)
        return work / median

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def attention(self, tokens: int, heads: int, headdim: int) -> tuple[float, float]:
        """TFLOP/s of a forward and of a backward, without causality."""
        q, k, v, dout = (self.random(1, tokens, heads, headdim) for _ in range(4))
        work = [FLOPS[backward] * tokens**2 * heads * headdim / 1e12 for backward in (False, True)]

        def forward() -> torch.Tensor:
            return seqpar_attn.ring_attention(q, k, v, group=self.group, causal=False)

        alone = self.rate(f"attention {headdim} forward {tokens}", work[0], forward)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = forward()
        backward = self.rate(
            f"attention {headdim} backward {tokens}",
            work[1],
            lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
        )
        return alone, backward

    def rates(self, headdim: int, sizes: tuple[int, ...]) -> Attention:
        """TFLOP/s over sizes."""
        heads = 2 if self.dry_run else HEADS
        curves: tuple[list[tuple[float, float]], ...] = ([], [])
        for tokens in sizes:
            for curve, rate in zip(curves, self.attention(tokens, heads, headdim)):
                curve.append((float(tokens), rate))
        return Attention(*(tuple(curve) for curve in curves))

    def gemm(self, rows: int, inner: int, columns: int) -> float:
        """TFLOP/s of a matrix product of an MLP."""
        a, b = self.random(rows, inner), self.random(inner, columns)
        out = torch.empty(rows, columns, device=self.device, dtype=torch.bfloat16)
        return self.rate("gemm_tflops", 2e-12 * rows * inner * columns, lambda: torch.mm(a, b, out=out))

    def copy(self, nbytes: int) -> float:
        """GB/s, read and written bytes together."""
        source = torch.zeros(nbytes, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return self.rate("copy_gbps", 2e-9 * nbytes, lambda: target.copy_(source))

    def host(self, nbytes: int) -> float:
        """GB/s of the slower direction."""
        here = torch.zeros(nbytes, device=self.device, dtype=torch.uint8)
        there = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self.cuda)
        out = self.rate("host_gbps", 1e-9 * nbytes, lambda: there.copy_(here, non_blocking=True))
        spread = self.spread["host_gbps"]
        back = self.rate("host_gbps", 1e-9 * nbytes, lambda: here.copy_(there, non_blocking=True))
        if out < back:
            self.spread["host_gbps"] = spread
        return min(out, back)

    def head(self, tokens: int, hidden: int, vocab: int) -> float:
        """TFLOP/s of the loss from hidden states with its gradients: 6 operations per token and weight."""
        states, weight = self.random(tokens, hidden).requires_grad_(), self.random(vocab, hidden).requires_grad_()
        labels = torch.randint(vocab, (tokens,), device=self.device)

        def call() -> None:
            loss = seqpar_attn.linear_cross_entropy(states, weight, labels, group=self.group)
            torch.autograd.grad(loss, (states, weight))

        return self.rate(f"head {vocab}", 6e-12 * tokens * hidden * vocab, call)

    def launch(self, headdim: int) -> float:
        """Microseconds of the host per step of a ring of 8, forward; on a CPU those of a whole small call."""
        if not self.cuda:
            q = self.random(1, 16, 2, headdim)
            call = self.seconds(lambda: seqpar_attn.ring_attention(q, q, q, group=self.group, causal=False))
            return call[0] * 1e6
        share = Share("ring", "zigzag", 8, 4, 4096, (HEADS, 8, headdim))
        pool = self.random(sum(torch.Size(shape).numel() for shape in share.shapes))
        share.host(pool, 3)  # kernels are found and compiled
        tasks = sum(len(row[0].tasks) for row in share.plan.forward.steps)
        return share.host(pool, 9)["forward"] * 1e3 / tasks


def measure(bench: Bench, headdims: list[int], peak: float) -> Gpu:
    dry, cuda = bench.dry_run, bench.cuda
    sizes = (32, 64) if dry else SIZES[:3] if bench.quick else SIZES
    launch = bench.launch(headdims[0])
    vocabularies = [100, 200] if dry else [32000, 128256]
    head = tuple((float(n), bench.head(*((64, 32) if dry else (16384, 4096)), n)) for n in vocabularies)
    nbytes = 1 << (16 if dry else 30)
    copy, host = bench.copy(nbytes), bench.host(nbytes)
    gemm = bench.gemm(*((32, 32, 32) if dry else (16384, 4096, 14336)))
    attention = {d: bench.rates(d, sizes) for d in headdims}
    backend = kernels.resolve("auto", bench.device, torch.bfloat16, headdims[0], frozenset({MaskKind.FULL})).name
    name = torch.cuda.get_device_name() if cuda else "cpu"
    measured = "DRY RUN: means nothing" if dry else f"measured: benchmarks/calibrate.py on {name}"
    measured += ", quick: no call that lasts" if bench.quick else ""
    fields = ("memory_gib", "attention", "gemm_tflops", "copy_gbps", "host_gbps", "head", "launch_us")
    sources = dict.fromkeys(fields, measured)
    sources["attention"] += f", backend {backend}"
    sources["launch_us"] += ", host time per forward step of a ring of 8" if cuda else ", a whole call of 16 tokens"
    sources["peak_tflops"] = "published, or as given to calibrate.py"
    return Gpu(
        name=f"{name} (dry run)" if dry else name,
        memory_gib=torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 1.0,
        peak_tflops=peak,
        attention=attention,
        gemm_tflops=gemm,
        copy_gbps=copy,
        host_gbps=host,
        head=head,
        launch_us=launch,
        sources=sources,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; its table goes beside it")
    parser.add_argument("--headdims", type=int, nargs="+", default=[128])
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s; known for A100, H100 and H200 with SXM")
    parser.add_argument("--quick", action="store_true", help="shorter rounds, no long calls: rates at high clocks")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does everything run?")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".json":
        parser.error(f"expected --out to be a .json file, got {arguments.out}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("expected an NVIDIA GPU, got none: pass --dry-run to try this on a CPU")
    known = of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else GPUS["h100-80g"]
    if arguments.peak is None and known is None:
        parser.error(f"expected --peak TFLOP/s for {torch.cuda.get_device_name()}, got none")
    peak = arguments.peak if arguments.peak is not None else known.peak_tflops if known else 0.0
    torch.manual_seed(0)
    header = machine(arguments.commit)
    bench = Bench(arguments.dry_run, arguments.quick)
    gpu = measure(bench, arguments.headdims, peak)
    header["clocks_after"] = clocks() if bench.cuda else None
    found = {"part": "calibrate", **to_json(gpu, header), "spread": bench.spread}
    text = f"{describe(header)}\n{gpu.sources['attention']}\n\n{table(rows_of(found))}"
    write(arguments.out.parent, "calibrate", found, text, arguments.out.stem)
    print(text, flush=True)


if __name__ == "__main__":
    main()
