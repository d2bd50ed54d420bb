"""Measures the rates of this GPU that plans are made from, in under two minutes, and writes them to a file.

    python3 benchmarks/calibrate.py --out my_gpu.json
    python3 -m seqpar_attn plan --model llama-2-7b --context 700k --calibration my_gpu.json

Attention (full masks, 32 heads), matrix products, the loss from hidden states, copies inside the GPU's memory and to
and from page-locked host memory. Long calls are included because a card that is busy for long runs at lower clocks.
``--dry-run`` goes through everything with tiny sizes, on a CPU as well; its file says that it means nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Contender, interleaved, machine  # first: finds the checkout

# isort: split
import torch

import seqpar_attn
from seqpar_attn.planner import GPUS, Attention, Gpu
from seqpar_attn.planner.attention import FLOPS
from seqpar_attn.planner.calibration import to_json

HEADS = 32


class Bench:
    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.group = seqpar_attn.LoopbackGroup(1)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of three batches of about 0.3 s each, after calls that do not count."""
        rounds, round_ms = (1, 1.0) if self.dry_run else (3, 300.0)
        timed = interleaved({"": Contender(lambda _: call())}, self.device, rounds=rounds, round_ms=round_ms)
        return timed[""].median / 1e3

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def attention(self, tokens: int, heads: int, headdim: int) -> tuple[float, float]:
        """Seconds of a forward and of a backward, without causality."""
        q, k, v, dout = (self.random(1, tokens, heads, headdim) for _ in range(4))

        def forward() -> torch.Tensor:
            return seqpar_attn.ring_attention(q, k, v, group=self.group, causal=False)

        alone = self.seconds(forward)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = forward()
        return alone, self.seconds(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))

    def rates(self, headdim: int, sizes: list[int]) -> Attention:
        """TFLOP/s over sizes."""
        heads = 2 if self.dry_run else HEADS
        curves: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for tokens in sizes:
            for backward, seconds in zip((False, True), self.attention(tokens, heads, headdim)):
                flops = FLOPS[backward] * tokens**2 * heads * headdim
                curves[backward].append((float(tokens), flops / seconds / 1e12))
        return Attention(tuple(curves[False]), tuple(curves[True]))

    def gemm(self, rows: int, inner: int, columns: int) -> float:
        """TFLOP/s of a matrix product of an MLP."""
        a, b = self.random(rows, inner), self.random(inner, columns)
        out = torch.empty(rows, columns, device=self.device, dtype=torch.bfloat16)
        return 2.0 * rows * inner * columns / self.seconds(lambda: torch.mm(a, b, out=out)) / 1e12

    def copy(self, nbytes: int) -> float:
        """GB/s, read and written bytes together."""
        source = torch.zeros(nbytes, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * nbytes / self.seconds(lambda: target.copy_(source)) / 1e9

    def host(self, nbytes: int) -> float:
        """GB/s of the slower direction."""
        here = torch.zeros(nbytes, device=self.device, dtype=torch.uint8)
        there = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        slower = max(
            self.seconds(lambda: there.copy_(here, non_blocking=True)),
            self.seconds(lambda: here.copy_(there, non_blocking=True)),
        )
        return nbytes / slower / 1e9

    def head(self, tokens: int, hidden: int, vocab: int) -> float:
        """TFLOP/s of the loss from hidden states with its gradients: 6 operations per token and weight."""
        states, weight = self.random(tokens, hidden).requires_grad_(), self.random(vocab, hidden).requires_grad_()
        labels = torch.randint(vocab, (tokens,), device=self.device)

        def call() -> None:
            loss = seqpar_attn.linear_cross_entropy(states, weight, labels, group=self.group)
            torch.autograd.grad(loss, (states, weight))

        return 6.0 * tokens * hidden * vocab / self.seconds(call) / 1e12


def _known(name: str) -> Gpu | None:
    """The built-in GPU that a device's name is of."""
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0].upper() in name.upper()]
    return found[0] if found else None


def measure(bench: Bench, headdims: list[int], peak: float) -> Gpu:
    dry = bench.dry_run
    cuda = bench.device.type == "cuda"
    sizes = [32, 64] if dry else [4096, 8192, 16384, 65536]
    small = bench.attention(16 if dry else 128, 2, headdims[0])[0]  # hardly any work: what is left is starting it
    attention = {d: bench.rates(d, sizes) for d in headdims}
    vocabularies = [100, 200] if dry else [32000, 128256]
    head = tuple((float(n), bench.head(*((64, 32) if dry else (16384, 4096)), n)) for n in vocabularies)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    measured = "DRY RUN: means nothing" if dry else f"measured: benchmarks/calibrate.py on {name}"
    fields = ("memory_gib", "attention", "gemm_tflops", "copy_gbps", "host_gbps", "head", "launch_us")
    nbytes = 1 << (16 if dry else 30)
    sources = dict.fromkeys(fields, measured)
    sources["launch_us"] += ", a whole call of 128 tokens: more than a step of a ring needs"
    sources["peak_tflops"] = "published, or as given to calibrate.py"
    return Gpu(
        name=f"{name} (dry run)" if dry else name,
        memory_gib=torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 1.0,
        peak_tflops=peak,
        attention=attention,
        gemm_tflops=bench.gemm(*((32, 32, 32) if dry else (16384, 4096, 14336))),
        copy_gbps=bench.copy(nbytes),
        host_gbps=bench.host(nbytes),
        head=head,
        launch_us=small * 1e6,
        sources=sources,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--headdims", type=int, nargs="+", default=[128])
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s; known for A100, H100 and H200")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does everything run?")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("expected an NVIDIA GPU, got none: pass --dry-run to try this on a CPU")
    known = _known(torch.cuda.get_device_name()) if torch.cuda.is_available() else GPUS["h100-80g"]
    if arguments.peak is None and known is None:
        parser.error(f"expected --peak TFLOP/s for {torch.cuda.get_device_name()}, got none")
    peak = arguments.peak if arguments.peak is not None else known.peak_tflops if known else 0.0
    torch.manual_seed(0)
    gpu = measure(Bench(arguments.dry_run), arguments.headdims, peak)
    found = to_json(gpu, machine())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("machine", "sources")}, indent=1))


if __name__ == "__main__":
    main()
