"""Which transport a group of GPUs gets that was given none, decided from what every rank knows.

The symmetric transport is the faster one wherever it works, and GPUs of one host that reach each other's memory is
where it works. The choice is a pure function of all ranks' facts, so ranks that have the same facts choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHARE = "several ranks share a GPU"
MEMORY_SHARE = 1 / 6
"""Of a GPU's memory, what peers may write into where nobody set a limit: 13 GiB of 80, enough for 32 key heads at 89600
tokens per GPU. It is kept between calls, too, so that a run which fits with "p2p" could fail by it. Slots as large as
that hardly raise a step's peak, which is in attention's backward pass, where NCCL would need as many
(docs/communication.md); and what cannot be had is not insisted on."""


class Choice(NamedTuple):
    """A transport and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """What one rank of a group on GPUs knows of itself. GPUs go by UUID: numbers differ between processes."""

    host: str
    gpu: str
    sees: tuple[str, ...]
    """The GPUs that this process sees."""
    reaches: tuple[str, ...]
    """Those of them whose memory its own GPU can address."""
    torch: str
    """Its version: ranks set up what they share by torch's own protocol."""
    memory: int
    """Bytes of its GPU."""
    sends: bool = True
    """Whether the group's backend sends from GPU to GPU (NCCL). If not, there is no other transport."""
    lacks: str | None = None
    """What the symmetric transport needs and this process does not have."""
    capturing: bool = False
    """The first call is part of a CUDA graph."""


def choose(facts: Sequence[Facts]) -> Choice:
    """ "symmetric" or "p2p" for the group whose ranks know ``facts``."""
    no = _obstacle(facts)
    if no is not None:
        return Choice("p2p", no)
    if len({x.gpu for x in facts}) < len(facts):
        return Choice("symmetric", f"{SHARE}, and the group's backend does not send from GPU to GPU")
    return Choice("symmetric", f"{len(facts)} GPUs of one host with access to each other's memory")


def usual_limit(facts: Sequence[Facts]) -> int | None:
    """Of an arena for which nobody set one, in bytes. None where there is no other transport to go to."""
    return int(min(x.memory for x in facts) * MEMORY_SHARE) if all(x.sends for x in facts) else None


def _obstacle(facts: Sequence[Facts]) -> str | None:
    hosts = len({x.host for x in facts})
    if hosts > 1:
        return f"the ranks are on {hosts} hosts"
    for rank, x in enumerate(facts):
        if x.lacks is not None:
            return f"rank {rank}: {x.lacks}"
        if x.capturing:
            return f"the first call of rank {rank} was captured in a CUDA graph"
        if x.torch != facts[0].torch:
            return f"rank 0 has torch {facts[0].torch} and rank {rank} {x.torch}"
    if all(x.sends for x in facts) and len({x.gpu for x in facts}) < len(facts):
        return SHARE
    for a, x in enumerate(facts):
        for b, y in enumerate(facts):
            if x.gpu == y.gpu or y.gpu in x.reaches:
                continue
            if y.gpu in x.sees:
                return f"the GPU of rank {a} has no access to the memory of rank {b}'s"
            return f"rank {a} does not see the GPU of rank {b}, so whether they have access to each other is not known"
    return None
