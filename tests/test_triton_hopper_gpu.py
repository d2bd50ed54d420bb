"""The Hopper kernels in Gluon on a GPU, with the cases of the CPU tests at sizes of several tiles."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import Case, cases, check, check_graph_capture, check_keep, check_nan

from seqpar_attn import kernels
from seqpar_attn.kernels.triton import TritonKernel, hopper
from seqpar_attn.mask import MaskKind

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

ALL = cases(331)
GPU = torch.device("cuda", 0)


@pytest.fixture
def kernel():
    """Skip on other GPUs; a Hopper that these kernels should serve must not be refused."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("expected compute capability 9.0")
    assert hopper.refuses(GPU, torch.bfloat16, 128) is None and hopper.refuses(GPU, torch.float16, 256) is None
    found = kernels.resolve("triton", GPU, torch.bfloat16, 128, frozenset(MaskKind))
    assert type(found).__name__ == "HopperKernel"
    return found


@pytest.mark.parametrize("headdim", [32, 64, 128])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_bf16(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_fp16(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.float16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [8, 24, 56, 72, 80, 96, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_headdim(kernel, headdim: int, dtype: torch.dtype, mask: str) -> None:
    case = Case(f"d{headdim}-{mask}", 517, 700, mask, offset=0 if mask == "full" else 150, nheads=4, headdim=headdim)
    check(kernel, case, dtype, "cuda", times=2)


LONG = [
    # Several tiles per program of the forward kernel, with the state of pipelines carried on.
    Case("waves", 2500, 2500, "causal", nheads=16, nheads_kv=8),
    Case("waves-full", 2500, 1200, nheads=16, nheads_kv=8),
    Case("waves-documents", 2500, 2500, "documents", nheads=8, nheads_kv=8),
    Case("waves-parts", 1700, 700, nheads=16, nheads_kv=4, parts=3),
    Case("one-tile-of-many", 64, 5000, nheads=3, nheads_kv=1, strided=True),
    Case("few-queries", 16, 4300, "causal", offset=3900, nheads=132, nheads_kv=132, batch=2, headdim=64),
]


@pytest.mark.parametrize("headdim", [192, 256])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_wide_fp16(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.float16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [192, 256])
@pytest.mark.parametrize("case", [*ALL, *LONG[:5]], ids=str)
def test_wide_bf16(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [136, 160, 184, 200, 248])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_wide_headdim(kernel, headdim: int, mask: str) -> None:
    case = Case(f"d{headdim}-{mask}", 517, 700, mask, offset=0 if mask == "full" else 150, nheads=4, headdim=headdim)
    check(kernel, case, torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [32, 128, 192, 256])
def test_nan(kernel, headdim: int) -> None:
    check_nan(kernel, torch.bfloat16, "cuda", headdim)


@pytest.mark.parametrize("headdim", [32, 128, 192, 256])
def test_keep(kernel, headdim: int) -> None:
    check_keep(kernel, torch.bfloat16, "cuda", headdim)


def test_who_serves(kernel) -> None:
    kinds = frozenset(MaskKind)

    def serving(dtype: torch.dtype, headdim: int, deterministic: bool) -> type:
        return type(kernels.resolve("triton", GPU, dtype, headdim, kinds, None, deterministic))

    assert serving(torch.float16, 128, False) is type(kernel)
    assert serving(torch.bfloat16, 136, False) is type(kernel)
    assert serving(torch.float16, 64, False).__name__ == "HopperForward"
    assert serving(torch.bfloat16, 128, True).__name__ == "HopperForward"
    assert serving(torch.float16, 136, False) is type(kernel)
    assert serving(torch.float32, 128, False) is TritonKernel


def test_slices_of_dq(kernel) -> None:
    """Blocks may add to any rows of dq: they are finished together."""
    generator = torch.Generator("cuda").manual_seed(int(torch.randint(2**31, ())))
    q, k, v, dout = torch.randn(4, 1, 300, 2, 128, generator=generator, device="cuda").bfloat16().unbind()
    lse, out = torch.empty(1, 2, 300, device="cuda"), torch.empty_like(q)
    mask = Case("", 300, 300).block_mask("cuda")
    scale = {"softmax_scale": 0.1, "softcap": None}
    kernel.forward(q, k, v, lse, None, out, mask, **scale, carry=False)
    delta = kernel.delta(out, dout)
    grads = []
    for cuts in ((0, 300), (0, 37, 101, 300)):
        dq, dk, dv = (torch.full(x.shape, float("nan"), device="cuda") for x in (q, k, v))
        for number, (a, b) in enumerate(itertools.pairwise(cuts)):
            kernel.backward(q[:, a:b], k, v, dout[:, a:b], lse[:, :, a:b], delta[:, :, a:b], dq[:, a:b], dk, dv, mask,
                            **scale, carry_dq=False, carry_dkv=number > 0, deterministic=False)  # fmt: skip
        grads.append((torch.empty_like(q), dk, dv))
        kernel.finish_dq(dq, grads[-1][0], 0.1)
    for one, other in zip(*grads):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-2, atol=1e-3)


def test_graph_capture(kernel) -> None:
    check_graph_capture(kernel)
