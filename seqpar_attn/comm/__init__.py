"""Moving tensors between ranks: groups by name, and the communicator that serves each."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from .base import Arena, CommunicationError, Communicator, Handle, Message, agree
from .gpu_memory import GpuMemory
from .loopback import Loopback, LoopbackGroup
from .p2p import P2P
from .shared_memory import SharedMemory
from .symmetric import Symmetric

Group = dist.ProcessGroup | DeviceMesh | LoopbackGroup | None

__all__ = [
    "Arena",
    "CommunicationError",
    "Communicator",
    "Group",
    "Handle",
    "Loopback",
    "LoopbackGroup",
    "Message",
    "agree",
    "communicator",
    "find_ranks_per_host",
    "group_name",
    "set_transport",
]


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


def find_ranks_per_host(name: str) -> int:
    """How many ranks on each host the named group has, by torchrun's ``LOCAL_WORLD_SIZE``.

    ValueError for virtual ranks, without that variable, and where the group's ranks are not numbered host by host with
    the same number on each.
    """
    if name.startswith("loopback:"):
        raise ValueError("expected ranks_per_host for virtual ranks, which have no hosts, got None")
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or not int(local):
        raise ValueError(f"expected ranks_per_host, or torchrun's LOCAL_WORLD_SIZE to tell it, got None and {local!r}")
    hosts = [rank // int(local) for rank in dist.get_process_group_ranks(_resolve_process_group(name))]  # type: ignore[arg-type]
    counts = {host: hosts.count(host) for host in hosts}
    if len(set(counts.values())) > 1 or hosts != sorted(hosts):
        raise ValueError(f"expected a group's ranks host by host, as many on each, got ranks on the hosts {hosts}")
    return counts[hosts[0]]


@functools.lru_cache(maxsize=256)
def _loopback(world_size: int) -> Loopback:
    return Loopback(world_size)


TRANSPORTS = ("p2p", "symmetric")
_chosen: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()
"""Not by name, which may come again."""
_known: dict[tuple[str, torch.device], P2P | Symmetric] = {}


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def set_transport(group: Group, transport: str) -> None:
    """How attention's transfers in ``group`` go from here on; every rank of it calls this, with the same name.

    "p2p": batched sends and receives of torch.distributed (NCCL, gloo). "symmetric": written straight into the peers'
    memory, on GPUs by copy engines and so without multiprocessors; the ranks must be on one host, their GPUs with peer
    access to each other, which the first call finds out. A peer that does not come within the group's timeout is a
    CommunicationError in the thread that made the first call. ValueError on every rank for another name, virtual ranks,
    or several hosts.
    """
    name = group_name(group)
    if name.startswith("loopback:"):
        raise ValueError("expected a group of processes, got virtual ranks, which need no transport")
    ranks = _resolve_process_group(name)  # type: ignore[arg-type]
    found: list[tuple[str, str] | None] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(found, (transport, _host()), group=ranks)
    names, hosts = ({x[i] for x in found if x is not None} for i in range(2))
    if len(names) > 1 or transport not in TRANSPORTS:
        raise ValueError(f"expected one of {', '.join(TRANSPORTS)} on every rank, got {', '.join(sorted(names))}")
    if transport == "symmetric" and len(hosts) > 1:
        raise ValueError(f"expected all ranks on one host for transport 'symmetric', got {len(hosts)} hosts: use 'p2p'")
    _chosen[ranks] = transport
    for key in [key for key in _known if key[0] == name]:
        del _known[key]


def _alive(group: dist.ProcessGroup | None) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def communicator(name: str, device: torch.device) -> Communicator:
    """The communicator of the group that :func:`group_name` named, for tensors on ``device``."""
    if name.startswith("loopback:"):
        return _loopback(int(name.removeprefix("loopback:")))
    group = _resolve_process_group(name)  # type: ignore[arg-type]
    known = _known.get((name, device))
    if known is None or known.group is not group:
        # Those of destroyed groups would keep them, and their streams, for good.
        for key in [key for key, other in _known.items() if not _alive(other.group)]:
            _known.pop(key, None)
        pushes = _chosen.get(group) == "symmetric"
        known = P2P(group, device, staged=pushes)
        if pushes:
            # What follows needs all ranks, and a tensor on another device may have brought only some of them here.
            known.agree({"transport": "symmetric", "device": device.type}, None)
            fabric = (GpuMemory if device.type == "cuda" else SharedMemory)(group, device, known.timeout)
            known = Symmetric(known, fabric)
        _known[name, device] = known
    return known
