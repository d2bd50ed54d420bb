"""Cross-compile the Hopper kernels without a GPU, with their real configurations, under whatever Triton is installed:
tensor cores and the copy engine in use, no products that ptxas makes wait for each other, no spills in loops."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import disassemble, resources, tensor_core_loops  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from seqpar_attn.kernels.triton.hopper import config  # noqa: E402
from seqpar_attn.mask import MaskKind  # noqa: E402

FULL, CAUSAL, INTERVAL = MaskKind
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
ARRAYS = {"lse": "*fp32", "delta": "*fp32", "key_lo": "*i32", "key_hi": "*i32", "query_lo": "*i32", "query_hi": "*i32"}
FLOATS = {"pre_scale", "post_scale", "lse_factor", "softmax_scale"}


def tile(dtype: str, box: list[int]) -> str:
    """The type of a tensor that is read or written in boxes through the copy engine."""
    from seqpar_attn.kernels.triton.hopper.descriptors import box_layout

    return f"tensordesc<{dtype}[{', '.join(map(str, box))}],{box_layout(BITS[dtype], len(box))!r}>"


def compile_kernel(kernel, tiles: dict[str, str], constants: dict, chosen):
    """``tiles``: types of the arguments that are described to the copy engine. Names tell of the others."""
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = tiles.get(name) or ARRAYS.get(name) or ("fp32" if name in FLOATS else "i32")
    source = GluonASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name in ARRAYS},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": chosen.maxnreg}
    )  # fmt: skip


def forward(
    dtype="bf16", dim=128, kind=FULL, even=True, carry=False, keep=False, out=True, softcap=False, chosen=None,
    headdim=None,
):  # fmt: skip
    from seqpar_attn.kernels.triton.common import KIND_NUMBER
    from seqpar_attn.kernels.triton.hopper.forward import forward_kernel

    chosen = chosen or config.FORWARD[dim]
    rows, keys = [1, 1, 64, dim], [1, 1, 1, chosen.keys, dim]
    tiles = {"q": tile(dtype, rows), "k": tile(dtype, keys), "v": tile(dtype, keys)}
    constants = {
        "KIND": KIND_NUMBER[kind], "EVEN": even, "CARRY": carry, "KEEP": keep, "SOFTCAP": softcap,
        "KEYS": chosen.keys, "DIM": dim, "STAGES": chosen.stages, "CONSUMERS": chosen.consumers,
        "PINGPONG": chosen.pingpong, "BEYOND": config.beyond(headdim or dim),
        "REGISTERS": chosen.registers, "PRODUCER_REGISTERS": chosen.producer_registers,
    }  # fmt: skip
    results = rows if dim <= 128 else [1, 1, 64, 64]
    if carry or keep:
        tiles["out_acc"] = tile("fp32", results)
    else:
        constants["out_acc"] = None
    if out:
        tiles["out"] = tile(dtype, results)
    else:
        constants["out"] = None
    if kind is not INTERVAL:
        constants |= {"key_lo": None, "key_hi": None}
    return compile_kernel(forward_kernel, tiles, constants, chosen)


def backward(dtype="bf16", dim=128, kind=FULL, carry=False, rounded=False, softcap=False):
    from seqpar_attn.kernels.triton.common import KIND_NUMBER
    from seqpar_attn.kernels.triton.hopper.backward import backward_kernel

    chosen = config.BACKWARD[dim]
    rows, keys = tile(dtype, [1, 1, chosen.queries, dim]), tile(dtype, [1, 1, 1, 64, dim])
    gradient = keys if rounded else tile("fp32", [1, 1, 1, 64, 64])
    tiles = {"q": rows, "k": keys, "v": keys, "dout": rows, "dq": tile("fp32", [1, 1, 64, 64])}
    constants = {
        "KIND": KIND_NUMBER[kind], "SOFTCAP": softcap, "CARRY": carry, "ROUND": rounded, "PERMUTED": True,
        "SHIFT": 14 if dtype == "bf16" else 0, "QUERIES": chosen.queries, "DIM": dim, "Q_STAGES": chosen.q_stages,
        "REGISTERS": chosen.registers, "PRODUCER_REGISTERS": chosen.producer_registers,
    }  # fmt: skip
    if kind is not INTERVAL:
        constants |= {"query_lo": None, "query_hi": None}
    return compile_kernel(backward_kernel, tiles | {"dk": gradient, "dv": gradient}, constants, chosen)


def backward_wide(dtype="bf16", headdim=256, kind=FULL, carry=False, rounded=False, softcap=False):
    from seqpar_attn.kernels.triton.common import KIND_NUMBER
    from seqpar_attn.kernels.triton.hopper.backward_wide import backward_wide_kernel

    rows, keys = tile(dtype, [1, 1, 64, 256]), tile(dtype, [1, 1, 1, 64, 256])
    gradient = tile(dtype if rounded else "fp32", [1, 1, 1, 64, 64])
    tiles = {"q": rows, "k": keys, "v": keys, "dout": tile(dtype, [1, 1, 64, 128]), "dk": gradient, "dv": gradient}
    constants = {
        "KIND": KIND_NUMBER[kind], "SOFTCAP": softcap, "CARRY": carry, "ROUND": rounded, "PERMUTED": True,
        "SHIFT": 14 if dtype == "bf16" else 0, "BEYOND": config.beyond(headdim),
    }  # fmt: skip
    if kind is not INTERVAL:
        constants |= {"query_lo": None, "query_hi": None}
    tiles["dq"] = tile("fp32", [1, 1, 64, 64])
    return compile_kernel(backward_wide_kernel, tiles, constants, config.BACKWARD_WIDE_TILE)


def serialised(compiled, folder: Path) -> list[str]:
    """What ptxas says of products that it makes wait for each other."""
    from triton.backends.nvidia.compiler import get_ptxas

    source, target = folder / "kernel.ptx", folder / "again.cubin"
    source.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"C75\d\d|serializ", line)]


def tma_instructions(compiled, folder: Path) -> dict[str, int]:
    sass = disassemble(compiled, folder, "-sass")
    return {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("UTMALDG", "UTMASTG", "UTMAREDG")}


def spills(compiled, folder: Path) -> list[int]:
    """Loads and stores of spilled registers in each loop that multiplies matrices."""
    loops = tensor_core_loops(disassemble(compiled, folder, "-sass"))
    assert loops, "no loop found"
    return [sum("LDL" in text or "STL" in text for text in body) for body in loops]


# How many loads and stores of spilled registers a step may have, with the ptxas of Triton 3.6.
FORWARD_CASES = {
    "full": ({}, 0),
    "full-ragged-fp16": ({"dtype": "fp16", "even": False}, 0),
    "full-continue": ({"carry": True, "keep": True, "out": False}, 0),
    "causal-both": ({"kind": CAUSAL, "carry": True, "keep": True}, 0),
    "intervals": ({"kind": INTERVAL, "carry": True}, 0),
    "causal-softcap": ({"kind": CAUSAL, "softcap": True}, 0),
    "full-64": ({"dim": 64, "keep": True, "out": False}, 0),
    "full-256": ({"dim": 256}, 0),
    "causal-256-both": ({"dim": 256, "kind": CAUSAL, "carry": True, "keep": True}, 0),
    "intervals-192": ({"dim": 256, "headdim": 192, "kind": INTERVAL, "carry": True}, 0),
    "causal-256-softcap-fp16": ({"dim": 256, "dtype": "fp16", "kind": CAUSAL, "softcap": True}, 0),
    "causal-64-tall": ({"dim": 64, "kind": CAUSAL, "chosen": config.FORWARD_TALL[64]}, 16),  # in masked tiles only
}
# A few addresses; intervals and the temporaries of tanh take more.
BACKWARD_CASES = {
    "full-rounded": ({"rounded": True}, 8),
    "causal-continue": ({"kind": CAUSAL, "carry": True}, 8),
    "intervals": ({"kind": INTERVAL, "carry": True}, 24),
    "causal-softcap": ({"kind": CAUSAL, "softcap": True}, 64),
    "causal-fp16": ({"kind": CAUSAL, "dtype": "fp16"}, 8),
    "causal-64": ({"dim": 64, "kind": CAUSAL, "carry": True}, 8),
}


@pytest.mark.parametrize("case,spilled", FORWARD_CASES.values(), ids=FORWARD_CASES.keys())
def test_forward(case: dict, spilled: int, tmp_path: Path) -> None:
    compiled = forward(**case)
    found = resources(compiled, tmp_path)
    assert found["shared"] <= 227 * 1024, found
    assert found["HGMMA"] > 0, found
    tma = tma_instructions(compiled, tmp_path)
    assert tma["UTMALDG"] > 0 and tma["UTMASTG"] > 0, tma
    assert serialised(compiled, tmp_path) == []
    in_loops = spills(compiled, tmp_path)
    assert min(in_loops) == 0, in_loops
    if triton.__version__.startswith("3.6."):
        assert max(in_loops) <= spilled, in_loops


@pytest.mark.parametrize("case,spilled", BACKWARD_CASES.values(), ids=BACKWARD_CASES.keys())
def test_backward(case: dict, spilled: int, tmp_path: Path) -> None:
    compiled = backward(**case)
    found = resources(compiled, tmp_path)
    assert found["shared"] <= 227 * 1024, found
    assert found["HGMMA"] > 0, found
    tma = tma_instructions(compiled, tmp_path)
    assert tma["UTMALDG"] > 0 and tma["UTMAREDG"] > 0, tma
    assert serialised(compiled, tmp_path) == []
    if triton.__version__.startswith("3.6."):
        assert max(spills(compiled, tmp_path)) <= spilled, spills(compiled, tmp_path)


WIDE_CASES = {
    "full-rounded": {"rounded": True},
    "causal-continue": {"kind": CAUSAL, "carry": True},
    "intervals-192": {"kind": INTERVAL, "headdim": 192},
    "causal-softcap": {"kind": CAUSAL, "softcap": True},
    "causal-fp16": {"kind": CAUSAL, "dtype": "fp16"},
}


@pytest.mark.parametrize("case", WIDE_CASES.values(), ids=WIDE_CASES.keys())
def test_backward_wide(case: dict, tmp_path: Path) -> None:
    compiled = backward_wide(**case)
    found = resources(compiled, tmp_path)
    assert found["shared"] <= 227 * 1024, found
    assert found["HGMMA"] > 0, found
    tma = tma_instructions(compiled, tmp_path)
    assert tma["UTMALDG"] > 0 and tma["UTMAREDG"] > 0, tma
    if triton.__version__.startswith("3.6."):  # under 3.9 the products of 256 columns wait for each other
        assert serialised(compiled, tmp_path) == []
        assert max(spills(compiled, tmp_path)) == 0, spills(compiled, tmp_path)


def test_variables_that_a_loop_hands_on(tmp_path: Path) -> None:
    """Triton 3.6 folds a variable that takes over another one's value, if both begin with the same, into that value:
    the rows that dQ is added to in the loop must not be the constant that they begin with."""
    added = re.findall(r"async_tma_reduce add, %dq\w*\[([^]]*)\]", backward().asm["ttgir"])
    assert len(added) >= 3
    assert not [at for at in added if re.search(r"%c\d{7,}_i32", at)], added


@pytest.mark.parametrize("carry,keep,out", [(False, False, True), (False, True, False), (True, True, True)])
@pytest.mark.parametrize("parts", [1, 2])
def test_arguments_of_launches(monkeypatch, carry, keep, out, parts) -> None:
    """What a launch passes on is what its kernel takes: arrays, numbers, what changes per call, constants."""
    import torch

    from seqpar_attn.kernels.base import FULL as NO_MASK
    from seqpar_attn.kernels.triton.hopper import finish, launch

    launched = []

    def record(kernel, options, arrays, variables, make_plan) -> None:
        plan = make_plan()
        assert tuple(plan.constants) == tuple(kernel.arg_names[-len(plan.constants) :])
        assert len(arrays) + len(plan.numbers) + len(variables) + len(plan.constants) == len(kernel.arg_names)
        assert all(arrays[n] is not None for n in plan.boxes)
        launched.append((kernel.__name__, plan))

    monkeypatch.setattr(launch, "launch", record)
    monkeypatch.setattr(finish, "launch", record)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    q = torch.empty(2, 300, 4, 72, dtype=torch.bfloat16)
    k = torch.empty(2, 200, 2, 72, dtype=torch.bfloat16)
    if parts > 1:
        k = torch.empty(parts, *k.shape, dtype=k.dtype)
    acc, rows = torch.empty(q.shape), torch.empty(2, 4, 300)
    chosen = config.FORWARD[128]
    launch.launch_forward(
        chosen, q, k, k, rows, acc if carry or keep else None, q if out else None, NO_MASK, 0.1, None, carry, keep
    )  # fmt: skip
    dk = torch.empty(k.shape) if carry else k
    launch.launch_backward(
        config.BACKWARD[128], q, k, k, q, rows, rows, acc, dk, dk, NO_MASK, 0.1, None, not out, carry
    )  # fmt: skip
    finish.launch_finish(acc, q, 0.1)
    plans = dict(launched)
    assert list(plans) == ["forward_kernel", *(["zero_kernel"] if out else []), "backward_kernel", "finish_kernel"]
    assert plans["forward_kernel"].programs == 3 * 8  # tiles of 128 rows: fewer than multiprocessors
    assert plans["backward_kernel"].programs == 2 * parts * 4  # tiles of 128 keys
    assert (4 in plans["forward_kernel"].boxes) == (carry or keep) and (5 in plans["forward_kernel"].boxes) == out
