"""What this machine offers: versions, GPUs, which backends and transports work here and why the others do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch
import torch.distributed as dist

from . import kernels
from .comm import limit_of_environment
from .kernels.cuda import building, library
from .kernels.triton import hopper, portable_because
from .mask import MaskKind

_PACKAGES = ("seqpar_attn", "torch", "triton", "transformers", "accelerate", "flash_attn", "flash-attn-4", "numpy")


def _version(package: str) -> str | None:
    """Installed version, read from the metadata: importing transformers to ask would take seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _no_gpu_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    return "torch is built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"


def _transports(gpus: int) -> dict[str, str | None]:
    """Transport -> why it cannot be used, or None."""
    if not dist.is_available():
        missing = "torch is built without torch.distributed"
        return {"loopback": None, "gloo": missing, "nccl": missing, "symmetric": missing}
    nccl = None if dist.is_nccl_available() else "torch is built without NCCL"
    if nccl is None and not gpus:
        nccl = "torch sees no NVIDIA GPU"
    gloo = None if dist.is_gloo_available() else "torch is built without gloo"
    return {"loopback": None, "gloo": gloo, "nccl": nccl, "symmetric": _no_peer_access(gpus)}


def _no_peer_access(gpus: int) -> str | None:
    """Why the symmetric transport does not serve all GPUs; without any it is for CPUs, where it has to be set."""
    for a in range(gpus):
        for b in range(gpus):
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"GPU {a} has no peer access to GPU {b}"
    return None


def _auto_transport(gpus: int, no_symmetric: str | None) -> list[tuple[str, str]]:
    """What a group gets that set_transport was not called for, as far as this machine tells: ranks, and what they get.
    A group's own answer is :func:`seqpar_attn.comm.transport`."""
    rows = [("on CPUs", "p2p")]
    if gpus:
        among = "" if no_symmetric is None else f", if there is peer access among theirs ({no_symmetric})"
        rows = [("a GPU of this machine each", "symmetric" + among), ("several on a GPU", "p2p"), *rows]
        rows.append(("on several machines", "p2p"))
    return rows


def _auto_choices(devices: list[torch.device]) -> list[dict[str, Any]]:
    """What backend="auto" does per device and dtype: for a plain causal call, and for one with an interval mask."""
    usual = frozenset({MaskKind.FULL, MaskKind.CAUSAL})
    rows = []
    for device in devices:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            row: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
            for label, kinds in (("causal", usual), ("interval", frozenset(MaskKind))):
                report = kernels.explain(device, dtype, 128, kinds)
                chosen = [name for name, reason in report if reason == "chosen"]
                row[label] = chosen[0] if chosen else None
                row[f"{label}_reasons"] = dict(report)
            rows.append(row)
    return rows


def _triton_kernels(devices: list[torch.device]) -> list[dict[str, Any]]:
    """Which kernels the triton backend has for calls with head dimension 128, and why not those for Hopper."""
    rows: list[dict[str, Any]] = []
    for device in devices:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for deterministic in (False, True):
                why = portable_because(device, dtype, 128)
                found = "portable" if why else "hopper"
                if not why:
                    why = hopper.backward_refuses(dtype, 128, deterministic)
                    found = "hopper, backward portable" if why else found
                row = {
                    "device": str(device),
                    "dtype": str(dtype).removeprefix("torch."),
                    "deterministic": deterministic,
                }
                rows.append(row | {"kernels": found, "why": why})
    return rows


def _arena_limit() -> str:
    try:
        limit = limit_of_environment()
    except ValueError as error:
        return str(error)
    return "a sixth of the GPU's" if limit is None else f"{limit} bytes"


def gather() -> dict[str, Any]:
    """Everything as one JSON-compatible dict. Looks for GPUs, but allocates nothing on them."""
    gpus = _gpus()
    transports = _transports(len(gpus))
    devices = [torch.device("cpu")] + [torch.device("cuda", gpu["index"]) for gpu in gpus]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "torch_cuda": torch.version.cuda,
        "nvcc": building.find_nvcc(),
        "library": library.describe(),
        "gpus": gpus,
        "no_gpu": _no_gpu_reason(),
        "backends": {name: kernels.unavailable(name) for name in kernels.names()},
        "auto": _auto_choices(devices),
        "triton_kernels": _triton_kernels(devices[1:] if kernels.unavailable("triton") is None else []),
        "transports": transports,
        "auto_transport": _auto_transport(len(gpus), transports["symmetric"]),
        "arena_limit": _arena_limit(),
    }


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def render(info: dict[str, Any]) -> str:
    """The same for people."""
    lines = ["versions"]
    lines += _table([(name, version or "not installed") for name, version in info["versions"].items()])
    lines += ["cuda"]
    lib = info["library"]
    found = f"{lib['path']} (ABI {lib['abi']}, for {', '.join(lib['architectures'])})"
    lines += _table(
        [
            ("torch built for", info["torch_cuda"] or "none"),
            ("nvcc", info["nvcc"] or "none"),
            ("library", found if lib["path"] else f"none: {lib['why']}"),
        ]
    )
    lines += ["gpus"]
    lines += (
        [f"  none: {info['no_gpu']}"]
        if not info["gpus"]
        else _table(
            [
                (f"cuda:{gpu['index']}", gpu["name"], f"{gpu['memory_gib']} GiB", f"sm {gpu['capability']}")
                for gpu in info["gpus"]
            ]
        )
    )
    lines += ["backends"]
    lines += _table([(name, f"no: {why}" if why else "available") for name, why in info["backends"].items()])
    lines += ["auto chooses"]
    header = ("device", "dtype", "full, causal", "interval")
    lines += _table(
        [header] + [(x["device"], x["dtype"], x["causal"] or "none", x["interval"] or "none") for x in info["auto"]]
    )
    if info["triton_kernels"]:
        lines += ["kernels of triton"]
        lines += _table(
            [
                (
                    x["device"],
                    x["dtype"] + (", deterministic" if x["deterministic"] else ""),
                    x["kernels"],
                    x["why"] or "",
                )
                for x in info["triton_kernels"]
            ]
        )
    lines += ["transports"]
    lines += _table([(name, f"no: {why}" if why else "available") for name, why in info["transports"].items()])
    lines += ["transport that groups get by themselves, for ranks"]
    lines += _table([*info["auto_transport"], ("limit of memory for symmetric", info["arena_limit"])])
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    """Adds ``info`` to the subcommands of ``python -m seqpar_attn``."""
    parser: argparse.ArgumentParser = commands.add_parser("info", help=__doc__, description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, with the reasons behind every choice")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    info = gather()
    print(json.dumps(info, indent=2) if arguments.json else render(info))
    return 0
