"""Cross-compile the losses' kernels with what real calls give them, without a GPU: no spills, vectors of 16 bytes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from seqpar_attn.loss.triton import rows, split, tokens  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INT32 = {"stride_row", "stride_grad", "tokens", "columns", "tiles", "count", "start", "ignore_index", "vocab_size"}
STRIDES = {"stride_row", "stride_grad", "columns"}
ALIGNED = {"logits", "grad", "weight", "statistics", "high", "low", "addend", "x"} | STRIDES
ON = {"SOFTCAP": True, "SMOOTHING": True, "Z_LOSS": True}
OFF = dict.fromkeys(ON, False)


def inspect(tmp_path: Path, kernel: Any, arch: int, pointers: dict[str, str], warps: int, **constants: Any) -> str:
    """Machine code, after a look at registers and memory."""
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32" if n in INT32 else "fp32") for n in names}
    used = {n: x for n, x in constants.items() if n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in ALIGNED and types[n] != "fp32"}
    source = ASTSource(kernel, types, {(names.index(n),): x for n, x in used.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(option: str) -> str:
        return subprocess.run([str(CUOBJDUMP), option, str(cubin)], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    assert (stack, local) == (0, 0), f"{registers} registers"
    return dump("-sass")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("options", [OFF, ON], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype, vocab", [("bf16", 128256), ("fp16", 32000), ("fp32", 4096)])
def test_rows(tmp_path: Path, dtype: str, vocab: int, options: dict[str, bool], arch: int) -> None:
    block = rows.choose(vocab, 4 if dtype == "fp32" else 2)
    pointers = {"logits": f"*{dtype}", "grad": f"*{dtype}", "target": "*i32", "weight": "*fp32", "statistics": "*fp32"}
    code = inspect(
        tmp_path, rows.gradient_kernel, arch, pointers, block.num_warps,
        LANES=block.lanes, VECTOR=block.vector, **options,
    )  # fmt: skip
    assert re.search(r"LDG\.E\S*\.128", code) and re.search(r"STG\.E\S*\.128", code)


@pytest.mark.parametrize("arch", [80, 90])
def test_small_kernels(tmp_path: Path, arch: int) -> None:
    labels = {"labels": "*i64", "target": "*i32", "live": "*fp32", "counts": "*i64"}
    code = inspect(tmp_path, tokens.labels_kernel, arch, labels, 4, BLOCK=tokens.BLOCK)
    assert len(re.findall(r"\bRED(?:G)?\.E\S*ADD|\bATOMG?\.E\S*ADD", code)) >= 2
    losses = {"statistics": "*fp32", "weight": "*fp32", "out": "*fp32"}
    inspect(tmp_path, tokens.losses_kernel, arch, losses, 4, BLOCK=tokens.BLOCK, SMOOTHING=True, Z_LOSS=True)
    sum_of = losses | {"factor": "*fp32"}
    inspect(tmp_path, tokens.loss_kernel, arch, sum_of, 16, BLOCK=tokens.LOSS_BLOCK, SMOOTHING=True, Z_LOSS=True)
    weights = {"live": "*fp32", "counts": "*i64", "factor": "*fp32", "weight": "*fp32"}
    inspect(tmp_path, tokens.weights_kernel, arch, weights, 4, BLOCK=tokens.BLOCK)
    inspect(tmp_path, rows.scale_kernel, arch, {"x": "*bf16", "factor": "*fp32"}, 4, BLOCK=rows.SCALE_BLOCK)
    sums = {"high": "*i16", "low": "*u8", "addend": "*fp32", "factor": "*fp32"}
    inspect(tmp_path, split.add_split_kernel, arch, sums, 8, FIRST=False, LOW_BITS=8, BLOCK=split.BLOCK)
    inspect(tmp_path, split.finish_split_kernel, arch, sums, 8, LOW_BITS=8, BLOCK=split.BLOCK)
