"""Notices that a GPU has waited for a peer too long, and turns that into an exception.

A stream that waits for a flag would do so for ever if the rank that sets it is gone, and the host would wait for the
stream. Only a thread of the host can tell, and only by letting the stream go on can the host get away.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import threading
import time
import weakref
from typing import Protocol

from .base import CommunicationError

_FRESH_S = 1.0
_LEAVE_S = 2.0
"""How long the end of the process waits for one of these threads, which may itself wait for a GPU."""


class Watched(Protocol):
    def progress(self) -> tuple[int, int]:
        """The numbers of the exchange that the stream began last, and of the one that it ended last."""
        ...

    def failed_peer(self) -> int | None:
        """A rank that has given up."""
        ...

    def explain(self, exchange: int) -> str:
        """What that exchange waits for."""
        ...

    def give_up(self, why: str) -> None:
        """From now on every exchange is an error; tell the peers; let the stream go on, with NaN for what it waits."""
        ...


class Patience:
    """For how long one exchange has been under way, as far as it has been looked at."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._at, self._since = -1, 0.0

    def look(self, begun: int, done: int, now: float) -> float:
        """The share of the timeout that has passed."""
        if begun == done:
            self._at = -1
        elif begun != self._at:
            self._at, self._since = begun, now
        return (now - self._since) / self.timeout if self._at >= 0 else 0.0


def raise_in(thread: int, why: str) -> None:
    """CommunicationError in the thread with this ``threading.get_ident()``, as soon as it is back in Python."""

    def init(self: CommunicationError) -> None:
        CommunicationError.__init__(self, why)

    # Python makes the exception itself, without arguments.
    error = type(
        "CommunicationError", (CommunicationError,), {"__init__": init, "__module__": CommunicationError.__module__}
    )
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


_ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that comes back from torch into an interpreter that has ended takes the process with it (SIGABRT)."""
    _ending.set()
    for thread in list(_threads):
        thread.join(_LEAVE_S)


def watch(watched: Watched, timeout: float) -> None:
    """Begin; the exception comes in the thread that calls this. Ends with ``watched``'s life, which it does not
    prolong, or with its end, or with the interpreter's."""
    thread, alive = threading.get_ident(), weakref.ref(watched)
    interval = min(0.2, timeout / 10)

    def loop() -> None:
        patience = Patience(timeout)
        # What this rank has waited for for long, and when it still did. A rank that gives up lets its stream go on,
        # which may end the waits of others before they look again; and those may know more than it does.
        explained, exchange, seen = "", -1, -math.inf
        while not _ending.wait(interval):
            it = alive()
            if it is None:
                return
            begun, done = it.progress()
            now = time.monotonic()
            passed = patience.look(begun, done, now)
            if passed > 0.5:
                if begun != exchange:
                    explained, exchange = it.explain(begun), begun
                seen = now
            peer, why = it.failed_peer(), None
            if passed > 1:
                why = f"{it.explain(begun)} did not come within {timeout:g} s"
            elif peer is not None:
                why = f"rank {peer} has given up"
                if now - seen < _FRESH_S:
                    why += f"; {explained} had not come"
                elif begun != done:
                    why += f"; {it.explain(begun)} had not come"
            if why is not None:
                raise_in(thread, why)  # before all else: who gets the error from a call need not get it twice
                it.give_up(why)
                return
            del it

    watching = threading.Thread(target=loop, daemon=True, name="seqpar_attn watch")
    _threads.add(watching)
    watching.start()
