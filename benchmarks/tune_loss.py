"""Where the losses' time goes on one GPU, and what other settings would make of it.

    python3 benchmarks/tune_loss.py

Per vocabulary: the rows kernel as it is and the candidate of resident_rows.py in several sizes, as a share of the rate
of a copy of as many bytes, checked against each other; a whole cross_entropy call, and the host's part of it; then
linear_cross_entropy by kernel, and with other scratch sizes. Prints only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  finds the checkout

# isort: split
import torch
from resident_rows import Part, launch_resident
from torch.profiler import ProfilerActivity, profile

import seqpar_attn
from seqpar_attn.loss import products
from seqpar_attn.loss.options import Options
from seqpar_attn.loss.triton.rows import launch_rows

ROWS = [(16384, 32000), (16384, 128256), (8192, 262144)]
PARTS = [Part(512, 8, 8), Part(512, 8, 4), Part(1024, 8, 16), Part(1024, 8, 8), Part(2048, 8, 32), Part(2048, 8, 16)]


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


def rows(tokens: int, vocab: int) -> None:
    x = torch.randn(tokens, vocab, device="cuda").bfloat16()
    target = torch.randint(vocab, (tokens,), device="cuda", dtype=torch.int32)
    weight = torch.full((tokens,), 1 / tokens, device="cuda")
    options, half, flat = Options(vocab), x.numel() // 2, x.view(-1)
    copied = 2 * milliseconds(lambda: flat[half : 2 * half].copy_(flat[:half]))
    print(f"vocabulary {vocab}: one read and one write by a copy {copied:.3f} ms")
    few = slice(0, 64)
    found = []
    for launch, more in ((launch_rows, (True,)), (launch_resident, ())):
        statistics, out = torch.full((4, 64), float("nan"), device="cuda"), torch.full_like(x[few], float("nan"))
        launch(x[few], target[few], weight[few], statistics, out, options, *more)
        found.append((statistics, out))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
    statistics = torch.empty(4, tokens, device="cuda")
    took = milliseconds(lambda: launch_rows(x, target, weight, statistics, x, options, True))
    print(f"    {took:8.3f} ms  {copied / took:4.0%}  rows kernel")
    for part in PARTS:
        took = milliseconds(lambda p=part: launch_resident(x, target, weight, statistics, x, options, p))
        print(f"    {took:8.3f} ms  {copied / took:4.0%}  {part}")
    leaf, labels = x.requires_grad_(), target.long()

    def whole() -> None:
        torch.autograd.grad(seqpar_attn.cross_entropy(leaf, labels, inplace=True), leaf)

    took = milliseconds(whole, 10)
    torch.cuda.synchronize()
    began = time.perf_counter()
    seqpar_attn.cross_entropy(leaf, labels, inplace=True, check_labels=False)
    queued = 1e3 * (time.perf_counter() - began)
    print(f"    {took:8.3f} ms  {copied / took:4.0%}  whole call (forward queued after {queued:.3f} ms); its kernels:")
    by_kernel(whole, 5)


def linear(vocab: int) -> None:
    hidden = torch.randn(16384, 4096, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, 4096, device="cuda") / 64).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (16384,), device="cuda")

    def whole() -> None:
        torch.autograd.grad(seqpar_attn.linear_cross_entropy(hidden, weight, labels), (hidden, weight))

    print(f"linear, vocabulary {vocab}: {milliseconds(whole, 3):.2f} ms; its kernels:")
    by_kernel(whole, 3)
    usual = products.SCRATCH_BYTES
    for mib in (16, 64, 128):
        products.SCRATCH_BYTES = mib << 20
        print(f"    {milliseconds(whole, 3):8.2f} ms  with {mib} MiB of scratch")
    products.SCRATCH_BYTES = usual


def main() -> None:
    for tokens, vocab in ROWS:
        rows(tokens, vocab)
        torch.cuda.empty_cache()
    for vocab in (32000, 128256):
        linear(vocab)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
