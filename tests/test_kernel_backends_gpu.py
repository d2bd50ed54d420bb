"""The borrowed kernels on a GPU: the error rule as on CPU, the conventions of this torch, no synchronisation."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from kernel_checks import INF, REFERENCE, assert_no_worse, gradients, make_inputs, naive, play, split

from seqpar_attn import kernels
from seqpar_attn.info import gather
from seqpar_attn.mask import MaskKind
from seqpar_attn.testing import error_report

pytestmark = pytest.mark.gpu

USUAL = frozenset({MaskKind.FULL, MaskKind.CAUSAL})
WHOLE, CHUNKS = [0, 384], [0, 128, 256, 384]
LSE_SLACK = 2e-5  # the hardware's ex2 and lg2


def serving(name: str, dtype: torch.dtype = torch.bfloat16, headdim: int = 64, softcap: float | None = None):
    try:
        return kernels.resolve(name, torch.device("cuda", 0), dtype, headdim, USUAL, softcap)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["aten", "cudnn", "flash_attn"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("headdim", [64, 128, 36], ids=["d64", "d128", "d36-padded"])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_block(backend, dtype, kind, headdim) -> None:
    kernel = serving(backend, dtype, headdim)
    x = make_inputs(384, 384, dtype=dtype, headdim=headdim, device="cuda")
    blocks, seen = split(kind, WHOLE, WHOLE, "cuda")
    rival = play(REFERENCE, x, blocks).to(dtype)
    assert_no_worse(play(kernel, x, blocks), naive(x, seen), rival, factor=1.15, lse_slack=LSE_SLACK)


@pytest.mark.parametrize("nheads_kv", [4, 2, 1])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1"])
def test_chain(backend, kind, nheads_kv) -> None:
    """Strided chunks, carries and merges, grouped heads; every block is rounded, hence the wider factor."""
    kernel = serving(backend)
    x = make_inputs(384, 384, dtype=torch.bfloat16, nheads_kv=nheads_kv, headdim=64, device="cuda")
    blocks, seen = split(kind, CHUNKS, CHUNKS, "cuda")
    rival = play(REFERENCE, x, blocks).to(torch.bfloat16)
    assert_no_worse(play(kernel, x, blocks), naive(x, seen), rival, factor=1.6, lse_slack=LSE_SLACK)


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_softcap(kind) -> None:
    kernel = serving("flash_attn", softcap=2.0)
    x = make_inputs(384, 384, dtype=torch.bfloat16, headdim=64, device="cuda", softcap=2.0)
    blocks, seen = split(kind, WHOLE, WHOLE, "cuda")
    rival = play(REFERENCE, x, blocks).to(torch.bfloat16)
    # Both packages take the hardware's tanh, good for 11 bits.
    assert_no_worse(play(kernel, x, blocks), naive(x, seen), rival, factor=1.5, lse_slack=2e-3)


def test_backward_uses_the_delta_and_lse_it_is_given(backend) -> None:
    """Global lse and delta, not this block's own; and rows that have no key anywhere (lse -inf) add exactly nothing."""
    kernel = serving(backend)
    exact = make_inputs(256, 256, dtype=torch.bfloat16, headdim=64, device="cuda")
    generator = torch.Generator().manual_seed(3)
    lse, delta = (torch.randn(2, 4, 256, generator=generator).cuda() for _ in range(2))
    lse, delta = lse + 7, delta * 3
    lse[:, :, :5] = -INF
    got = gradients(kernel, exact, lse, delta)
    assert not got[0][:, :5].any(), "rows without keys"
    rest = dataclasses.replace(exact, q=exact.q[:, 5:], dout=exact.dout[:, 5:])
    wide = dataclasses.replace(rest, **{name: getattr(rest, name).double() for name in ("q", "k", "v", "dout")})
    truth = gradients(REFERENCE, wide, lse[:, :, 5:].double(), delta[:, :, 5:].double())
    rival = gradients(REFERENCE, rest, lse[:, :, 5:], delta[:, :, 5:])
    for name, x, y, z in zip(("dq", "dk", "dv"), (got[0][:, 5:], *got[1:]), truth, rival):
        report = error_report(x.bfloat16(), y, z.bfloat16(), name)
        assert report.relative <= 1.15 * report.baseline.relative, report


def test_deterministic_aten() -> None:
    kernel = serving("aten")
    x = make_inputs(1024, 1024, dtype=torch.bfloat16, headdim=64, device="cuda")
    blocks, _ = split("causal", [0, 1024], [0, 1024], "cuda")
    first, second = (play(kernel, x, blocks, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.items(), second.items()))
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_cudnn_is_refused() -> None:
    serving("cudnn")
    with pytest.raises(ValueError, match=r"cudnn.*fixed order"):
        kernels.resolve("cudnn", torch.device("cuda", 0), torch.bfloat16, 64, USUAL, None, True)


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_never_synchronises(backend) -> None:
    kernel = serving(backend)
    x = make_inputs(384, 384, dtype=torch.bfloat16, nheads_kv=2, headdim=64, device="cuda")
    blocks, _ = split("causal-1", CHUNKS, CHUNKS, "cuda")
    play(kernel, x, blocks)  # compiles, and learns torch's conventions
    with no_synchronisation():
        play(kernel, x, blocks)


@pytest.mark.parametrize(
    "name, dtype, headdim, message",
    [
        ("aten", torch.float32, 64, "expected float16 or bfloat16, got torch.float32"),
        ("aten", torch.bfloat16, 288, "expected headdim <= 256, got 288"),
        ("cudnn", torch.bfloat16, 256, "expected headdim <= 128, got 256"),
    ],
)
def test_refuses(name, dtype, headdim, message) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.resolve(name, torch.device("cuda", 0), dtype, headdim, USUAL)


def test_auto_and_info() -> None:
    chosen = kernels.resolve("auto", torch.device("cuda", 0), torch.bfloat16, 128, USUAL).name
    report = gather()
    row = next(x for x in report["auto"] if (x["device"], x["dtype"]) == ("cuda:0", "bfloat16"))
    assert row["causal"] == chosen != "reference"
    assert report["gpus"][0]["memory_gib"] > 1 and report["no_gpu"] is None
    assert kernels.resolve("auto", torch.device("cuda", 0), torch.float64, 128, USUAL).name == "reference"
