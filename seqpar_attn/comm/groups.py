"""Groups by name, as operators carry them."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from .loopback import LoopbackGroup

Group = dist.ProcessGroup | DeviceMesh | LoopbackGroup | None


def group_name(group: Group) -> str:
    """A name for ``group`` that an operator can carry: "loopback:W", or torch.distributed's own name of a group.

    None is the default group if torch.distributed is initialised, else one rank. Raises ValueError for a mesh of
    several dimensions, a group without this rank, or another type.
    """
    if group is None:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else LoopbackGroup(1)
    if isinstance(group, LoopbackGroup):
        return f"loopback:{group.world_size}"
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"expected a mesh of one dimension (mesh['name']), got {group.ndim}")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"expected group to be a ProcessGroup with this rank, a DeviceMesh dimension or None, got {group!r}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("expected a group with this rank, got one without it")
    return group.group_name


def virtual_ranks(name: str) -> int | None:
    """How many virtual ranks the named group has; None for a group of processes."""
    return int(name.removeprefix("loopback:")) if name.startswith("loopback:") else None


def process_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def count_ranks(name: str) -> tuple[int, int]:
    """Of the named group, and how many of them are in this process. Nobody is asked, so fakes may know it."""
    virtual = virtual_ranks(name)
    return (dist.get_world_size(process_group(name)), 1) if virtual is None else (virtual, virtual)


def find_ranks_per_host(name: str) -> int:
    """How many ranks on each host the named group has, by torchrun's ``LOCAL_WORLD_SIZE``.

    ValueError for virtual ranks, without that variable, and where the group's ranks are not numbered host by host with
    the same number on each.
    """
    if virtual_ranks(name) is not None:
        raise ValueError("expected ranks_per_host for virtual ranks, which have no hosts, got None")
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or not int(local):
        raise ValueError(f"expected ranks_per_host, or torchrun's LOCAL_WORLD_SIZE to tell it, got None and {local!r}")
    hosts = [rank // int(local) for rank in dist.get_process_group_ranks(process_group(name))]
    counts = {host: hosts.count(host) for host in hosts}
    if len(set(counts.values())) > 1 or hosts != sorted(hosts):
        raise ValueError(f"expected a group's ranks host by host, as many on each, got ranks on the hosts {hosts}")
    return counts[hosts[0]]
