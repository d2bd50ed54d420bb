"""Moving tensors between ranks: groups by name, and the communicator that serves each."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from .base import CommunicationError, Communicator, Message, agree
from .loopback import Loopback, LoopbackGroup
from .p2p import P2P

Group = dist.ProcessGroup | DeviceMesh | LoopbackGroup | None

__all__ = [
    "CommunicationError",
    "Communicator",
    "Group",
    "Loopback",
    "LoopbackGroup",
    "Message",
    "agree",
    "communicator",
    "group_name",
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


@functools.lru_cache(maxsize=256)
def _loopback(world_size: int) -> Loopback:
    return Loopback(world_size)


_p2p: dict[tuple[str, torch.device], P2P] = {}


def _alive(group: dist.ProcessGroup) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def communicator(name: str, device: torch.device) -> Communicator:
    """The communicator of the group that :func:`group_name` named, for tensors on ``device``."""
    if name.startswith("loopback:"):
        return _loopback(int(name.removeprefix("loopback:")))
    group = _resolve_process_group(name)  # type: ignore[arg-type]
    known = _p2p.get((name, device))
    if known is None or known.group is not group:
        # Those of destroyed groups would keep them, and their streams, for good.
        for key in [key for key, other in _p2p.items() if not _alive(other.group)]:
            _p2p.pop(key, None)
        known = _p2p[name, device] = P2P(group, device)
    return known
