"""Who is chosen, why, and that a backend asked for by name is never replaced."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from seqpar_attn import kernels
from seqpar_attn.mask import MaskKind

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
FULL_ONLY = frozenset({MaskKind.FULL})
ALL = frozenset(MaskKind)


class FakeKernel:
    """Available, and refuses what it is told to."""

    nondeterministic: str | None = None
    recordable = False

    def __init__(self, name: str, missing: str | None = None, refuses: str | None = None) -> None:
        self.name, self._missing, self._refuses = name, missing, refuses

    def unavailable(self) -> str | None:
        return self._missing

    def prepare(self) -> None:
        pass

    def refuses(self, device, dtype, headdim, kinds, softcap) -> str | None:
        return self._refuses

    def serving(self, device, dtype, headdim, deterministic):
        return self


@pytest.fixture(autouse=True)
def fresh_cache():
    kernels.resolve.cache_clear()
    yield
    kernels.resolve.cache_clear()


@pytest.fixture
def stub(monkeypatch):
    """Replaces backends by fakes: ``stub(triton=FakeKernel(...))``; a string stands for a failed import."""

    def install(**fakes) -> None:
        load = kernels._load
        monkeypatch.setattr(kernels, "_load", lambda name: fakes[name] if name in fakes else load(name))
        monkeypatch.setattr(kernels, "get", lambda name: kernels._load(name))

    return install


def test_names() -> None:
    assert {"reference", "aten", "cuda", "cudnn", "triton", "flash_attn"} <= set(kernels.names())
    assert "auto" not in kernels.names()


def test_get() -> None:
    for name in ("reference", "aten", "cudnn", "flash_attn"):
        assert kernels.get(name).name == name
        assert kernels.get(name) is kernels.get(name)
    with pytest.raises(ValueError, match=r"expected one of cuda, triton, .*, got 'fastest'"):
        kernels.get("fastest")


def test_get_says_why_a_module_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(kernels._BACKENDS, "ghost", kernels._Backend(".ghost", "GhostKernel", ()))
    with pytest.raises(ValueError, match=r"expected a backend that can be imported, got 'ghost': .*No module named"):
        kernels.get("ghost")
    assert "No module named" in kernels.unavailable("ghost")
    with pytest.raises(ValueError, match="got 'ghost': cannot import it"):
        kernels.resolve("ghost", CPU, torch.float32, 64, FULL_ONLY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_auto_on_cpu(dtype) -> None:
    assert kernels.resolve("auto", CPU, dtype, 64, ALL, 30.0, True).name == "reference"


def test_auto_on_cuda_prefers_and_falls_through(stub) -> None:
    stub(cuda=FakeKernel("cuda"), triton=FakeKernel("triton"), aten=FakeKernel("aten"))
    assert kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL).name == "cuda"
    report = kernels.explain(CUDA, torch.bfloat16, 64, ALL)
    others = [(name, "not needed: cuda is preferred") for name in ("triton", "aten")]
    assert report[:3] == [("cuda", "chosen"), *others]
    assert dict(report)["reference"] == "only by name on cuda"
    assert sorted(name for name, _ in report) == sorted(kernels.names())


def test_auto_on_cuda_says_why_it_fell_through(stub) -> None:
    stub(cuda=FakeKernel("cuda", "no library"), triton="cannot import it (no triton)", aten=FakeKernel("aten"))
    assert kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL).name == "aten"
    assert kernels.explain(CUDA, torch.bfloat16, 64, ALL)[:3] == [
        ("cuda", "no library"),
        ("triton", "cannot import it (no triton)"),
        ("aten", "chosen"),
    ]


def test_auto_never_takes_the_quadratic_reference_on_cuda(stub) -> None:
    stub(
        cuda=FakeKernel("cuda", missing="no library"),
        triton=FakeKernel("triton", missing="no GPU"),
        aten=FakeKernel("aten", refuses="expected full, got interval"),
    )
    with pytest.raises(
        ValueError,
        match="got none: cuda: no library; triton: no GPU; aten: expected full, got interval; reference: only",
    ):
        kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL)


def test_asked_for_by_name_a_backend_may_prepare_itself(stub) -> None:
    """As the one that compiles its library then; "auto" must not start that."""
    kernel = FakeKernel("cuda", missing="not compiled")
    kernel.prepare = lambda: setattr(kernel, "_missing", None)
    stub(cuda=kernel, triton=FakeKernel("triton"))
    assert kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL).name == "triton"
    assert kernels.resolve("cuda", CUDA, torch.bfloat16, 64, ALL).name == "cuda"


def test_auto_float64_is_the_reference_anywhere(stub) -> None:
    stub(triton=FakeKernel("triton"), aten=FakeKernel("aten"))
    assert kernels.resolve("auto", CUDA, torch.float64, 64, ALL).name == "reference"
    assert kernels.explain(CUDA, torch.float64, 64, ALL)[0] == ("reference", "chosen")


def test_auto_skips_what_is_not_deterministic(stub) -> None:
    first = FakeKernel("triton")
    first.nondeterministic = "sums in any order"
    stub(triton=first, aten=FakeKernel("aten"))
    assert kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL).name == "triton"
    assert kernels.resolve("auto", CUDA, torch.bfloat16, 64, ALL, None, True).name == "aten"


@pytest.mark.parametrize(
    "call, message",
    [
        (("aten", CPU, torch.float32, 64, ALL), "'aten': expected mask kinds among full, causal, got interval"),
        (("aten", CPU, torch.float32, 64, FULL_ONLY, 30.0), "'aten': expected no softcap, got 30.0"),
        (("aten", CPU, torch.float32, 288, FULL_ONLY), "'aten': expected headdim <= 256, got 288"),
        (("aten", CPU, torch.int8, 64, FULL_ONLY), "'aten': expected a float dtype"),
        (("aten", torch.device("meta"), torch.float32, 64, FULL_ONLY), "'aten': expected a cuda or cpu device"),
        (("flash_attn", CPU, torch.float32, 64, FULL_ONLY), "'flash_attn': "),
        (("cudnn", CPU, torch.bfloat16, 64, FULL_ONLY), "'cudnn': "),
        (("best", CPU, torch.bfloat16, 64, FULL_ONLY), "expected auto or one of .*, got 'best'"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_explicit_name_never_falls_back(call, message) -> None:
    for _ in range(2):  # the second call must not find a remembered substitute
        with pytest.raises(ValueError, match=message):
            kernels.resolve(*call)


def test_explicit_name_that_can_serve() -> None:
    assert kernels.resolve("aten", CPU, torch.bfloat16, 64, FULL_ONLY, None, True).name == "aten"
    assert kernels.resolve("reference", CPU, torch.bfloat16, 65, ALL, 1.0).name == "reference"


def test_resolve_is_nearly_free_on_repeat() -> None:
    def best_of(repeats: int = 20, calls: int = 500) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                kernels.resolve("auto", CPU, torch.bfloat16, 64, ALL, None, False)
            times.append((time.perf_counter() - start) / calls)
        return min(times)

    kernels.resolve("auto", CPU, torch.bfloat16, 64, ALL, None, False)
    assert best_of() < 2e-6


def test_import_is_lazy() -> None:
    code = (
        "import sys, torch, seqpar_attn, seqpar_attn.kernels as k\n"
        "late = [m for m in ('triton', 'flash_attn', 'seqpar_attn.kernels.triton') if m in sys.modules]\n"
        "assert not late, late\n"
        "assert not torch.cuda.is_initialized()\n"
        "k.resolve('auto', torch.device('cpu'), torch.float32, 64, frozenset())\n"
        "assert 'triton' not in sys.modules and 'seqpar_attn.kernels.aten' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
