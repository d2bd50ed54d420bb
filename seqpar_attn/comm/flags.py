"""What the flags of the symmetric transport say: how many exchanges there were, and of which call the last one is part.

A flag is waited for until it is at least some value. The count is in its higher bits, so a rank that is at an earlier
exchange keeps the other waiting until it comes. The number of the call is in the lower ones, so of two ranks in the
backward passes of different calls the one with the greater number waits for the other in vain, wherever anything goes
from one to the other: both say so in flags, who sends and who receives. That ends as any wait does that takes too long
(:mod:`.watch`), and costs nothing until then.
"""

from __future__ import annotations

_BITS = 8
_ANY = (1 << _BITS) - 1
"""Told by who does not know its call, it is enough for everybody. He himself waits for any."""


def told(count: int, call: int | None) -> int:
    return count << _BITS | (_ANY if call is None else call % _ANY)


def awaited(count: int, call: int | None) -> int:
    return count << _BITS | (0 if call is None else call % _ANY)


def is_behind(flag: int, value: int) -> bool:
    """Whether who waits for ``value`` still waits. Flags of 32 bits go round."""
    return bool((flag - value) & 1 << 31)


def is_other_call(flag: int, value: int) -> bool:
    """Whether who waits does so because the other one is in another call."""
    return is_behind(flag, value) and not is_behind(flag | _ANY, value)
