"""Where the losses' time goes on one GPU, and what other settings would make of it.

    python3 benchmarks/tune_loss.py

Per vocabulary: the kernel that reads rows once in several sizes, as a share of the rate of a copy of as many bytes,
checked against two passes of two kernels; a whole cross_entropy call, and the host's part of it. Then the gradient of a
weight, chunk by chunk, in several orders of tiles, against cuBLAS and an addition; then linear_cross_entropy by kernel.
Prints only (results/loss/tune.txt); what fails is printed, and costs nothing else.
"""

from __future__ import annotations

import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  finds the checkout

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

import seqpar_attn
from seqpar_attn.loss.options import Options
from seqpar_attn.loss.products import WeightSum
from seqpar_attn.loss.triton import weight_gradient as one_kernel
from seqpar_attn.loss.triton.resident import Part, launch_resident
from seqpar_attn.loss.triton.rows import launch_gradient, launch_statistics

ROWS = [(16384, 32000), (16384, 128256), (8192, 262144)]
PARTS = [(8, 4), (4, 8), (16, 4)]
"""Chunks and warps of a part; the first is the default."""
"""Of a first chunk and of a later one. Compiling each takes seconds."""


def milliseconds(call: Callable[[], Any], repeat: int = 20) -> float:
    call()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeat)
    return sorted(times)[2]


def by_kernel(call: Callable[[], Any], repeat: int, most: int = 10) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeat):
            call()
        torch.cuda.synchronize()
    for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:most]:
        print(
            f"    {event.self_device_time_total / repeat / 1e3:8.3f} ms  {event.count // repeat:4d} x {event.key[:80]}"
        )


def report(
    name: str, copied: float, call: Callable[[], Any], right: Callable[[], Any] = lambda: None, repeat: int = 20
) -> None:
    """A line: time, share of ``copied``, name; or why not."""
    try:
        right()
        took = milliseconds(call, repeat)
        print(f"    {took:8.3f} ms  {copied / took:4.0%}  {name}", flush=True)
    except Exception as error:
        print(f"    failed: {name}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)


def rows(tokens: int, vocab: int) -> None:
    x = torch.randn(tokens, vocab, device="cuda").bfloat16()
    target = torch.randint(vocab, (tokens,), device="cuda", dtype=torch.int32)
    weight = torch.full((tokens,), 1 / tokens, device="cuda")
    options, half, flat = Options(vocab), x.numel() // 2, x.view(-1)
    copied = 2 * milliseconds(lambda: flat[half : 2 * half].copy_(flat[:half]))
    print(f"vocabulary {vocab}: one read and one write by a copy {copied:.3f} ms")
    statistics = torch.empty(4, tokens, device="cuda")

    def twice() -> None:
        launch_statistics(x, target, weight, statistics, options)
        launch_gradient(x, target, weight, statistics, x, options)

    # A copy: what is timed below writes gradients over the logits.
    few, truth = x[:64].clone(), (torch.empty(4, 64, device="cuda"), torch.empty_like(x[:64]))
    launch_statistics(few, target[:64], weight[:64], truth[0], options)
    launch_gradient(few, target[:64], weight[:64], truth[0], truth[1], options)
    report("two kernels", copied, twice)
    for chunks, warps in PARTS:
        part = Part(chunks, warps)

        def once(part: Part = part) -> None:
            launch_resident(x, target, weight, statistics, x, options, part)

        def right(part: Part = part) -> None:
            got = torch.full((4, 64), float("nan"), device="cuda"), torch.full_like(few, float("nan"))
            launch_resident(few, target[:64], weight[:64], *got, options, part)
            for a, b in zip(got, truth):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)

        report(str(part), copied, once, right)
    leaf, labels = x.requires_grad_(), target.long()

    def whole() -> None:
        torch.autograd.grad(seqpar_attn.cross_entropy(leaf, labels, inplace=True), leaf)

    took = milliseconds(whole, 10)
    print(f"    {took:8.3f} ms  {copied / took:4.0%}  whole call; its kernels:")
    by_kernel(whole, 5)
    host_time()


def host_time() -> None:
    """Of a forward and a backward pass whose kernels take next to no time, so that the queue never fills."""
    leaf = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(32000, (64,), device="cuda")

    def whole() -> None:
        loss = seqpar_attn.cross_entropy(leaf, labels, inplace=True, check_labels=False)
        torch.autograd.grad(loss, leaf)

    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            whole()
        times.append(1e3 * (time.perf_counter() - began) / 20)
    print(f"    {sorted(times)[2]:8.3f} ms  host time of a forward and a backward pass", flush=True)


def weight_gradient(vocab: int, tokens: int) -> None:
    """A chunk of ``tokens``. The share is that of the time of the product alone, by cuBLAS."""
    width = 4096
    hidden = torch.randn(tokens, width, device="cuda").bfloat16()
    dlogits = (torch.randn(tokens, vocab, device="cuda") / 64).bfloat16()
    high = torch.empty(vocab, width, dtype=torch.int16, device="cuda")
    low = torch.empty(vocab, width, dtype=torch.uint8, device="cuda")
    alone = milliseconds(lambda: torch.mm(dlogits.t(), hidden), 5)
    print(
        f"weight gradient, vocabulary {vocab}, {tokens} tokens: product alone, to bfloat16, {alone:.3f} ms", flush=True
    )
    total = WeightSum(torch.empty(1, width, device="cuda", dtype=torch.bfloat16).expand(vocab, width), True)

    def apart() -> None:
        with unittest.mock.patch.object(seqpar_attn.loss.triton, "add_product", lambda *arguments: False):
            total.add(dlogits, hidden)

    report("product to scratch, then addition", alone, apart, repeat=5)
    some = torch.cat([torch.arange(0, 300), torch.arange(vocab - 300, vocab)]).cuda()
    truth = dlogits[:, some].double().t() @ hidden.double()
    plain_band = one_kernel.band_of(width // one_kernel.WIDTH, 2 * tokens * width)
    for first in (True, False):
        for band in (16, 8):

            def fused(first: bool = first, band: int = band) -> None:
                with unittest.mock.patch.object(one_kernel, "band_of", lambda *sizes: band):
                    one_kernel.launch_weight_gradient(dlogits, hidden, high, low, first)

            def right(first: bool = first, fused: Callable[..., None] = fused) -> None:
                high.fill_(0x7FFF if first else 0), low.fill_(255 if first else 0)
                for _ in range(1 if first else 2):
                    fused()
                got = ((high[some].int() << 16) + (low[some].view(torch.int8).int() << 8)).view(torch.float32)
                wanted = truth if first else 2 * truth
                error = ((got - wanted).norm() / wanted.norm()).item()
                assert error < 2e-5, error

            chosen = "  <- chosen" if band == plain_band else ""
            report(f"one kernel, first={first}, band {band}{chosen}", alone, fused, right, 5)


def linear(vocab: int) -> None:
    hidden = torch.randn(16384, 4096, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, 4096, device="cuda") / 64).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (16384,), device="cuda")

    def whole() -> None:
        torch.autograd.grad(seqpar_attn.linear_cross_entropy(hidden, weight, labels), (hidden, weight))

    print(f"linear, vocabulary {vocab}: {milliseconds(whole, 3):.2f} ms; its kernels:")
    by_kernel(whole, 3)


def main() -> None:
    cases: list[tuple[Callable[..., None], tuple[int, ...]]] = [(rows, sizes) for sizes in ROWS]
    for vocab, chunk in ((32000, 8192), (128256, 2048)):
        cases += [(weight_gradient, (vocab, chunk)), (linear, (vocab,))]
    for case, sizes in cases:
        try:
            case(*sizes)
        except Exception as error:
            print(f"    failed: {case.__name__}{sizes}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
