"""Notices that a GPU has waited for a peer too long, and turns that into an exception.

A stream that waits for a flag would do so for ever if the rank that sets it is gone, and the host would wait for the
stream. Only a thread of the host can tell, and only by letting the stream go on can the host get away.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from typing import Protocol

from .base import CommunicationError

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
    """Whether one exchange has been under way for more than ``timeout`` seconds, as far as it has been looked at."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._at, self._since = -1, 0.0

    def is_over(self, begun: int, done: int, now: float) -> bool:
        if begun == done:
            self._at = -1
        elif begun != self._at:
            self._at, self._since = begun, now
        return self._at >= 0 and now - self._since > self.timeout


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
        while not _ending.wait(interval):
            it = alive()
            if it is None:
                return
            begun, done = it.progress()
            peer, why = it.failed_peer(), None
            if patience.is_over(begun, done, time.monotonic()):
                why = f"{it.explain(begun)} did not come within {timeout:g} s"
            elif peer is not None:
                # What this rank waits for may say more than what was too late for that one.
                why = f"rank {peer} has given up" + (f"; {it.explain(begun)} had not come" if begun != done else "")
            if why is not None:
                raise_in(thread, why)  # before all else: who gets the error from a call need not get it twice
                it.give_up(why)
                return
            del it

    watching = threading.Thread(target=loop, daemon=True, name="seqpar_attn watch")
    _threads.add(watching)
    watching.start()
