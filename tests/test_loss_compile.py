"""Cross-compile the loss's Triton kernels with their real blocks, without a GPU: no spills, loads of 16 bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import disassemble, resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(kernel, types: dict[str, str], constants: dict, arch: int, num_warps: int, unaligned=()):
    """The signature: pointers and strides aligned, other numbers not."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = [n for n, t in signature.items() if (t[0] == "*" or n.startswith("stride")) and n not in unaligned]
    source = ASTSource(
        fn=kernel,
        signature=signature | {name: "constexpr" for name in constants},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})


def compile_rows(arch: int, dtype: str, vocab: int, step: str, everything: bool):
    from seqpar_attn.loss.triton import rows

    kernel = {"statistics": rows.statistics_kernel, "gradient": rows.gradient_kernel}[step]
    block = rows.choose(vocab, BYTES[dtype])
    types = {"logits": f"*{dtype}", "grad": f"*{dtype}", "target": "*i32", "weight": "*fp32", "statistics": "*fp32"}
    types |= {name: "fp32" for name in ("softcap", "cap_inverse", "uniform", "hit", "z_loss")}
    constants = dict.fromkeys(("SOFTCAP", "SMOOTHING", "Z_LOSS"), everything)
    constants |= {"LANES": block.lanes, "VECTOR": block.vector}
    used = {name: x for name, x in constants.items() if name in kernel.arg_names}
    return compile_kernel(kernel, types, used, arch, block.num_warps)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("step", ["statistics", "gradient"])
@pytest.mark.parametrize(
    "arch,dtype,vocab",
    [
        *[(arch, "bf16", vocab) for arch in (80, 90) for vocab in (4000, 32000, 128256)],
        (90, "fp32", 128256),
        (80, "fp16", 128256),
    ],
)
def test_rows_compile_without_spills(
    arch: int, dtype: str, vocab: int, step: str, everything: bool, tmp_path: Path
) -> None:
    compiled = compile_rows(arch, dtype, vocab, step, everything)
    found = resources(compiled, tmp_path)
    assert found["LOCAL"] == found["STACK"] == found["LDL"] == found["STL"] == 0, found
    sass = disassemble(compiled, tmp_path, "-sass")
    # Two vectors per thread in whole blocks.
    assert len(re.findall(r"\bLDG\.E\.[\w.]*128", sass)) >= 2, "loads are not 16 bytes wide"
    assert step != "gradient" or len(re.findall(r"\bSTG\.E\.[\w.]*128", sass)) >= 2, "stores are not 16 bytes wide"
    # Lanes meet at the end of a row only: no loop waits for other warps.
    assert not [body for body in loops(sass) if any("BAR.SYNC" in text for text in body)], "a barrier in a loop"


def loops(sass: str) -> list[list[str]]:
    """The instructions of the innermost loops."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", sass)
    number = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    spans = []
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < int(address, 16):
            spans.append((number[int(branch[1], 16)], number[int(address, 16)]))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    assert inner, "no loop found"
    return [[text for _, text in lines[first:last]] for first, last in inner]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("low", ["i8", "i16"])
def test_split_compiles(arch: int, low: str, tmp_path: Path) -> None:
    from seqpar_attn.loss.triton import split

    types = {"high": "*i16", "low": "*u8" if low == "i8" else "*i16", "addend": "*fp32", "factor": "*fp32"}
    bits = 8 if low == "i8" else 16
    for kernel, extra in ((split.add_split_kernel, {"FIRST": False}), (split.finish_split_kernel, {})):
        constants = {**extra, "LOW_BITS": bits, "BLOCK": split.BLOCK}
        found = resources(compile_kernel(kernel, types, constants, arch, 8), tmp_path)
        assert found["LOCAL"] == found["STACK"] == 0, found


@pytest.mark.parametrize("arch", [80, 90])
def test_scale_compiles(arch: int, tmp_path: Path) -> None:
    from seqpar_attn.loss.triton import rows

    types = {"x": "*bf16", "factor": "*fp32"}
    found = resources(compile_kernel(rows.scale_kernel, types, {"BLOCK": rows.SCALE_BLOCK}, arch, 4), tmp_path)
    assert found["LOCAL"] == found["STACK"] == 0, found
