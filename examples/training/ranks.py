"""The processes of a run: their group, their mesh, and how one of them speaks for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import seqpar_attn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``data`` parallel x ``sequence`` parallel."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    sequence_size: int
    sequence: Any
    """The group of ranks that share a sequence, as this package takes it."""
    everyone: DeviceMesh
    """Parameters are sharded over these."""
    host: Any
    """A gloo group: for words between processes that may have to wait long."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """What the first rank's ``function()`` returns, on every rank; if it raises, a ValueError on every rank."""
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except Exception as error:  # the others wait for an answer, whatever went wrong
                answer[1] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(answer, src=0, group=self.host)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def agree(self, name: str, mine: Any) -> None:
        """A ValueError on every rank unless all ranks have the same."""
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, mine, group=self.host)
        for rank, other in enumerate(every):
            if other != every[0]:
                raise ValueError(f"expected the same {name} on all ranks, got {every[0]} on rank 0, {other} on {rank}")


@contextlib.contextmanager
def launched(sequence_parallel: int | None, virtual_ranks: int | None, rows: int | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun or accelerate launch has started, or this process alone; a group that is there is used.

    ``sequence_parallel``: ranks per sequence; None for all. ``virtual_ranks`` of this process share a sequence instead.
    ``rows``: these ranks are a grid of so many rows, for method "usp". ValueError on every rank if a number does not
    divide the one that it should.
    """
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    split = sequence_parallel or (1 if virtual_ranks else world_size)
    if world_size % split or (virtual_ranks and split > 1):
        raise ValueError(
            f"expected --sequence-parallel to divide the number of processes, {world_size}, and to be 1 with "
            f"--virtual-ranks, got {split}"
        )
    if (virtual_ranks or split) % (rows or 1):
        raise ValueError(f"expected --ring-degree to divide {virtual_ranks or split} ranks per sequence, got {rows}")
    if gpu:
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    columns = (virtual_ranks or split) // (rows or 1)
    sequence: Any
    if split == 1 and rows:
        sequence = seqpar_attn.LoopbackGroup(rows), seqpar_attn.LoopbackGroup(columns)
    elif split == 1:
        sequence = seqpar_attn.LoopbackGroup(columns)
    shape, names = ((rows, columns), ("ring", "heads")) if rows and split > 1 else ((split,), ("sequence",))
    mesh = init_device_mesh(device.type, (world_size // split, *shape), mesh_dim_names=("data", *names))
    if split > 1:
        sequence = mesh[names]
    yield Ranks(
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        data_rank=mesh.get_local_rank("data"),
        data_size=world_size // split,
        sequence_size=virtual_ranks or split,
        sequence=sequence,
        everyone=init_device_mesh(device.type, (world_size,)),
        host=dist.new_group(backend="gloo", timeout=timedelta(hours=12)),
    )
    if mine:  # not after an error: other ranks may be in the middle of something
        dist.destroy_process_group()
