"""Time tile configurations of the Triton kernels beside FlexAttention: the source of ``kernels/triton/config.py``.

    python benchmarks/tune_triton.py sweep      # candidates per kernel and shape, medians of interleaved rounds
    python benchmarks/tune_triton.py compare    # the configured kernels against FlexAttention, and host time per launch

Everything is bf16 with batch 1. FLOPs: 4 Sq Sk H D forward, halved when causal; backward 2.5 times that.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from seqpar_attn.kernels.base import FULL, BlockMask, interval_mask
from seqpar_attn.kernels.triton import TritonKernel
from seqpar_attn.kernels.triton.config import Tile, choose
from seqpar_attn.mask import MaskKind


@dataclass(frozen=True)
class Shape:
    seqlen_q: int
    seqlen_k: int
    headdim: int
    mask: str
    nheads: int = 32
    nheads_kv: int = 32

    def flops(self) -> float:
        pairs = self.seqlen_q * self.seqlen_k / (1 if self.mask == "full" else 2)
        return 4 * pairs * self.nheads * self.headdim

    def __str__(self) -> str:
        return f"{self.seqlen_q}x{self.seqlen_k} D{self.headdim} {self.nheads}:{self.nheads_kv} {self.mask}"

    def block_mask(self) -> BlockMask:
        if self.mask == "full":
            return FULL
        if self.mask == "causal":
            return BlockMask(MaskKind.CAUSAL, self.seqlen_k - self.seqlen_q)
        hi = torch.arange(1, self.seqlen_q + 1, device="cuda", dtype=torch.int32)  # a causal mask as intervals
        return interval_mask(torch.zeros_like(hi), hi, self.seqlen_k)


def tensors(shape: Shape) -> dict[str, torch.Tensor]:
    def normal(seqlen: int, nheads: int) -> torch.Tensor:
        return torch.randn(1, seqlen, nheads, shape.headdim, device="cuda", dtype=torch.bfloat16)

    q, dout, out = (normal(shape.seqlen_q, shape.nheads) for _ in range(3))
    k, v = (normal(shape.seqlen_k, shape.nheads_kv) for _ in range(2))
    lse = torch.empty(1, shape.nheads, shape.seqlen_q, device="cuda")
    found = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse, "delta": torch.zeros_like(lse)}
    accumulators = {"out_acc": q, "dq": q, "dk": k, "dv": v}
    found |= {name: torch.zeros(x.shape, device="cuda") for name, x in accumulators.items()}
    kernel, scale = TritonKernel(lambda *call: Tile(64, 64, 4, 2)), {"softmax_scale": shape.headdim**-0.5}
    scale["softcap"] = None
    kernel.forward(q, k, v, lse, None, out, shape.block_mask(), **scale, carry=False)
    found["delta"] = kernel.delta(out, dout)
    return found


def launcher(direction: str, shape: Shape, x: dict[str, torch.Tensor], tile: Tile, carry: bool) -> Callable[[], None]:
    """One kernel of ours; the forward writes ``out`` without carry and ``out_acc`` with it."""
    from seqpar_attn.kernels.triton.backward import launch_dkdv, launch_dq
    from seqpar_attn.kernels.triton.forward import launch_forward

    mask, rest = shape.block_mask(), (shape.headdim**-0.5, None, carry)
    q, k, v, lse = x["q"], x["k"], x["v"], x["lse"]
    if direction == "forward":
        lse = lse.clone()
        acc, out = (x["out_acc"], None) if carry else (None, x["out"])
        return lambda: launch_forward(tile, q, k, v, lse, acc, out, mask, *rest, True)
    common = (tile, q, k, v, x["dout"], lse, x["delta"])
    if direction == "dkdv":
        return lambda: launch_dkdv(*common, x["dk"], x["dv"], mask, *rest)
    return lambda: launch_dq(*common, x["dq"], mask, *rest)


WS = {"num_warps": 4, "tma": True, "specialized": True}
CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    ("forward", 128): [
        Tile(128, 128, num_stages=2, **WS), Tile(128, 64, num_stages=2, **WS), Tile(128, 64, num_stages=3, **WS),
        Tile(128, 128, 8, 2, tma=True), Tile(128, 64, 8, 3, tma=True), Tile(128, 128, 8, 2), Tile(128, 64, 8, 3),
    ],
    ("forward", 64): [
        Tile(128, 128, num_stages=2, **WS), Tile(256, 64, num_stages=2, **WS), Tile(128, 64, num_stages=3, **WS),
        Tile(128, 128, 8, 2, tma=True), Tile(128, 64, 4, 3, tma=True), Tile(128, 64, 4, 2),
    ],
    ("dkdv", 128): [
        Tile(64, 128, num_stages=2, **WS), Tile(32, 128, num_stages=2, **WS), Tile(64, 128, 8, 3),
        Tile(64, 128, 8, 2), Tile(64, 128, 8, 2, tma=True), Tile(64, 64, 4, 2),
    ],
    ("dkdv", 64): [
        Tile(64, 128, num_stages=2, **WS), Tile(128, 128, num_stages=2, **WS), Tile(64, 128, 8, 3),
        Tile(128, 128, 8, 2), Tile(64, 128, 8, 2, tma=True), Tile(64, 64, 4, 3),
    ],
    ("dq", 128): [
        Tile(128, 64, num_stages=2, **WS), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2, tma=True),
        Tile(128, 64, 8, 3, tma=True), Tile(128, 128, 8, 2, tma=True), Tile(64, 64, 4, 2),
    ],
    ("dq", 64): [
        Tile(128, 64, num_stages=2, **WS), Tile(128, 128, num_stages=2, **WS), Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2, tma=True), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2),
    ],
}  # fmt: skip
SWEEP = [Shape(s, s, 128, m) for s in (16384, 4096) for m in ("full", "causal")]
SWEEP += [Shape(8192, 8192, 128, "interval"), Shape(8192, 8192, 64, "full"), Shape(8192, 8192, 64, "causal")]
COMPARE = [Shape(s, s, d, m) for s, d in ((16384, 128), (4096, 128), (16384, 64)) for m in ("full", "causal")]
RING = [
    Shape(a * n, b * n, 128, m, 32, 8)
    for n in (4096, 8192)
    for a, b, m in ((1, 0.5, "full"), (0.5, 1, "full"), (1, 1, "causal"))
]
RING = [replace(s, seqlen_q=int(s.seqlen_q), seqlen_k=int(s.seqlen_k)) for s in RING]
GQA = [Shape(16384, 16384, 128, m, 32, 8) for m in ("full", "causal")]


def _try(direction: str, shape: Shape, tile: Tile, carry: bool) -> str | None:
    """Compile one candidate into Triton's cache and run it once; the reason if that fails."""
    small = replace(shape, seqlen_q=512, seqlen_k=512, nheads=2, nheads_kv=2)
    try:
        launcher(direction, small, tensors(small), tile, carry)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def _run_flex(shape: Shape) -> None:
    forward, backward = flex(shape, tensors(shape))
    forward()
    backward()
    torch.cuda.synchronize()


def interleaved(calls: dict[str, Callable[[], None]], rounds: int = 4) -> dict[str, float]:
    """Median milliseconds per call; each round times every call once, so that drift of the clocks hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            start.record()
            call()
            call()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 2)
    return {name: statistics.median(values) for name, values in times.items()}


def flex(shape: Shape, x: dict[str, torch.Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """FlexAttention's forward and backward on its own layout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x[name].transpose(1, 2).contiguous().requires_grad_() for name in "qkv")
    dout = x["dout"].transpose(1, 2).contiguous()
    block_mask = None
    if shape.mask != "full":
        offset = shape.seqlen_k - shape.seqlen_q
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i + offset, None, None, shape.seqlen_q, shape.seqlen_k, device="cuda"
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape.nheads != shape.nheads_kv

    def forward() -> torch.Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)

    out = forward()
    return forward, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def compile_all(plan: dict[tuple, tuple], seconds: float) -> dict[tuple, str | None]:
    """Compile and run every candidate in processes of their own: one that crashes or hangs must not stop the rest."""
    pool = concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn"))
    futures = {key: pool.submit(_try, *call) for key, call in plan.items()}
    concurrent.futures.wait(futures.values(), seconds)
    failed = {key: future.result() if future.done() else "hangs" for key, future in futures.items()}
    for process in list(pool._processes.values()):
        process.kill()
    return failed


def sweep(shapes: list[Shape], only: str | None) -> None:
    plan = [
        (direction, shape, tile, False)
        for shape in shapes
        for direction in ("forward", "dkdv", "dq")
        if only is None or only == direction
        for tile in CANDIDATES[direction, shape.headdim]
        if not (tile.specialized and shape.mask == "interval")
    ]
    start = time.time()
    failed = compile_all({(d, s.headdim, s.mask, t): (d, s, t, c) for d, s, t, c in plan}, 100)
    print(f"compiled {len(failed)} kernels in {time.time() - start:.0f} s")
    for key, reason in failed.items():
        if reason is not None:
            print(key[0], f"D{key[1]}", key[2], _label(key[3]), reason)
    for shape, group in itertools.groupby(plan, key=lambda entry: entry[1]):
        x = tensors(shape)
        theirs = flex(shape, x) if shape in COMPARE[:4] else None
        for direction, entries in itertools.groupby(group, key=lambda entry: entry[0]):
            calls = {
                _label(tile): launcher(direction, shape, x, tile, carry)
                for _, _, tile, carry in entries
                if failed[direction, shape.headdim, shape.mask, tile] is None
            }
            if theirs is not None and direction == "forward":
                calls["flex"] = theirs[0]
            # Work of the matrix units: forward 2 products, dkdv 4, dq 3.
            work = shape.flops() * {"forward": 1.0, "dkdv": 2.0, "dq": 1.5}[direction]
            results = interleaved(calls)
            rates = ", ".join(f"{n} {work / t / 1e9:.0f}" for n, t in sorted(results.items(), key=lambda p: p[1]))
            print(f"{shape} {direction}: {rates}", flush=True)
            if shape.mask != "full":
                best = min((n for n in results if n != "flex"), key=lambda name: results[name])
                _sweep_heads(calls[best], work)
        if theirs is not None:
            rate = 2.5 * shape.flops() / interleaved({"flex": theirs[1]})["flex"] / 1e9
            print(f"{shape} flex whole backward {rate:.0f}", flush=True)


def _sweep_heads(call: Callable[[], None], work: float) -> None:
    """How many heads should interleave under a mask?"""
    from seqpar_attn.kernels.triton import common, plans

    def with_bytes(count: int) -> Callable[[], None]:
        def run() -> None:
            common.L2_BYTES_FOR_KEYS = count
            plans._plans.clear()
            call()

        return run

    configured = common.L2_BYTES_FOR_KEYS
    results = interleaved({str(mib): with_bytes(mib << 20) for mib in (0, 8, 16, 32, 64, 1 << 20)})
    common.L2_BYTES_FOR_KEYS = configured
    print("   MiB of keys in the L2:", ", ".join(f"{n} {work / t / 1e9:.0f}" for n, t in results.items()), flush=True)


def _label(tile: Tile) -> str:
    flags = ("t" if tile.tma else "") + ("w" if tile.specialized else "")
    return f"{tile.block_m}.{tile.block_n}.{tile.num_warps}.{tile.num_stages}{flags}{tile.maxnreg or ''}"


def host_time(call: Callable[[], None], count: int = 200) -> float:
    """Microseconds of host time per call, while the GPU still works on earlier ones."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / count * 1e6


def our_calls(kernel: TritonKernel, shape: Shape, x: dict[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Forward and whole backward (with delta), and both as a middle step of a ring: carried, delta known."""
    mask, scale = shape.block_mask(), {"softmax_scale": shape.headdim**-0.5, "softcap": None}
    inputs, gradients = (x["q"], x["k"], x["v"]), (x["dq"], x["dk"], x["dv"])

    def forward(carry: bool) -> None:
        acc, out = (x["out_acc"], None) if carry else (None, x["out"])
        kernel.forward(*inputs, x["lse"], acc, out, mask, **scale, carry=carry)

    def backward(carry: bool) -> None:
        delta = x["delta"] if carry else kernel.delta(x["out"], x["dout"])
        kernel.backward(*inputs, x["dout"], x["lse"], delta, *gradients, mask, **scale, carry_dq=carry,
                        carry_dkv=carry, deterministic=True)  # fmt: skip

    return {
        "f": lambda: forward(False), "b": lambda: backward(False),
        "fc": lambda: forward(True), "bc": lambda: backward(True),
    }  # fmt: skip


def compare(shapes: list[Shape], with_flex: bool) -> None:
    kernel = TritonKernel()
    print(f"{'shape':32s} forward ours / flex (carry)    backward ours / flex (carry)   TFLOP/s")
    for shape in shapes:
        x = tensors(shape)
        calls = our_calls(kernel, shape, x)
        if with_flex:
            calls["flex f"], calls["flex b"] = flex(shape, x)
        milliseconds = interleaved(calls)
        rate = {n: shape.flops() * (2.5 if "b" in n.split()[-1] else 1) / t / 1e9 for n, t in milliseconds.items()}
        theirs = rate.get("flex f", float("nan")), rate.get("flex b", float("nan"))
        print(
            f"{shape!s:32s} {rate['f']:5.0f} / {theirs[0]:4.0f} = {rate['f'] / theirs[0]:.2f} ({rate['fc']:4.0f})   "
            f"{rate['b']:5.0f} / {theirs[1]:4.0f} = {rate['b'] / theirs[1]:.2f} ({rate['bc']:4.0f})",
            flush=True,
        )
    report_host_time()


def report_host_time() -> None:
    kernel = TritonKernel()
    tiny = Shape(128, 128, 128, "causal", 2, 2)
    x = tensors(tiny)
    for direction in ("forward", "dkdv", "dq"):
        tile = choose(direction, 90, 2, 128, MaskKind.CAUSAL)
        call = launcher(direction, tiny, x, tile, True)
        print(f"host time {direction} {_label(tile)}: {host_time(call):.1f} us; "
              f"by pointers {host_time(launcher(direction, tiny, x, Tile(64, 64, 4, 2), True)):.1f} us")  # fmt: skip
    print(f"host time delta: {host_time(lambda: kernel.delta(x['out'], x['dout'])):.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "compare", "warm"], help="warm: only fill FlexAttention's caches")
    parser.add_argument("--only", choices=["forward", "dkdv", "dq"])
    parser.add_argument("--shapes", choices=["main", "ring", "all"], default="all", help="compare: which shapes")
    parser.add_argument("--no-flex", action="store_true", help="compare: only our kernels")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = {"main": COMPARE[:4], "ring": RING + GQA, "all": COMPARE + RING + GQA}[arguments.shapes]
    if arguments.what == "sweep":
        sweep(SWEEP, arguments.only)
        report_host_time()
    elif arguments.what == "warm":
        with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_run_flex, shapes))
    else:
        compare(shapes, not arguments.no_flex)


if __name__ == "__main__":
    main()
