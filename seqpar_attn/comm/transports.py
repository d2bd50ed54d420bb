"""How a group's transfers go: what a user has set or, where nothing was set, what suits the group's ranks; and the
communicators that do it, one per group and device.

Ranks talk about it through the group's store, so before any collective, and only where there is a choice: groups of
GPUs with several ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import socket
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .base import Communicator, SetUpError
from .choice import Choice, Facts, choose, usual_limit
from .gpu_memory import GpuMemory
from .groups import Group, group_name, process_group, virtual_ranks
from .handshake import Handshake
from .loopback import Loopback
from .p2p import P2P, timeout_of
from .shared_memory import SharedMemory
from .symmetric import Symmetric

TRANSPORTS = ("auto", "p2p", "symmetric")
LIMIT = "SEQPAR_ATTN_ARENA_LIMIT"


class _Asked(NamedTuple):
    """By a user: a transport, and a limit to the arena's bytes."""

    transport: str = "auto"
    limit: int | None = None


class _Made(NamedTuple):
    base: P2P
    comm: P2P | Symmetric | None
    """None: only :func:`peers` has been asked for."""
    choice: Choice


_UNDECIDED = Choice("auto", "the first call decides")
_SET = "set_transport was called"
_asked: WeakKeyDictionary[dist.ProcessGroup, _Asked] = WeakKeyDictionary()
"""Not by name, which may come again."""
_known: dict[tuple[str, torch.device], _Made] = {}


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def limit_of_environment() -> int | None:
    """The limit of arenas for which set_transport gave none."""
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"expected {LIMIT} to be a positive number of bytes, got {text!r}")
    return int(text)


def set_transport(group: Group, transport: str, limit: int | None = None) -> None:
    """How attention's transfers in ``group`` go from here on; every rank of it calls this, with the same arguments.

    "p2p": batched sends and receives of torch.distributed (NCCL, gloo). "symmetric": written straight into the peers'
    memory, on GPUs by copy engines and so without multiprocessors; the ranks must be on one host, their GPUs with peer
    access to each other, which the first call finds out. A peer that does not come within the group's timeout is a
    CommunicationError in the thread that made the first call. "auto", which is what a group has for which this was
    never called: "symmetric" where the first call finds that it works for this group's GPUs, and else "p2p", also for
    CPUs; :func:`transport` says which and why.

    ``limit``: how many bytes each rank may keep for what its peers write; by default as many as the environment
    variable SEQPAR_ATTN_ARENA_LIMIT says or else, with "auto", a sixth of the smallest GPU's memory and, with
    "symmetric", as many as are needed. A call that needs more is a ValueError on every rank; with "auto" it ends the
    use of "symmetric" instead, from that call on.

    ValueError on every rank for other arguments or different ones, virtual ranks, or "symmetric" on several hosts.
    """
    name = group_name(group)
    if virtual_ranks(name) is not None:
        raise ValueError("expected a group of processes, got virtual ranks, which need no transport")
    error: ValueError | None = None
    if transport not in TRANSPORTS:
        error = ValueError(f"expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
    elif limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        error = ValueError(f"expected limit to be a positive number of bytes or None, got {limit!r}")
    elif limit is not None and transport == "p2p":
        error = ValueError(f"expected no limit for 'p2p', which keeps no memory, got {limit}")
    ranks = process_group(name)
    store = dist.distributed_c10d._get_default_store()
    timeout = max(timeout_of(ranks._get_backend(device)) for device in ranks._device_types)
    handshake = Handshake(store, name, dist.get_rank(ranks), dist.get_world_size(ranks), timeout, every_call=True)
    hosts = set(handshake.share({"transport": transport, "limit": limit}, error, _host()))
    if transport == "symmetric" and len(hosts) > 1:
        raise ValueError(f"expected all ranks on one host for transport 'symmetric', got {len(hosts)} hosts: use 'p2p'")
    _asked[ranks] = _Asked(transport, limit)
    for key in [key for key in _known if key[0] == name]:
        del _known[key]


def transport(group: Group) -> Choice:
    """``(name, reason)`` of the transport that ``group``'s calls have; what was set, if there has been no call since.
    Of calls with tensors on several devices, those on the one that came last."""
    name = group_name(group)
    if virtual_ranks(name) is not None:
        return Choice("loopback", "virtual ranks of one process")
    ranks = process_group(name)
    for (known, _), made in reversed(_known.items()):
        if known == name and made.comm is not None and made.base.group is ranks:
            if isinstance(made.comm, Symmetric) and made.comm.gave_way is not None:
                return Choice("p2p", made.comm.gave_way)
            return made.choice
    asked = _asked.get(ranks, _Asked()).transport
    return _UNDECIDED if asked == "auto" else Choice(asked, _SET)


def communicator(name: str, device: torch.device) -> Communicator:
    """The communicator of the group that :func:`group_name` named, for tensors on ``device``.

    All ranks ask for it together, the first time; if they cannot have one that moves such tensors, ValueError on all.
    """
    virtual = virtual_ranks(name)
    if virtual is not None:
        return _loopback(virtual)
    made = _find(name, device)
    if made.comm is None:
        group = made.base.group
        assert group is not None
        made = _known[name, device] = _choose(made.base, _asked.get(group, _Asked()))
        assert made.comm is not None
    return made.comm


def peers(name: str, device: torch.device) -> P2P | Loopback:
    """The named group's ranks for who agrees with them and moves little; decides nothing, and asks nobody."""
    virtual = virtual_ranks(name)
    return _find(name, device).base if virtual is None else _loopback(virtual)


@functools.lru_cache(maxsize=256)
def _loopback(world_size: int) -> Loopback:
    return Loopback(world_size)


def _find(name: str, device: torch.device) -> _Made:
    group = process_group(name)
    made = _known.get((name, device))
    if made is None or made.base.group is not group:
        # Those of destroyed groups would keep them, and their streams, for good.
        for key in [key for key, other in _known.items() if not _alive(other.base.group)]:
            _known.pop(key, None)
        made = _known[name, device] = _Made(P2P(group, device), None, _UNDECIDED)
    return made


def _alive(group: dist.ProcessGroup | None) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def _choose(base: P2P, asked: _Asked) -> _Made:
    """All ranks come here together if there is something to choose."""
    device = base.device
    simple = _SET if asked.transport == "p2p" else _no_choice(base) if asked.transport == "auto" else None
    if simple is not None:
        choice = Choice("p2p", simple)
    else:
        choice, limit = _agreed(base, asked)
        if choice.name == "symmetric":
            try:
                fabric = (GpuMemory if device.type == "cuda" else SharedMemory)(base, device)
                yields = asked.transport == "auto" and not base.staged
                return _Made(base, Symmetric(base, fabric, limit, yields), choice)
            except SetUpError as error:
                if asked.transport != "auto":
                    raise SetUpError(f"{error}: use set_transport(group, 'p2p')") from error
                choice = Choice("p2p", str(error))
    if base.staged and base.world_size > 1:
        raise ValueError(
            "expected an NCCL group for CUDA tensors, got gloo, which cannot send them peer to peer; the symmetric "
            f"transport needs no NCCL, but here 'p2p' was chosen: {choice.reason}"
        )
    return _Made(base, base, choice)


def _no_choice(base: P2P) -> str | None:
    """Why nothing is to be decided, by what all ranks know of each other."""
    if base.device.type != "cuda":
        return "the tensors are on CPUs"
    return "one rank has nobody to send to" if base.world_size == 1 else None


def _agreed(base: P2P, asked: _Asked) -> tuple[Choice, int | None]:
    """The choice, and the arena's limit. A tensor on another device may have brought only some of the ranks here."""
    error: ValueError | None = None
    limit = asked.limit
    try:
        limit = limit_of_environment() if limit is None else limit
    except ValueError as complaint:
        error = complaint
    facts = _facts(base) if asked.transport == "auto" else None
    fields = {"device": base.device.type, "direction": "choice of a transport", "arena limit": limit}
    everyones = base.handshake.share(fields, error, facts and dataclasses.asdict(facts))
    if facts is None:
        return Choice("symmetric", _SET), limit
    lists = ("sees", "reaches")
    known = [Facts(**x | {name: tuple(x[name]) for name in lists}) for x in everyones]
    return choose(known), usual_limit(known) if limit is None else limit


def _facts(base: P2P) -> Facts:
    own = base.device.index
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return Facts(
        host=_host(),
        gpu=uuids[own],
        sees=tuple(uuids),
        reaches=tuple(x for i, x in enumerate(uuids) if i != own and torch.cuda.can_device_access_peer(own, i)),
        torch=torch.__version__,
        memory=torch.cuda.get_device_properties(own).total_memory,
        sends=not base.staged,
        lacks=_lacking(),
        capturing=torch.cuda.is_current_stream_capturing(),
    )


def _lacking() -> str | None:
    """What this process would need for flags that streams write, and for memory that processes share."""
    for function in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        try:
            getattr(ctypes.CDLL("libcuda.so.1"), function)
        except (OSError, AttributeError) as why:
            return f"the CUDA driver has no {function} ({why})"
    with contextlib.suppress(ImportError):
        import torch.distributed._symmetric_memory as symmetric_memory

        if hasattr(symmetric_memory, "rendezvous"):
            return None
    return f"torch {torch.__version__} has no symmetric memory"
