"""Cross-compile the kernel of a weight's gradient without a GPU: tensor cores, the copy engine, no spills."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import resources  # noqa: E402
from test_triton_hopper_compile import serialised, spills, tma_instructions  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from seqpar_attn.loss.triton import weight_gradient as ours  # noqa: E402


def compile_kernel(first: bool):
    kernel = ours.weight_gradient_kernel
    boxes = {"dlogits": ("bf16", 64), "hidden": ("bf16", 256), "high": ("i16", 64), "low": ("u8", 64)}
    constants = {"FIRST": first, **ours.CONSTANTS}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    for name, (dtype, columns) in boxes.items():
        signature[name] = f"tensordesc<{dtype}[64, {columns}],{ours.layout(8 if dtype == 'u8' else 16)!r}>"
    source = GluonASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={},
    )
    options = {"num_warps": 4, "maxnreg": ours.MAXNREG}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("first", [True, False])
def test_weight_gradient(first: bool, tmp_path: Path) -> None:
    compiled = compile_kernel(first)
    found = resources(compiled, tmp_path)
    assert found["shared"] <= 227 * 1024 and found["HGMMA"] > 0, found
    tma = tma_instructions(compiled, tmp_path)
    assert tma["UTMALDG"] > 0 and tma["UTMASTG"] > 0, tma
    if triton.__version__.startswith("3.6."):
        assert serialised(compiled, tmp_path) == []
        assert max(spills(compiled, tmp_path)) == 0 and found["LDL"] == 0, found
