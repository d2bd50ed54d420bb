"""What the evaluation scripts share: the ranks that torchrun started or virtual ones, and a model for them.

Under torchrun every process is a rank, over NCCL with GPUs and gloo without; else one process is all of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from long_eval import load, set_rope_base

import seqpar_attn
from seqpar_attn.integrations.transformers import enable

Result = TypeVar("Result")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="ring", help="any that seqpar_attn's enable takes")
    parser.add_argument("--ranks", type=int, default=1, help="virtual ranks, where torchrun has not started real ones")
    parser.add_argument("--ring-degree", "--ring_degree", type=int, default=1, help="rows of the grid of method usp")
    parser.add_argument("--backend", default="auto", help="whose attention kernels")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")


def start(args: argparse.Namespace) -> tuple[Any, torch.device]:
    """The group, as the method takes it, and this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else args.ranks
    rows = args.ring_degree
    if rows < 1 or ranks % rows or (rows > 1 and args.method != "usp"):
        raise ValueError(f"expected --ring-degree to divide {ranks} ranks, and only with method usp, got {rows}")
    if args.method != "usp":
        return (None if dist.is_initialized() else seqpar_attn.LoopbackGroup(ranks)), device
    if dist.is_initialized():
        return dist.init_device_mesh(device.type, (rows, ranks // rows)), device
    return (seqpar_attn.LoopbackGroup(rows), seqpar_attn.LoopbackGroup(ranks // rows)), device


def is_first() -> bool:
    """Whether this process writes files and says what happens."""
    return not dist.is_initialized() or dist.get_rank() == 0


def together(function: Callable[[], Result]) -> Result:
    """``function()``; if it fails on any rank (a folder that only one machine has), it is a ValueError on all."""
    result, complaint = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        complaint = str(error)
    complaints: list[str | None] = [complaint]
    if dist.is_initialized():
        complaints = [None] * dist.get_world_size()
        dist.all_gather_object(complaints, complaint)
    found = {f"rank {rank}: {x}" if len(complaints) > 1 else x for rank, x in enumerate(complaints) if x is not None}
    if found:
        raise ValueError("; ".join(sorted(found)))
    return result  # type: ignore[return-value]


def model_for(
    path: str, args: argparse.Namespace, group: Any, device: torch.device, rope_theta: float | None, longest: int
) -> tuple[Any, Any, str]:
    """(model, tokenizer, layout) of a folder, hub name or GGUF file, its attention split over ``group``.

    ``rope_theta``: the rotary base to use, the model's own if None; ``longest``: positions that will come.
    """
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"expected --dtype to be a torch dtype such as bfloat16, got {args.dtype!r}")
    model, tokenizer = load(path, dtype, device)
    if rope_theta is not None:
        set_rope_base(model, rope_theta, max(longest, model.config.max_position_embeddings))
    return model, tokenizer, enable(model, group, method=args.method, backend=args.backend).settings.layout
