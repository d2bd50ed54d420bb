"""csrc's kernels on a GPU, with the cases of the CPU tests at sizes of several tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import Case, cases, check, check_accumulate, check_keep, check_merge, check_nan

from seqpar_attn import kernels
from seqpar_attn.kernels.cuda import CudaKernel
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
    assert KERNEL.refuses(torch.device("cuda", 0), torch.bfloat16, 128, frozenset(MaskKind), 2.0) is None


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


@pytest.mark.parametrize("headdim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_headdim(headdim: int, dtype: torch.dtype, mask: str) -> None:
    case = Case(f"d{headdim}-{mask}", 517, 700, mask, offset=0 if mask == "full" else 150, nheads=4, headdim=headdim)
    check(KERNEL, case, dtype, "cuda", times=2)


@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merge(dtype: torch.dtype, strided: bool) -> None:
    check_merge(KERNEL, Case("merge", 777, 0, headdim=80 if strided else 128, strided=strided), dtype, "cuda")


def test_accumulate() -> None:
    check_accumulate(KERNEL, torch.float32, "cuda")


def test_nan() -> None:
    check_nan(KERNEL, torch.bfloat16, "cuda")


def test_keep() -> None:
    check_keep(KERNEL, torch.bfloat16, "cuda")


def test_refuses() -> None:
    for dtype, headdim, message in (
        (torch.float32, 64, "expected bfloat16 or float16, got torch.float32"),
        (torch.bfloat16, 136, "multiple of 8 and at most 128, got 136"),
        (torch.bfloat16, 60, "multiple of 8 and at most 128, got 60"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.resolve("cuda", torch.device("cuda", 0), dtype, headdim, frozenset(MaskKind))
