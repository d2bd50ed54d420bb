"""Cross-entropy on one GPU, forward and backward: ours beside torch, Liger and cut-cross-entropy, where installed.

    python3 benchmarks/loss.py --out benchmarks/results

Two questions. From the hidden states: time, peak memory above the inputs (and above inputs and gradients), and the
error of loss and gradients against float64. From logits that are there: time, and the bytes of one read and one write
of them per second, beside the rate of a copy of as many bytes in the same run. A time counts only as a ratio to a peer
in the same run on the same GPU: contenders take turns. Inputs are larger than any cache, so they need not rotate.
Errors are those of a smaller call with the same vocabulary.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

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
import torch.nn.functional as F
from files import write

import seqpar_attn

Tensor = torch.Tensor
PEERS = ("torch", "liger_ce", "liger_linear_ce", "cce")
OURS = ("ours_ce", "ours_linear_ce")
MIB = 1 << 20


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        sizes = text.split(",")
        if len(sizes) != 3 or not all(x.isdigit() for x in sizes):
            raise argparse.ArgumentTypeError(f"expected TOKENS,HIDDEN,VOCAB, got {text!r}")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"T{self.tokens} H{self.hidden} V{self.vocab}"

    @property
    def flops(self) -> float:
        """Of the three products that forward and backward cannot do without."""
        return 6.0 * self.tokens * self.hidden * self.vocab


STANDARD = [Shape(16384, 4096, 32000), Shape(16384, 4096, 128256)]
LOGITS = [Shape(16384, 0, 32000), Shape(16384, 0, 128256), Shape(8192, 0, 262144)]


def make(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``hidden, weight, labels``; logits of standard deviation 1."""
    hidden = torch.randn(shape.tokens, shape.hidden, device=device).bfloat16()
    weight = (torch.randn(shape.vocab, shape.hidden, device=device) * shape.hidden**-0.5).bfloat16()
    return hidden, weight, torch.randint(shape.vocab, (shape.tokens,), device=device)


def linear_losses(names: list[str], backend: str, logits_bytes: int, skipped: dict[str, str]) -> dict[str, Callable]:
    """``name -> f(hidden, weight, labels)``, mean over tokens. Who cannot be imported goes to ``skipped``."""

    def ours_linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return seqpar_attn.linear_cross_entropy(hidden, weight, labels, backend=backend, logits_bytes=logits_bytes)

    found: dict[str, Callable] = {"ours_linear_ce": ours_linear_ce}
    for name, loss in logits_losses(names, backend, skipped).items():
        found[name] = lambda hidden, weight, labels, loss=loss: loss(hidden @ weight.t(), labels)
    if "liger_linear_ce" in names:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            found["liger_linear_ce"] = lambda hidden, weight, labels: liger(weight, hidden, labels)
        except ImportError as error:
            skipped["liger_linear_ce"] = str(error)
    if "cce" in names:
        try:
            from cut_cross_entropy import linear_cross_entropy as cce

            found["cce"] = lambda hidden, weight, labels: cce(hidden, weight, labels, impl="cce_exact")
        except ImportError as error:
            skipped["cce"] = str(error)
    return found


def logits_losses(names: list[str], backend: str, skipped: dict[str, str]) -> dict[str, Callable]:
    """``name -> f(logits, labels)``; all but torch write the gradient over the logits."""

    def ours_ce(logits: Tensor, labels: Tensor) -> Tensor:
        return seqpar_attn.cross_entropy(logits, labels, inplace=True, backend=backend)

    found: dict[str, Callable] = {"ours_ce": ours_ce}
    if "torch" in names:
        found["torch"] = lambda logits, labels: F.cross_entropy(logits.float(), labels)
    if "liger_ce" in names:
        try:
            from liger_kernel.transformers import LigerCrossEntropyLoss

            found["liger_ce"] = LigerCrossEntropyLoss()
        except ImportError as error:
            skipped["liger_ce"] = str(error)
    return found


def errors(loss: Callable, shape: Shape, device: torch.device) -> dict[str, float]:
    """Of a call of few tokens: relative norms of the differences to float64."""
    hidden, weight, labels = make(shape._replace(tokens=min(shape.tokens, 256)), device)

    def run(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        value = function(h, w, labels)
        return [value.detach(), *torch.autograd.grad(value, (h, w))]

    truth = run(lambda h, w, y: F.cross_entropy(h @ w.t(), y), torch.float64)
    got = run(loss, hidden.dtype)
    return {n: float((x.double() - y).norm() / y.norm()) for n, x, y in zip(("loss", "dhidden", "dweight"), got, truth)}


def trial(name: str, case: str, skipped: dict[str, str], function: Callable[[], Any]) -> Any:
    """What ``function`` returns, or None: a peer that fails must not cost the run."""
    try:
        return function()
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        skipped[f"{name}, {case}"] = lines[0][:300]
        return None


def ratios(timings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A peer's time over ours: above 1 we are faster."""
    mine = [name for name in timings if name in OURS]
    return {n: {o: timings[o].median / timings[n].median for o in timings if o not in OURS} for n in mine}


def measure_linear(shape: Shape, arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, Any]:
    device = arguments.device
    losses = linear_losses(arguments.peers, arguments.backend, arguments.logits_mib * MIB, skipped)
    accuracy = {n: trial(n, str(shape), skipped, lambda f=f: errors(f, shape, device)) for n, f in losses.items()}
    hidden, weight, labels = make(shape, device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(loss: Callable) -> None:
        torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    memory = {}
    for name, loss in losses.items():
        if accuracy[name] is not None:
            trial(name, str(shape), skipped, lambda f=loss: step(f))  # compiles, and makes cuBLAS's workspace
            memory[name] = trial(name, str(shape), skipped, lambda f=loss: peak_memory(lambda: step(f), device))
    usable = [name for name in losses if accuracy[name] is not None and f"{name}, {shape}" not in skipped]
    contenders = {name: Contender(lambda i, f=losses[name]: step(f)) for name in usable}
    timings = interleaved(contenders, device, rounds=arguments.rounds, round_ms=arguments.round_ms)
    gradients = 2 * (hidden.numel() + weight.numel())
    return {
        "shape": shape._asdict(),
        "case": str(shape),
        "error": accuracy,
        "results": {name: timing.as_dict(shape.flops) for name, timing in timings.items()},
        "memory": {
            n: {"above_inputs": m, "above_gradients": m - gradients} for n, m in memory.items() if m is not None
        },
        "ratios": ratios(timings),
    }


def measure_logits(shape: Shape, arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, Any]:
    """Contenders overwrite the logits, so each call gets what the last one left: times do not depend on values."""
    device = arguments.device
    losses = logits_losses([x for x in arguments.peers if x != "torch"], arguments.backend, skipped)
    logits = torch.randn(shape.tokens, shape.vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(shape.vocab, (shape.tokens,), device=device)

    def step(loss: Callable) -> None:
        torch.autograd.grad(loss(logits, labels), logits)

    usable = {n: f for n, f in losses.items() if trial(n, str(shape), skipped, lambda f=f: (step(f), 1)) is not None}
    contenders = {name: Contender(lambda i, f=f: step(f)) for name, f in usable.items()}
    half = logits.detach().flatten()[: logits.numel() // 2]
    other = logits.detach().flatten()[half.numel() : 2 * half.numel()]
    contenders["copy of half"] = Contender(lambda i: other.copy_(half))
    timings = interleaved(contenders, device, rounds=arguments.rounds, round_ms=arguments.round_ms)
    moved = {name: 2 * logits.numel() * logits.element_size() for name in timings}
    moved["copy of half"] = 2 * half.numel() * half.element_size()
    rates = {name: moved[name] / timing.median / 1e6 for name, timing in timings.items()}  # GB/s
    return {
        "case": f"T{shape.tokens} V{shape.vocab}",
        "shape": shape._asdict(),
        "results": {name: timing.as_dict() for name, timing in timings.items()},
        "gb_per_s": rates,
        "of_copy": {name: rate / rates["copy of half"] for name, rate in rates.items()},
        "ratios": ratios({n: t for n, t in timings.items() if n != "copy of half"}),
    }


def render(payload: dict[str, Any]) -> str:
    """Short tables."""
    parts = [describe(payload["machine"])]

    def ms(result: dict[str, Any]) -> str:
        x = result["ms"]
        return f"{x['median']:.2f} ({x['min']:.2f}-{x['max']:.2f})"

    def gib(x: int | None) -> str:
        return "-" if x is None else f"{x / 2**30:.2f}"

    for row in payload["linear"]:
        lines = []
        for name, result in row["results"].items():
            memory = row["memory"].get(name, {})
            used = [gib(memory.get(key)) for key in ("above_inputs", "above_gradients")]
            lines.append([name, ms(result), *used, *(f"{x:.1e}" for x in row["error"][name].values())])
        header = ["", "ms", "GiB above inputs", "and gradients", "error of loss", "dhidden", "dweight"]
        parts += ["", f"From hidden states, {row['case']}, forward and backward", "", markdown(header, lines)]
    for row in payload["logits"]:
        lines = [
            [name, ms(result), f"{row['gb_per_s'][name]:.0f}", f"{100 * row['of_copy'][name]:.0f}%"]
            for name, result in row["results"].items()
        ]
        header = ["", "ms", "GB/s", "of the copy's"]
        parts += ["", f"From logits, {row['case']}, forward and backward", "", markdown(header, lines)]
    if payload["skipped"]:
        parts += ["", "Not measured:", *(f"- {what}: {why}" for what, why in payload["skipped"].items())]
    return "\n".join(parts)


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--shapes", type=Shape.parse, nargs="+", metavar="TOKENS,HIDDEN,VOCAB", help="these, not the set"
    )
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help=f"default: {' '.join(PEERS)}")
    options.add_argument("--backend", default="triton", help="ours")
    options.add_argument("--logits-mib", type=int, default=512, help="our buffer of logits, MiB")
    options.add_argument("--rounds", type=int, help="default: 5, or 3 with --quick")
    options.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # the plumbing, on a CPU
    arguments = options.parse_args(argv)
    dry = arguments.dry_run
    arguments.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    arguments.round_ms = 1.0 if dry else 100.0 if arguments.quick else 300.0
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    arguments.linear = arguments.shapes or STANDARD
    arguments.logits = LOGITS if not arguments.shapes else [x._replace(hidden=0) for x in arguments.shapes]
    if arguments.quick and not arguments.shapes:
        arguments.linear, arguments.logits = STANDARD[:1], LOGITS[:1]
    if dry:
        arguments.linear, arguments.logits = [Shape(64, 32, 100)], [Shape(64, 0, 100)]
        arguments.backend, arguments.rounds = "reference", 2
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    torch.manual_seed(0)
    payload: dict[str, Any] = {"machine": machine(arguments.commit), "linear": [], "logits": [], "skipped": {}}
    for part, shapes, function in (
        ("linear", arguments.linear, measure_linear),
        ("logits", arguments.logits, measure_logits),
    ):
        for shape in shapes:
            try:
                payload[part].append(function(shape, arguments, payload["skipped"]))
            except torch.OutOfMemoryError as error:
                payload["skipped"][f"{part}, {shape}"] = str(error).splitlines()[0]
            gc.collect()
            if arguments.device.type == "cuda":
                torch.cuda.empty_cache()
            payload["machine"]["clocks_after"] = clocks()
            write(arguments.out, "loss", payload, render(payload))
    print((arguments.out / "loss.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
