"""Which of the triton backend's kernels serve a call. Nothing here needs a GPU or Triton."""

from __future__ import annotations

import pytest
import torch

from seqpar_attn.kernels import triton as backend
from seqpar_attn.kernels.triton import TritonKernel, hopper
from seqpar_attn.kernels.triton.hopper import config

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, and a Triton with all that is needed, as far as anybody asks."""
    monkeypatch.setattr(hopper, "architecture", lambda device: 90)
    monkeypatch.setattr(hopper, "_missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "dtype,headdim",
    [(torch.bfloat16, d) for d in (8, 64, 72, 128, 136, 256)] + [(torch.float16, d) for d in (72, 128, 136)],
    ids=str,
)
def test_hopper_serves(gpu, dtype, headdim) -> None:
    assert backend.portable_because(CUDA, dtype, headdim) is None
    serving = TritonKernel().serving(CUDA, dtype, headdim, False)
    assert type(serving).__name__ == "HopperKernel" and serving.name == "triton"
    assert serving is TritonKernel().serving(CUDA, torch.bfloat16, 64, False)


@pytest.mark.parametrize(
    "dtype,headdim,deterministic,why",
    [
        (torch.bfloat16, 64, True, "whatever order"),
        (torch.float16, 64, False, "faster for torch.float16 and head dimension 64"),
        (torch.float16, 136, True, "whatever order"),
    ],
)
def test_hopper_serves_the_forward_pass_only(gpu, dtype, headdim, deterministic, why) -> None:
    assert backend.portable_because(CUDA, dtype, headdim) is None
    assert why in hopper.backward_refuses(dtype, headdim, deterministic)
    serving = TritonKernel().serving(CUDA, dtype, headdim, deterministic)
    assert type(serving).__name__ == "HopperForward" and serving.nondeterministic is None
    assert type(serving).backward is TritonKernel.backward and type(serving).finish_dq is TritonKernel.finish_dq


@pytest.mark.parametrize(
    "call,why",
    [
        ((CUDA, torch.float32, 64, False), "expected bfloat16 or float16"),
        ((CUDA, torch.bfloat16, 264, False), "at most 256, got 264"),
        ((CUDA, torch.bfloat16, 60, False), "multiple of 8"),
        ((torch.device("cpu"), torch.bfloat16, 64, False), "expected a GPU"),
    ],
)
def test_portable_serves(gpu, call, why) -> None:
    reason = backend.portable_because(*call[:3])
    assert reason is not None and why in reason
    kernel = TritonKernel()
    assert kernel.serving(*call) is kernel


def test_other_gpus(gpu, monkeypatch) -> None:
    monkeypatch.setattr(hopper, "architecture", lambda device: 80)
    assert "got 8.0" in hopper.refuses(CUDA, torch.bfloat16, 64)


def test_a_triton_without_gluon(gpu, monkeypatch) -> None:
    monkeypatch.setattr(hopper, "_missing", lambda: "no gluon")
    assert backend.portable_because(CUDA, torch.bfloat16, 64) == "no gluon"


def test_the_interpreter_has_no_gluon(gpu, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.portable_because(CUDA, torch.bfloat16, 64) == "TRITON_INTERPRET=1 is set"


def test_deterministic_is_refused(gpu) -> None:
    kernel = TritonKernel().serving(CUDA, torch.bfloat16, 64, False)
    x = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    rows = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="expected deterministic=False"):
        kernel.backward(x, x, x, x, rows, rows, x, x, x, None, softmax_scale=1.0, softcap=None,
                        carry_dq=False, carry_dkv=False, deterministic=True)  # fmt: skip


def test_tall_tiles_where_they_fill_rounds() -> None:
    flat, tall = config.FORWARD[64], config.FORWARD_TALL[64]
    assert config.choose_forward(64, True, 16384, 32, 132) is tall
    assert config.choose_forward(40, True, 16384, 32, 132) is tall
    assert config.choose_forward(64, True, 4096, 32, 132) is flat  # 6 rounds of 192 rows against 8 of 128
    assert config.choose_forward(64, False, 16384, 32, 132) is flat
    assert config.choose_forward(128, True, 16384, 32, 132) is config.FORWARD[128]
    assert config.choose_forward(136, True, 16384, 32, 132) is config.FORWARD[256]
    assert [config.beyond(d) for d in (64, 128, 136, 192, 200, 256)] == [0, 0, 64, 64, 128, 128]


def test_heads_that_take_turns() -> None:
    assert config.heads_at_once(True, 32, 1) == 1
    assert config.heads_at_once(False, 32, 1) == 32
    assert config.heads_at_once(False, 32, 10_000_000) == 4
    assert config.heads_at_once(False, 32, 1 << 40) == 1
    assert config.heads_together(32, 128) == 32
    assert config.heads_together(32, 512) == 8
    assert config.heads_together(32, 256, wide=True) == 2
    assert config.heads_together(3, 1 << 20) == 1
