"""Cross-compile every attention kernel with its real configuration, without a GPU: no spills, tensor cores in use."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from seqpar_attn.kernels.triton.config import Tile  # noqa: E402
from seqpar_attn.mask import MaskKind  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS_FP32 = {"lse", "delta", "dq", "dk", "dv", "out_acc"}
POINTERS_INT32 = {"key_lo", "key_hi", "query_lo", "query_hi"}
POINTERS_INPUT = {"q", "k", "v", "dout", "out"}
FLOATS = {"softmax_scale", "pre_scale", "post_scale"}
# Strides of token-major tensors are multiples of 16 in practice, those of lse and delta need not be.
UNALIGNED = {"stride_lb", "stride_lh", "stride_eb", "stride_eh"}


def kernel_of(direction: str):
    from seqpar_attn.kernels.triton import backward, forward

    return {"forward": forward.forward_kernel, "dkdv": backward.dkdv_kernel, "dq": backward.dq_kernel}[direction]


def compile_kernel(
    direction: str,
    tile: Tile,
    arch: int,
    dtype: str,
    headdim: int,
    kind: MaskKind,
    *,
    carry: bool = True,
    softcap: bool = False,
    even: bool = True,
):
    """The compiled kernel for one call: the signature follows from the argument names."""
    from seqpar_attn.kernels.triton.common import KIND_NUMBER, padded_headdim

    kernel = kernel_of(direction)
    dim = padded_headdim(headdim)
    tma = tile.tma and arch >= 90
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "DIM": dim, "KIND": KIND_NUMBER[kind], "CARRY": carry,
        "SOFTCAP": softcap, "EVEN_M": even, "EVEN_N": even, "EVEN_D": headdim == dim, "TMA": tma, 
        "SPECIALIZED": tma and tile.specialized,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if kind is not MaskKind.INTERVAL:
        constants |= {name: None for name in kernel.arg_names if name in POINTERS_INT32}
    # Tiles that a program runs over come through descriptors of the host, those that it keeps through pointers.
    rows_of = {"dkdv": {"q": tile.block_m, "dout": tile.block_m}}
    own_tiles = rows_of.get(direction, {"k": tile.block_n, "v": tile.block_n})
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in own_tiles and tma:
            signature[name] = f"tensordesc<{dtype}[1, 1, {own_tiles[name]}, {dim}]>"
        elif name in ("lse", "delta") and direction == "dkdv" and constants["SPECIALIZED"]:
            signature[name] = f"tensordesc<fp32[1, 1, {tile.block_m}]>"
        elif name in POINTERS_INPUT | POINTERS_FP32 | POINTERS_INT32:
            signature[name] = "*fp32" if name in POINTERS_FP32 else "*i32" if name in POINTERS_INT32 else f"*{dtype}"
            aligned.append(name)
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name.startswith("stride") and name not in UNALIGNED:
                aligned.append(name)
    source = ASTSource(
        fn=kernel,
        signature=signature | {name: "constexpr" for name in constants},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.maxnreg is not None:
        options["maxnreg"] = tile.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes, and how often the instructions that matter occur."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(flag: str) -> str:
        return subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True).stdout

    usage, sass = dump("-res-usage"), dump("-sass")
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    found |= {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "UTMALDG", "LDL", "STL")}
    return found | {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
