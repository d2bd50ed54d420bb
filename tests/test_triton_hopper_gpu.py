"""The Hopper kernels in Gluon on a GPU, with the cases of the CPU tests at sizes of several tiles."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import Case, cases, check, check_keep, check_nan

from seqpar_attn import kernels
from seqpar_attn.autograd import backward_pass, forward_pass
from seqpar_attn.comm.loopback import Loopback
from seqpar_attn.kernels.triton import TritonKernel, hopper
from seqpar_attn.mask import Mask, MaskKind
from seqpar_attn.plan import make_plan
from seqpar_attn.validation import Call

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

ALL = cases(331)
GPU = torch.device("cuda", 0)


@pytest.fixture
def kernel():
    """Skip on other GPUs; a Hopper that these kernels should serve must not be refused."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("expected compute capability 9.0")
    assert hopper.refuses(GPU, torch.bfloat16, 128, False) is None
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


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long(kernel, case: Case, headdim: int) -> None:
    check(kernel, dataclasses.replace(case, headdim=headdim), torch.bfloat16, "cuda", times=2)


@pytest.mark.parametrize("headdim", [32, 128])
def test_nan(kernel, headdim: int) -> None:
    check_nan(kernel, torch.bfloat16, "cuda", headdim)


@pytest.mark.parametrize("headdim", [32, 128])
def test_keep(kernel, headdim: int) -> None:
    check_keep(kernel, torch.bfloat16, "cuda", headdim)


def test_who_serves(kernel) -> None:
    kinds = frozenset(MaskKind)

    def serving(dtype: torch.dtype, headdim: int, deterministic: bool) -> type:
        return type(kernels.resolve("triton", GPU, dtype, headdim, kinds, None, deterministic))

    assert serving(torch.float16, 64, False) is type(kernel)
    assert serving(torch.bfloat16, 128, True) is TritonKernel
    assert serving(torch.bfloat16, 136, False) is TritonKernel
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
    """A captured pass over a schedule gives, replayed on other data, what a plain one gives."""
    generator = torch.Generator("cuda").manual_seed(int(torch.randint(2**31, ())))
    world_size, tokens = 4, 256
    call = Call("ring", "pull", "zigzag", True, None, None, None, 0.1, "triton", False)
    plan = make_plan("ring", "pull", "zigzag", world_size, Mask(world_size * tokens))
    comm = Loopback(world_size)
    inputs = [
        torch.randn(1, world_size * tokens, heads, 128, generator=generator, device="cuda").bfloat16()
        for heads in (4, 2, 2, 4)
    ]

    def both() -> list[torch.Tensor]:
        q, k, v, dout = inputs
        out, lse = forward_pass(q, k, v, plan, comm, kernel, call)
        return [out, lse, *backward_pass(dout, None, q, k, v, out, lse, plan, comm, kernel, call)]

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for x in inputs:
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
    for _ in range(2):
        graph.replay()
        for got, expected in zip(captured, both()):
            torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-3)
