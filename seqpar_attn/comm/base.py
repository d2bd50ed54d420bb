"""The protocol of a communicator: move tensors between ranks while the device computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

Message = tuple[int, torch.Tensor]
"""A peer (a rank of the group), and a tensor to send to it or to fill with what comes from it. There are dozens in a
pass, so they are plain tuples."""


class Handle(Protocol):
    def wait(self) -> None:
        """Order what follows on the compute stream behind the transfers. Does not block the host on CUDA."""
        ...


class Arena(Protocol):
    """Memory that slots for what travels must lie in, at the same places on every rank. Passes share it, so they take
    turns."""

    generation: int
    """Changes when what was reserved before may no longer be used. No two arenas of a process ever have the same."""

    def reserve(self, size: int) -> torch.Tensor:
        """``size`` bytes, always the same ones. All ranks make the same calls."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Entered around a pass that uses it: waits for other threads' passes, and orders what this one does on the
        current stream behind what the last one did on its."""
        ...


class Communicator(Protocol):
    """All ranks of a group, seen from one process.

    ``local_ranks`` are the ranks this process computes for: one of them, or all with ``loopback``. One with an
    ``arena`` writes into its peers' slots: ``exchange`` then also takes ``targets``, the place in the own arena that
    each message has in its receiver's, and more (:class:`.symmetric.Symmetric`).
    """

    @property
    def arena(self) -> Arena | None: ...

    def count_call(self) -> int | None:
        """The number of a forward call that begins, the same one on every rank."""
        ...

    def give_way(self, why: str) -> bool:
        """Stop using the arena, if there is another way, and say whether there is. All ranks call it together."""
        ...

    name: str
    world_size: int
    local_ranks: tuple[int, ...]

    def exchange(
        self, sends: Sequence[Sequence[Message]], receives: Sequence[Sequence[Message]], *, slow: bool = False
    ) -> Handle:
        """Start transfers; one list per local rank. Between two ranks messages match in order.

        The transfers start after the work already on the compute stream. Until ``wait`` nobody may write what is sent
        or touch what is received. Raises CommunicationError, also from ``wait``, when a peer is gone or too late.

        Several exchanges may be in flight. ``slow`` ones take long, so others must not have to wait in line behind
        them. Slow ones are waited for in the order in which they began, and so are the others.
        """
        ...

    def open(self, slow: bool) -> None:
        """Make ready for exchanges, or for slow ones, too. All ranks call it, before the first of them; again it does
        nothing."""
        ...

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        """Compare a call's description across ranks before anything moves.

        ``error`` is this rank's own complaint about its input, if any. If any rank has one, or two ranks differ in a
        field, every rank raises a ValueError that names the rank and the field.
        """
        ...


class CommunicationError(RuntimeError):
    """A peer died, or did not answer within the group's timeout."""


class SetUpError(CommunicationError):
    """Something that all ranks have to set up together failed on one of them, and all know. Nothing has moved."""


class _Unknown:
    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Unknown()
"""The value of a field that a rank cannot compare."""


def compare(descriptions: Sequence[Mapping[str, object]], errors: Sequence[str | None]) -> None:
    """Raise the ValueError that every rank of the group has to raise; nothing if all agree."""
    complaints = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
    if complaints:
        raise ValueError("; ".join(complaints))
    known: dict[str, tuple[int, object]] = {}
    """Per field the first rank that knows it, and what it says."""
    names = dict.fromkeys(name for description in descriptions for name in description)
    for rank, description in enumerate(descriptions):
        for name in names:
            other = description.get(name)
            if other == repr(UNKNOWN):
                continue
            where, first = known.setdefault(name, (rank, other))
            if first != other:
                raise ValueError(
                    f"expected the same {name} on every rank, got {first} on rank {where} and {other} on rank {rank}"
                )


def agree(
    comms: Sequence[Communicator],
    fields: Mapping[str, object],
    error: Exception | None,
    more: Sequence[Mapping[str, object]] | None = None,
) -> None:
    """``Communicator.agree`` of all ranks of a grid, given this rank's group along each dimension, in one order
    everywhere. A complaint in a group is handed on to the next ones, so that it reaches every rank. ``more``: fields of
    each group's own."""
    for i, comm in enumerate(comms):
        try:
            comm.agree(fields if more is None else {**fields, **more[i]}, error)
        except ValueError as complaint:
            error = complaint
    if error is not None:
        raise error
