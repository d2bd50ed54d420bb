"""Run by ``tests/test_triton_interpret.py`` in a process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1 (see test_triton_interpret.py)", allow_module_level=True)

from kernel_cases import Case, cases, check, check_accumulate, check_keep, check_merge, check_nan

from seqpar_attn.kernels.triton import TritonKernel
from seqpar_attn.kernels.triton.config import Tile

POINTERS = TritonKernel(lambda *call: Tile(32, 16, 4, 1))
DESCRIPTORS = TritonKernel(lambda *call: Tile(16, 32, 4, 1, tma=True))
SPECIALIZED = TritonKernel(
    lambda direction, arch, itemsize, headdim, kind: Tile(16, 16, 4, 1, tma=True, specialized=kind.value != "interval")
)
EXTRA = {"descriptors": DESCRIPTORS, "specialized": SPECIALIZED}
ALL = cases(40)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_pointers_fp32(case: Case) -> None:
    check(POINTERS, case, torch.float32, "cpu")


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("case", [c for c in ALL if c.softcap is None and c.mask != "holes"][::2], ids=str)
def test_descriptors_fp16(case: Case, name: str) -> None:
    check(EXTRA[name], case, torch.float16, "cpu")


@pytest.mark.parametrize("headdim", [8, 24, 40, 96])
@pytest.mark.parametrize("name", ["pointers", "descriptors"])
def test_padded_headdim(headdim: int, name: str) -> None:
    kernel = POINTERS if name == "pointers" else DESCRIPTORS
    check(kernel, Case("padded", 20, 40, "causal", offset=9, nheads_kv=1, headdim=headdim), torch.float32, "cpu")


@pytest.mark.parametrize(
    "case", [Case("plain", 40, 0), Case("strided", 70, 0, batch=2, headdim=24, strided=True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merge(case: Case, dtype: torch.dtype) -> None:
    check_merge(POINTERS, case, dtype, "cpu")


def test_accumulate() -> None:
    check_accumulate(POINTERS, torch.float32, "cpu")


def test_nan() -> None:
    check_nan(POINTERS, torch.float32, "cpu")


def test_keep() -> None:
    check_keep(POINTERS, torch.float32, "cpu")
