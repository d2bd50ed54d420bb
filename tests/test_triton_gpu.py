"""The Triton kernels on a GPU, as configured, with the cases of the CPU tests at sizes of several tiles."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, cases, check, check_accumulate, check_keep, check_merge, check_nan

from seqpar_attn.kernels.triton import TritonKernel
from seqpar_attn.kernels.triton.config import Tile

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

KERNEL = TritonKernel()
POINTERS = TritonKernel(lambda *call: Tile(64, 64, 4, 2))
DESCRIPTORS = TritonKernel(lambda *call: Tile(64, 64, 4, 2, tma=True))
ALL = cases(331)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_bf16(case: Case) -> None:
    check(KERNEL, case, torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("case", ALL[1::3], ids=str)
def test_fp16(case: Case) -> None:
    check(KERNEL, case, torch.float16, "cuda", times=2)


@pytest.mark.parametrize("case", ALL[::4], ids=str)
def test_fp32(case: Case) -> None:
    check(KERNEL, case, torch.float32, "cuda", times=2)


@pytest.mark.parametrize("headdim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_headdim(headdim: int, dtype: torch.dtype, mask: str) -> None:
    if dtype != torch.bfloat16 and mask != "causal":
        pytest.skip("one mask suffices")
    case = Case(f"d{headdim}-{mask}", 517, 700, mask, offset=0 if mask == "full" else 150, nheads=4, headdim=headdim)
    check(KERNEL, case, dtype, "cuda", times=2)


@pytest.mark.parametrize("name", ["pointers", "descriptors"])
@pytest.mark.parametrize("case", [c for c in ALL if c.name.startswith(("full-gqa", "causal-early", "window-late"))],
                         ids=str)  # fmt: skip
def test_other_loads(case: Case, name: str) -> None:
    check({"pointers": POINTERS, "descriptors": DESCRIPTORS}[name], case, torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
def test_merge(strided: bool) -> None:
    case = Case("merge", 777, 0, headdim=80 if strided else 128, strided=strided)
    check_merge(KERNEL, case, torch.bfloat16, "cuda")


def test_accumulate() -> None:
    check_accumulate(KERNEL, torch.float32, "cuda")


def test_nan() -> None:
    check_nan(KERNEL, torch.bfloat16, "cuda")


def test_keep() -> None:
    check_keep(KERNEL, torch.bfloat16, "cuda")


def test_bitwise_reproducible() -> None:
    """Two runs of the same backward agree in every bit."""
    generator = torch.Generator("cuda").manual_seed(int(torch.randint(2**31, ())))
    q, k, v, dout = torch.randn(4, 1, 1500, 4, 64, generator=generator, device="cuda").to(torch.bfloat16).unbind()
    lse, out = torch.empty(1, 4, 1500, device="cuda"), torch.empty_like(q)
    mask = Case("", 1500, 1500, "causal").block_mask("cuda")
    KERNEL.forward(q, k, v, lse, None, out, mask, softmax_scale=0.125, softcap=None, carry=False)
    delta, runs = KERNEL.delta(out, dout), []
    for _ in range(2):
        runs.append([torch.empty(x.shape, device="cuda") for x in (q, k, v)])
        KERNEL.backward(q, k, v, dout, lse, delta, *runs[-1], mask, softmax_scale=0.125, softcap=None,
                        carry_dq=False, carry_dkv=False, deterministic=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*runs))
