"""The cuda backend without a GPU: what it says it serves, when it compiles, and what it would hand to the library."""

import ctypes
import importlib

import pytest
import torch

from seqpar_attn.kernels import cuda
from seqpar_attn.kernels.base import FULL
from seqpar_attn.kernels.cuda import CudaKernel, library, structs
from seqpar_attn.mask import MaskKind

ALL = frozenset(MaskKind)
GPU = torch.device("cuda", 0)
LAUNCH = importlib.import_module("seqpar_attn.kernels.cuda.launch")  # the package has a function of that name


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as the backend asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "architecture", lambda device: 90)
    monkeypatch.setattr(library, "architectures", lambda: ("80", "90a"))


def test_refuses(hopper, monkeypatch) -> None:
    kernel = CudaKernel()
    assert kernel.refuses(GPU, torch.bfloat16, 256, ALL, 3.0) is None
    assert kernel.refuses(GPU, torch.float16, 8, ALL, None) is None
    assert "got torch.float32" in kernel.refuses(GPU, torch.float32, 64, ALL, None)
    assert "at most 256, got 264" in kernel.refuses(GPU, torch.bfloat16, 264, ALL, None)
    assert "multiple of 8" in kernel.refuses(GPU, torch.bfloat16, 60, ALL, None)
    assert "got cpu" in kernel.refuses(torch.device("cpu"), torch.bfloat16, 64, ALL, None)
    monkeypatch.setattr(library, "architectures", lambda: ("80",))
    assert "built for 90a, got one for 80" in kernel.refuses(GPU, torch.bfloat16, 64, ALL, None)
    monkeypatch.setattr(cuda, "architecture", lambda device: 80)
    assert "capability 9.0, got 8.0" in kernel.refuses(GPU, torch.bfloat16, 64, ALL, None)


def test_prepare_compiles_only_what_is_missing(hopper, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(library, "load", lambda **options: asked.append(options))
    monkeypatch.setattr(library, "unavailable", lambda arch=None: None)
    CudaKernel().prepare()
    assert not asked
    monkeypatch.setattr(library, "unavailable", lambda arch=None: "no library")
    CudaKernel().prepare()
    assert asked == [{"build": True, "arch": "90a"}]
    monkeypatch.setattr(cuda, "architecture", lambda device: 80)
    CudaKernel().prepare()
    assert len(asked) == 1, "there is nothing to compile for this GPU"


def test_prepare_that_fails_is_why_the_backend_is_unavailable(hopper, monkeypatch) -> None:
    def fail(**options):
        raise library.LibraryError("nvcc said no")

    monkeypatch.setattr(library, "load", fail)
    monkeypatch.setattr(library, "unavailable", lambda arch=None: "no library")
    kernel = CudaKernel()
    assert kernel.unavailable() == "no library"
    kernel.prepare()
    assert kernel.unavailable() == "nvcc said no"


def test_unavailable_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel = CudaKernel()
    kernel.prepare()
    assert kernel.unavailable() == "torch sees no NVIDIA GPU"


def test_a_call_hands_over_geometry_and_addresses(monkeypatch) -> None:
    """Through ``launch`` as on a GPU, into a function that looks at the struct it gets."""
    seen = []

    class Library:
        @staticmethod
        def seqpar_attn_forward(words, stream):
            seen.append((structs.Forward.from_buffer_copy(words), stream))
            return 0

        @staticmethod
        def seqpar_attn_forward_counters(struct):
            return 7

    counter = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(LAUNCH, "load", lambda: Library)
    monkeypatch.setattr(LAUNCH, "_zeroed", lambda device, stream, plan: counter.data_ptr())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setattr(LAUNCH, "_plans", {})
    batch, seqlen, heads, heads_kv, headdim, parts = 2, 12, 4, 2, 16, 3
    for number in range(2):  # the second call takes the plan of the first
        q = torch.zeros(batch, seqlen, heads, headdim, dtype=torch.bfloat16)
        k, v = torch.zeros(2, parts, batch, 5, heads_kv, headdim, dtype=torch.bfloat16).unbind()
        lse, out = torch.zeros(batch, heads, seqlen), torch.empty_like(q)
        CudaKernel().forward(q, k, v, lse, None, out, FULL, softmax_scale=0.5, softcap=None, carry=False)
        assert [plan.counters for plan in LAUNCH._plans.values()] == [7]
        got, stream = seen[number]
        assert stream == 77
        x = got.problem
        assert (x.batch, x.seqlen_q, x.seqlen_k, x.parts) == (batch, seqlen, 5, parts)
        assert (x.nheads, x.nheads_kv, x.headdim, x.dtype, x.mask) == (heads, heads_kv, headdim, 0, 0)
        assert (x.softmax_scale, x.softcap, got.carry, got.keep) == (0.5, 0.0, 0, 0)
        addresses = [t.data_ptr() for t in (q, k, v, lse)]
        assert [got.q, got.k, got.v, got.lse] == addresses and got.out == out.data_ptr() and not got.out_acc
        assert got.counter == counter.data_ptr()
        strides = got.k_strides
        assert (strides.part, strides.batch, strides.seq, strides.head) == k.stride()[:-1]
        assert (got.lse_strides.batch, got.lse_strides.head) == lse.stride()[:2]


def test_an_error_code_is_an_error(monkeypatch) -> None:
    class Library:
        @staticmethod
        def seqpar_attn_accumulate(words, stream):
            return -4

        @staticmethod
        def seqpar_attn_error(code):
            return b"unaligned"

    monkeypatch.setattr(LAUNCH, "load", lambda: Library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(LAUNCH, "_plans", {})
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match=r"unaligned \(code -4\)"):
        CudaKernel().accumulate(x, torch.zeros(2, *x.shape))


def test_every_address_has_a_word_of_its_own() -> None:
    """``launch`` writes addresses into 64-bit words, so every pointer must begin one."""
    for struct in (*structs.STRUCTS, structs.Problem):
        pointers = [name for name, kind in struct._fields_ if kind is ctypes.c_void_p]
        offsets = [getattr(struct, name).offset for name in pointers]
        assert pointers and all(offset % 8 == 0 for offset in offsets) and len(set(offsets)) == len(offsets)
