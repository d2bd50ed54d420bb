"""The numbers of a group's forward calls, by which ranks tell in the backward pass whether they mean the same call.

Calls of equal shape look alike, so ranks that come to two backward passes in different orders would take each other's
blocks for their own. A number is no argument of an operator, for it changes with every call, and torch.compile would
compile as often. It goes by the side: from the operator's function to the node of autograd around it, and back to the
function in the backward pass, within one thread each time. Where nobody carries it, in a compiled graph, it is unknown,
and nothing is compared.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

Numbers = tuple[int | None, ...]
"""One per group of a call, None for a group of virtual ranks; () if unknown."""

_this_thread = threading.local()


class Note:
    """Where the function writes the numbers of the call that it begins."""

    numbers: Numbers = ()


@contextmanager
def noting() -> Iterator[Note]:
    """Around one forward call of an operator."""
    outer = getattr(_this_thread, "note", None)
    _this_thread.note = note = Note()
    try:
        yield note
    finally:
        _this_thread.note = outer


def begin(*numbers: int | None) -> None:
    """The forward call that this thread is in has these numbers."""
    note: Note | None = getattr(_this_thread, "note", None)
    if note is not None:
        note.numbers = numbers


@contextmanager
def of_backward(numbers: Numbers) -> Iterator[None]:
    """Around the backward call of an operator: that of the forward call with these numbers."""
    _this_thread.numbers = numbers
    try:
        yield
    finally:
        _this_thread.numbers = ()


def here(groups: int = 1) -> Numbers:
    """The numbers of the forward call whose backward pass this thread is in, as many as there are groups."""
    numbers: Numbers = getattr(_this_thread, "numbers", ())
    return numbers or (None,) * groups
