"""Compare the description of a call across ranks through the group's store, before anything moves.

The store works on the host alone, so a rank with bad input can tell the others without a collective, and a rank that
never comes is a timeout with a name. Groups on CPU do this on every call. Groups on GPUs do it once per new
description: host time per call stays small, and a rank that differs only later is named by the timeout.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from .base import CommunicationError, compare

REMEMBERED = 1024
"""Descriptions a GPU group remembers; packed batches bring a new one each."""

_GRACE_S = 2.0
"""How long after the timeout the store may still take to say that a wait is over, and who is missing."""

T = TypeVar("T")

_calls: dict[str, int] = defaultdict(int)
"""Calls so far per group name; never reset, so that a group made again on the same store meets no old keys."""


class Handshake:
    def __init__(self, store: Store, name: str, rank: int, world_size: int, timeout: timedelta, every_call: bool):
        self.store, self.name, self.rank, self.world_size = store, name, rank, world_size
        self.timeout, self.every_call = timeout, every_call
        self._agreed: dict[tuple[tuple[str, object], ...], None] = {}
        self._old_key: str | None = None

    def _key(self, call: int, rank: int) -> str:
        return f"seqpar_attn/{self.name}/{call}/{rank}"

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> bool:
        """Whether the ranks really talked (False: this description was agreed on before). See Communicator.agree."""
        call = _calls[self.name]
        _calls[self.name] += 1
        description = tuple(sorted(fields.items()))
        if error is None and not self.every_call and description in self._agreed:
            return False
        mine = {"fields": {name: repr(value) for name, value in fields.items()}, "error": error and str(error)}
        keys = [self._key(call, rank) for rank in range(self.world_size)]
        try:
            answers = _within(self.timeout.total_seconds() + _GRACE_S, lambda: self._talk(keys, json.dumps(mine)))
        except Exception as cause:
            if error is not None:
                raise error from cause
            raise CommunicationError(
                f"rank {self.rank}: handshake of call {call} in group {self.name} failed: {cause}"
            ) from cause
        compare([answer["fields"] for answer in answers], [answer["error"] for answer in answers])
        if self.every_call:  # nobody asks what was agreed on
            return True
        self._agreed[description] = None
        if len(self._agreed) > REMEMBERED:  # every rank saw the same calls, so every rank forgets the same one
            del self._agreed[next(iter(self._agreed))]
        return True

    def _talk(self, keys: list[str], mine: str) -> list[dict[str, Any]]:
        """What every rank says of its call."""
        try:
            self.store.set(keys[self.rank], mine)
            self.store.wait(keys, self.timeout)
            answers = [json.loads(value) for value in self.store.multi_get(keys)]
            # Everyone has read the keys of the previous handshake, or would not have joined this one.
            if self._old_key is not None:
                self.store.delete_key(self._old_key)
            self._old_key = keys[self.rank]
        except Exception as cause:
            missing = self._missing(keys)
            raise RuntimeError(f"ranks {missing} did not join within {self.timeout} ({cause})") from cause
        return answers

    def _missing(self, keys: list[str]) -> str:
        try:
            return str([rank for rank, key in enumerate(keys) if not self.store.check([key])])
        except Exception as cause:
            return f"unknown (the store is gone: {cause})"


def _within(seconds: float, function: Callable[[], T]) -> T:
    """``function()``, but an error if it takes longer; it is then left behind.

    Torch's TCPStore ends a wait that timed out by asking its server to cancel it, and for the answer it waits without
    any limit: where the host of the store has become unreachable, for a quarter of an hour, until TCP gives up.
    """
    done: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((function(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, name="seqpar_attn handshake", daemon=True).start()  # no exit waits for a daemon
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(
            f"the group's store did not answer within {seconds:g} s: its host (MASTER_ADDR) is unreachable or stopped"
        ) from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
