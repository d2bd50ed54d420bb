"""Cross-compile the kernel that reads rows of logits once, without a GPU: few registers, copies of 16 bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from test_loss_compile import loops  # noqa: E402
from test_triton_compile import disassemble, resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from seqpar_attn.loss.triton import resident  # noqa: E402

SHARED = 227 << 10


def compile_resident(dtype: str, vocab: int, everything: bool, aligned: bool, arch: int):
    kernel, itemsize = resident.resident_kernel, 4 if dtype == "fp32" else 2
    part = resident.choose(vocab, itemsize)
    types = {"logits": f"*{dtype}", "grad": f"*{dtype}", "target": "*i32", "weight": "*fp32", "statistics": "*fp32"}
    types |= {"published": "*i64"} | dict.fromkeys(("softcap", "cap_inverse", "uniform", "hit", "z_loss"), "fp32")
    constants = dict.fromkeys(("SOFTCAP", "SMOOTHING", "Z_LOSS"), everything) | {
        "ALIGNED": aligned, "PARTS": -(-vocab // part.columns(itemsize)), "CHUNKS": part.chunks,
        "VECTOR": 16 // itemsize, "WARPS": part.num_warps,
    }  # fmt: skip
    names = kernel.arg_names
    even = [n for n in names if types.get(n, "")[:1] == "*" or (n == "columns" and not vocab % 16)]
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): x for n, x in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    return part, triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": part.num_warps})


@pytest.mark.parametrize(
    "everything, arch", [(False, 90), (True, 90), (True, 80)], ids=["plain", "everything", "sm_80"]
)
@pytest.mark.parametrize(
    "dtype, vocab, aligned",
    [("bf16", 128256, True), ("bf16", 1000, True), ("bf16", 50257, False), ("fp16", 32001, True), ("fp32", 4096, True)],
)
def test_resident(tmp_path: Path, dtype: str, vocab: int, aligned: bool, everything: bool, arch: int) -> None:
    part, compiled = compile_resident(dtype, vocab, everything, aligned, arch)
    found = resources(compiled, tmp_path)
    assert found["LOCAL"] == found["STACK"] == found["LDL"] == found["STL"] == 0, found
    # Bytes on their way are what this kernel lives from: twelve parts of 16 KiB at once.
    assert 12 * 32 * part.num_warps * found["REG"] <= 1 << 16 and 12 * (found["shared"] + 1024) <= SHARED, found
    sass = disassemble(compiled, tmp_path, "-sass")
    if aligned:
        assert re.search(r"\bLDGSTS\.E\.\S*128", sass) and re.search(r"\bSTG\.E\.\S*128", sass)
    if vocab > part.columns(4 if dtype == "fp32" else 2):
        waiting = [body for body in loops(sass) if any("LDG" in x and "STRONG" in x for x in body)]
        assert len(waiting) == 1 + everything
        # All warps of a program go on, or round again, together.
        assert all(any("BAR.SYNC" in x for x in body) for body in waiting)
