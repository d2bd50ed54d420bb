"""What benchmarks on several GPUs share: how many there are, their processes, and a rehearsal of it all on a CPU."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import common  # noqa: F401  (first: finds the checkout)
import torch

from seqpar_attn.testing.distributed import RankPool

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""For every process: NVLink multicast that a program leaves behind can take a host's GPUs out of service."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all of them have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--gpus", type=int, help="default: all")
    found.add_argument("--commit", help="what is measured, where git cannot tell")
    found.add_argument("--force", action="store_true", help="measure again what --out has already")
    found.add_argument("--dry-run", action="store_true", help="tiny sizes on --gpus processes of a CPU, over gloo")
    return found


def count(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """How many ranks; an error of the command line if there are too few GPUs."""
    os.environ.update(NO_MULTICAST)
    if arguments.dry_run:
        return arguments.gpus or 2
    gpus = torch.cuda.device_count()
    wanted = arguments.gpus or gpus
    if not 2 <= wanted <= gpus:
        parser.error(f"expected 2 to {gpus} GPUs (all that torch sees), got {wanted}; --dry-run needs none")
    return wanted


def pool(ranks: int, dry: bool, timeout: float) -> RankPool:
    return RankPool(ranks, timeout=timeout, backend="gloo" if dry else "nccl")


def device(dry: bool) -> torch.device:
    """This process's."""
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


def gpu_bytes() -> int:
    """Memory of the smallest GPU, asked for without making a context on one."""
    query = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return min(int(x) for x in lines) << 20


def host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name(part: str, ranks: int, dry: bool) -> str:
    """Of a result file. A rehearsal's says so, that nobody takes it for a measurement."""
    return f"{'dry-' if dry else ''}{part}-{ranks}"
