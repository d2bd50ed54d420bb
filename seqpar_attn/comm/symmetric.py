"""Transfers that the sender writes straight into the receiver's slots.

Every rank's slots lie in an arena that its peers have mapped, at the same places on every rank. A receiver says "ready"
in the sender's flags when nothing uses the slots any more, the sender then copies and says "arrived" in the receiver's.
Both are counters of exchanges between the two ranks (:mod:`.flags`). On GPUs streams write and wait for them and copy
engines move the data, so that neither the host nor a multiprocessor takes part, and a persistent kernel of attention
cannot keep a transfer waiting (docs/communication.md).

No exchange can wait for ever on a rank that is at an earlier step: a rank says "ready" for a step before it waits for
anything in it, and what it waits for in earlier steps its peers have posted by then. Slow exchanges are waited for in
one order on every rank, too. A peer that is gone is the fabric's to notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from .arena import GrowingArena
from .base import Handle, Message
from .flags import awaited, told
from .p2p import P2P


class Fabric(Protocol):
    """Memory that all ranks of a group map, and a queue of one rank's copies and flags, beside the compute stream.

    Flags are numbers, ``4 * world_size`` of them per rank, that only grow, by less than 2**30 at a time; of 32 bits at
    least, which go round.
    """

    def allocate(self, size: int) -> torch.Tensor:
        """A new arena of so many bytes on every rank, uint8, this one's own part; the last one may no longer be used.

        All ranks call it at the same time with the same size. It may wait for them. SetUpError on every rank if one of
        them cannot.
        """
        ...

    def there(self, peer: int, tensor: torch.Tensor) -> torch.Tensor:
        """The same place of ``peer``'s arena as ``tensor`` is of the own one."""
        ...

    def turn(self) -> None:
        """Order what follows on the current stream behind what went before on the one that was current in the last
        call. RuntimeError where this cannot work."""
        ...

    def begin(self, where: str) -> None:
        """What is queued from here on comes after the work already on the compute stream. ``where`` names the exchange
        in errors. CommunicationError if an earlier one has failed."""
        ...

    def tell(self, peer: int, flag: int, value: int) -> None:
        """Queue: set a flag of ``peer``'s, behind the copies that were queued before."""
        ...

    def await_own(self, flag: int, value: int, peer: int) -> None:
        """Queue: go on when the own flag is at least ``value``, which ``peer`` will set. CommunicationError if it does
        not within the group's timeout."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue."""
        ...

    def end(self) -> Handle:
        """``wait`` orders the compute stream behind all that has been queued."""
        ...

    def close(self) -> None:
        """Give the arena's memory back. All ranks call it, and nothing more."""
        ...


class Symmetric:
    """``base``'s ranks, whose messages go through ``fabric``.

    ``limit``: of the arena's bytes. ``yields``: where the arena cannot be had, messages go through ``base`` from there
    on, instead of an error.
    """

    name = "symmetric"

    def __init__(self, base: P2P, fabric: Fabric, limit: int | None = None, yields: bool = False):
        self.base, self.fabric, self.yields = base, fabric, yields
        self.gave_way: str | None = None
        """Why it did."""
        self.world_size = base.world_size
        self.local_ranks: tuple[int, ...] = base.local_ranks
        self.rank = base.local_ranks[0]
        self.arena: GrowingArena | None = GrowingArena(fabric, limit)
        self._sent: dict[tuple[int, bool], int] = defaultdict(int)
        self._expected: dict[tuple[int, bool], int] = defaultdict(int)
        """Exchanges with a peer so far in which it gets something, or sends something. Slow ones have counters of their
        own, because others that begin later may end earlier."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.base.group

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> None:
        self.base.agree(fields, error)

    def count_call(self) -> int:
        return self.base.count_call()

    def give_way(self, why: str) -> bool:
        if self.yields and self.arena is not None:
            self.gave_way, self.arena = why, None
            self.fabric.close()
        return self.yields

    def open(self, slow: bool) -> None:
        if self.arena is None:
            self.base.open(slow)

    def exchange(
        self,
        sends: Sequence[Sequence[Message]],
        receives: Sequence[Sequence[Message]],
        targets: Sequence[Sequence[Message]] | None = None,
        where: str = "an exchange",
        call: int | None = None,
        *,
        slow: bool = False,
    ) -> Handle:
        """``targets[i][j]`` is where ``sends[i][j]`` belongs: a place in the own arena, meant in the peer's. ``call``:
        the number of the forward call of whose backward pass this is part; peers that are in another one do not
        come."""
        if self.arena is None:
            return self.base.exchange(sends, receives, slow=slow)
        assert targets is not None
        fabric = self.fabric
        ready = 2 * self.world_size if slow else 0
        arrived = ready + self.world_size
        messages: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for (peer, source), (_, target) in zip(sends[0], targets[0], strict=True):
            messages[peer].append((target, source))
        sources = dict.fromkeys(peer for peer, _ in receives[0])
        fabric.begin(where)
        for peer in sources:
            self._expected[peer, slow] += 1
            fabric.tell(peer, ready + self.rank, told(self._expected[peer, slow], call))
        for peer, copies in messages.items():
            self._sent[peer, slow] += 1
            fabric.await_own(ready + peer, awaited(self._sent[peer, slow], call), peer)
            for target, source in copies:
                fabric.copy(fabric.there(peer, target), source)
            fabric.tell(peer, arrived + self.rank, told(self._sent[peer, slow], call))
        for peer in sources:
            fabric.await_own(arrived + peer, awaited(self._expected[peer, slow], call), peer)
        return fabric.end()
