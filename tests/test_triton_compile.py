"""Cross-compile every attention kernel with its real configuration, without a GPU: no spills, tensor cores in use."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from seqpar_attn.kernels.triton.config import Tile, choose  # noqa: E402
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
        "SPECIALIZED": tma and tile.specialized, "KEEP": True,
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
            leading = "1, 1, 1" if name in "kv" else "1, 1"
            signature[name] = f"tensordesc<{dtype}[{leading}, {own_tiles[name]}, {dim}]>"
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


def disassemble(compiled, folder: Path, flag: str) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True).stdout


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes, shared memory, and how often the instructions that matter occur."""
    usage, sass = (disassemble(compiled, folder, flag) for flag in ("-res-usage", "-sass"))
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    found |= {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "UTMALDG", "LDL", "STL")}
    return found | {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


def tensor_core_loops(sass: str) -> list[list[str]]:
    """The instructions of the innermost loops that multiply matrices."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", sass)
    number = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    loops = []
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < int(address, 16):
            loops.append((number[int(branch[1], 16)], number[int(address, 16)]))
    # Retried waits branch back from the end of the program: those spans hold whole loops.
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for _, text in lines[first:last]] for first, last in inner]
    return [body for body in bodies if any("HGMMA" in text or "HMMA" in text for text in body)]


def case(direction: str, arch: int, dtype: str, headdim: int, kind: MaskKind, **options):
    extra = "".join(f"-{name}" if value else f"-not-{name}" for name, value in options.items())
    name = f"{direction}-sm{arch}-{dtype}-d{headdim}-{kind.value}{extra}"
    return pytest.param(direction, arch, dtype, headdim, kind, options, id=name)


FULL, CAUSAL, INTERVAL = MaskKind
CASES = [
    case(direction, *call, **options)
    for call, options in [
        *[((90, "bf16", headdim, kind), {}) for headdim in (64, 128) for kind in MaskKind],
        ((90, "bf16", 256, CAUSAL), {}),
        ((90, "fp16", 128, CAUSAL), {}),
        ((90, "bf16", 128, CAUSAL), {"softcap": True}),
        ((90, "bf16", 96, CAUSAL), {"even": False}),
        ((90, "bf16", 128, CAUSAL), {"even": False}),
        ((90, "bf16", 128, FULL), {"even": False}),
        ((80, "bf16", 64, CAUSAL), {}),
        ((80, "bf16", 128, FULL), {}),
        ((80, "bf16", 128, INTERVAL), {}),
        ((80, "fp16", 256, CAUSAL), {}),
    ]
    for direction in ("forward", "dkdv", "dq")
]


@pytest.mark.parametrize("direction,arch,dtype,headdim,kind,options", CASES)
def test_compiles_without_spills(direction, arch, dtype, headdim, kind, options, tmp_path: Path) -> None:
    tile = choose(direction, arch, 2, headdim, kind)
    if tile.ragged is not None and (headdim & (headdim - 1) or options.get("even") is False):
        tile = tile.ragged
    compiled = compile_kernel(direction, tile, arch, dtype, headdim, kind, **options)
    found = resources(compiled, tmp_path)
    assert found["LOCAL"] == 0, found
    assert found["shared"] <= (227 if arch == 90 else 163) * 1024, found
    assert found["HGMMA" if arch == 90 else "HMMA"] > 0, found
    if tile.specialized:
        assert found["warps"] == 12, "Triton did not specialise the warps"
        check_split_coordinates(compiled.asm["ttgir"])
    loops = tensor_core_loops(disassemble(compiled, tmp_path, "-sass"))
    assert loops, "no loop found"
    # The temporaries of tanh do not fit beside the two accumulators of dkdv.
    for body in loops if (direction, options) != ("dkdv", {"softcap": True}) else []:
        assert not [text for text in body if "LDL" in text or "STL" in text], "a loop spills"
    for body in loops if arch == 90 else []:
        products, waits = (sum(name in text for text in body) for name in ("HGMMA", "WARPGROUP"))
        assert waits < products, f"tensor cores wait for each product: {waits} waits, {products} products"
    # Adding a carried fp32 tile may cost a few registers outside the loops; with bounds or 256 columns, many.
    if headdim <= 128 and not options:
        assert found["STACK"] <= 32, found


def check_split_coordinates(ttgir: str) -> None:
    """Triton moves the row of a tile that it splits between compute groups, and every vector made of the same value:
    no vector may be made of it (see ``load_own_tile``)."""
    rows = set(re.findall(r"async_tma_copy_global_to_local %(?:descriptor|peak|d)\w*\[(%\w+)", ttgir))
    assert rows, "no tile is loaded through a descriptor made on the device"
    splats = set(re.findall(r"tt\.splat (%\w+)", ttgir))
    assert not rows & splats, rows & splats
