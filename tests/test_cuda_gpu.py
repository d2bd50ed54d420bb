"""csrc's kernels on a GPU, with the cases of the CPU tests at sizes of several tiles."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from kernel_cases import (
    Case,
    cases,
    check,
    check_accumulate,
    check_graph_capture,
    check_keep,
    check_merge,
    check_nan,
)

from seqpar_attn import kernels
from seqpar_attn.kernels.cuda import CudaKernel
from seqpar_attn.kernels.cuda.library import load
from seqpar_attn.kernels.cuda.structs import Backward, Problem
from seqpar_attn.mask import MaskKind

pytestmark = pytest.mark.gpu

KERNEL, WIDE, NARROW = CudaKernel(), CudaKernel(1), CudaKernel(2)
ALL = cases(331)


@pytest.fixture(autouse=True)
def served():
    """Skip where the library or the GPU is missing; a GPU that it should serve must not be refused."""
    missing = KERNEL.unavailable()
    if missing is None and torch.cuda.get_device_capability() != (9, 0):
        missing = "expected compute capability 9.0"
    if missing:
        pytest.skip(missing)
    assert KERNEL.refuses(torch.device("cuda", 0), torch.bfloat16, 256, frozenset(MaskKind), 2.0) is None


@pytest.mark.parametrize("case", ALL, ids=str)
def test_bf16(case: Case) -> None:
    check(KERNEL, case, torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("case", ALL[1::2], ids=str)
def test_fp16(case: Case) -> None:
    check(KERNEL, case, torch.float16, "cuda", times=2)


@pytest.mark.parametrize("kernel", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_headdim_128(case: Case, kernel: CudaKernel) -> None:
    check(kernel, dataclasses.replace(case, headdim=128), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_headdim_256(case: Case) -> None:
    check(KERNEL, dataclasses.replace(case, headdim=256), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [8, 64, 80, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_headdim(headdim: int, dtype: torch.dtype, mask: str) -> None:
    case = Case(f"d{headdim}-{mask}", 517, 700, mask, offset=0 if mask == "full" else 150, nheads=4, headdim=headdim)
    check(KERNEL, case, dtype, "cuda", times=2)


LONG = [
    # Forward tiles cut along keys, whose pieces are put together again.
    Case("cut", 700, 3000),
    Case("cut-packed", 331, 2500, nheads=4, nheads_kv=2, batch=2),
    Case("cut-packed-mqa", 65, 5000, nheads=3, nheads_kv=1, strided=True),
    Case("cut-parts", 331, 1333, nheads=4, nheads_kv=2, parts=2),
    Case("cut-parts-softcap", 200, 2100, parts=3, softcap=2.0),
    # Backward tiles cut along queries: of a wave that is not the only one, and of one that is, with parts and groups.
    Case("cut-backward", 3000, 1500, nheads=12, nheads_kv=12),
    Case("cut-backward-grouped", 1500, 1400, nheads=8, nheads_kv=4, batch=2, strided=True),
    Case("cut-backward-parts", 2100, 1300, nheads=14, nheads_kv=7, parts=2),
    # Backward in more than one wave, of which every other one walks the other way, and in groups of heads.
    Case("waves", 2500, 2500, "causal", nheads=16, nheads_kv=8),
    Case("waves-documents", 2500, 2500, "documents", nheads=8, nheads_kv=8),
]
GROUPS = [  # of key heads, as many as make many waves of key tiles
    Case("groups", 16, 4300, "causal", offset=3900, nheads=132, nheads_kv=132, batch=2, headdim=16),
    Case("groups-grouped-query", 16, 4300, "causal", offset=4284, nheads=264, nheads_kv=132, headdim=16),
    Case("groups-256", 200, 2100, "causal", offset=1900, nheads=80, nheads_kv=40, headdim=256),
]


class Unordered(CudaKernel):
    """The checks ask for gradients in a fixed order where there is one; this one gives the usual ones."""

    def backward(self, *tensors: Any, deterministic: bool, **options: Any) -> None:
        super().backward(*tensors, deterministic=False, **options)


@pytest.mark.parametrize("kernel", [KERNEL, Unordered()], ids=["ordered", "unordered"])
@pytest.mark.parametrize(
    "case", [*(dataclasses.replace(case, headdim=d) for d in (64, 128, 256) for case in LONG), *GROUPS],
    ids=lambda case: f"{case}-{case.headdim}",
)  # fmt: skip
def test_long(case: Case, kernel: CudaKernel) -> None:
    check(kernel, case, torch.bfloat16, "cuda", times=2)


def test_cut_backward() -> None:
    """Key tiles of the last wave are cut where that helps: such a launch needs memory for the sums of pieces."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def ints(tiles: int, headdim: int = 128, mask: int = 0, deterministic: bool = False) -> int:
        problem = Problem(batch=1, seqlen_q=4096, seqlen_k=128 * tiles, parts=1, nheads=1, nheads_kv=1, headdim=headdim,
                          dtype=0, mask=mask, softmax_scale=1.0)  # fmt: skip
        struct = Backward(problem=problem, deterministic=deterministic)
        return load().seqpar_attn_backward_counters(ctypes.byref(struct))

    assert ints(sms + 4) > 5 * 2 * 128 * 128
    assert ints(sms) == ints(sms - 4) == ints(sms + 4, mask=1) == 0
    assert ints(sms + 4, headdim=64) == ints(sms + 4, headdim=256) == 0
    assert ints(sms + 4, deterministic=True) == 4096 // 64 * 8


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_unordered(case: Case, headdim: int) -> None:
    check(Unordered(), dataclasses.replace(case, headdim=headdim), torch.bfloat16, "cuda")


@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merge(dtype: torch.dtype, strided: bool) -> None:
    check_merge(KERNEL, Case("merge", 777, 0, headdim=80 if strided else 128, strided=strided), dtype, "cuda")


def test_accumulate() -> None:
    check_accumulate(KERNEL, torch.float32, "cuda")


@pytest.mark.parametrize("headdim", [32, 256])
def test_nan(headdim: int) -> None:
    check_nan(KERNEL, torch.bfloat16, "cuda", headdim)


@pytest.mark.parametrize("headdim", [32, 256])
def test_keep(headdim: int) -> None:
    check_keep(KERNEL, torch.bfloat16, "cuda", headdim)


def test_refuses() -> None:
    for dtype, headdim, message in (
        (torch.float32, 64, "expected bfloat16 or float16, got torch.float32"),
        (torch.bfloat16, 264, "multiple of 8 and at most 256, got 264"),
        (torch.bfloat16, 60, "multiple of 8 and at most 256, got 60"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.resolve("cuda", torch.device("cuda", 0), dtype, headdim, frozenset(MaskKind))


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "documents"])
def test_deterministic(mask: str, headdim: int) -> None:
    """Runs agree in every bit, and the counters that put them in order are left as they were found."""
    case = Case("", 1500, 1500, mask, nheads=4, headdim=headdim)
    generator = torch.Generator("cuda").manual_seed(int(torch.randint(2**31, ())))
    shape = (4, 1, 1500, 4, headdim)
    q, k, v, dout = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16).unbind()
    lse, out = torch.empty(1, 4, 1500, device="cuda"), torch.empty_like(q)
    mask_on_gpu = case.block_mask("cuda")
    KERNEL.forward(q, k, v, lse, None, out, mask_on_gpu, softmax_scale=0.125, softcap=None, carry=False)
    delta, runs = KERNEL.delta(out, dout), []
    for _ in range(4):
        runs.append([torch.empty(x.shape, device="cuda") for x in (q, k, v)])
        KERNEL.backward(q, k, v, dout, lse, delta, *runs[-1], mask_on_gpu, softmax_scale=0.125, softcap=None,
                        carry_dq=False, carry_dkv=False, deterministic=True)  # fmt: skip
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_graph_capture() -> None:
    check_graph_capture(KERNEL)
