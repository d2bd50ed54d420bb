"""Compare the description of a call across ranks through the group's store, before anything moves.

The store works on the host alone, so a rank with bad input can tell the others without a collective, and a rank that
never comes is a timeout with a name. Groups on CPU do this on every call. Groups on GPUs do it once per new
description: host time per call stays small, and a rank that differs only later is named by the timeout.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch._C._distributed_c10d import Store

from .base import CommunicationError, SetUpError, compare

REMEMBERED = 1024
"""Descriptions a GPU group remembers; packed batches bring a new one each."""

_calls: WeakKeyDictionary[Store, dict[str, int]] = WeakKeyDictionary()
"""Calls so far per store and group name. They go on when a group is made again on its store, so that it meets no old
keys; and begin anew with a new store, because a fault leaves the ranks with different numbers."""

_old_keys: WeakKeyDictionary[Store, dict[tuple[str, int], str]] = WeakKeyDictionary()
"""Per store, group name and rank: what a rank has written last."""

_GRACE_S = 2.0
"""How long after its timeout the store may take to answer."""

T = TypeVar("T")


class Handshake:
    def __init__(self, store: Store, name: str, rank: int, world_size: int, timeout: timedelta, every_call: bool):
        # Weakly, see P2P.
        self._store, self.name, self.rank, self.world_size = weakref.ref(store), name, rank, world_size
        self._calls = _calls.setdefault(store, defaultdict(int))
        self._old_keys = _old_keys.setdefault(store, {})
        self.timeout, self.every_call = timeout, every_call
        self._agreed: dict[tuple[tuple[str, object], ...], None] = {}

    def _key(self, call: int, rank: int) -> str:
        return f"seqpar_attn/{self.name}/{call}/{rank}"

    def unique(self, what: str) -> str:
        """A name for keys of the store that is new, and one on all ranks as long as they make the same calls."""
        return f"seqpar_attn/{self.name}/{self._calls[self.name]}/{what}"

    def agree(self, fields: Mapping[str, object], error: Exception | None) -> bool:
        """Whether the ranks really talked (False: this description was agreed on before). See Communicator.agree."""
        description = tuple(sorted(fields.items()))
        if error is None and not self.every_call and description in self._agreed:
            self._calls[self.name] += 1
            return False
        self.share(fields, error)
        if self.every_call:  # nobody asks what was agreed on
            return True
        self._agreed[description] = None
        if len(self._agreed) > REMEMBERED:  # every rank saw the same calls, so every rank forgets the same one
            del self._agreed[next(iter(self._agreed))]
        return True

    def share(
        self, fields: Mapping[str, object], error: Exception | None, value: object = None, patience: float = 1.0
    ) -> list[Any]:
        """Agree, whatever was agreed on before, and get every rank's ``value``, something that JSON can say.
        ``patience``: how many timeouts to wait."""
        call = self._calls[self.name]
        self._calls[self.name] += 1
        mine = {
            "fields": {name: repr(field) for name, field in fields.items()},
            "error": error and str(error),
            "value": value,
        }
        keys = [self._key(call, rank) for rank in range(self.world_size)]
        try:
            answers = [json.loads(answer) for answer in self._talk(keys, json.dumps(mine), patience * self.timeout)]
        except Exception as cause:
            if error is not None:
                raise error from cause
            raise CommunicationError(
                f"rank {self.rank}: handshake of call {call} in group {self.name} failed: {cause}"
            ) from cause
        compare([answer["fields"] for answer in answers], [answer["error"] for answer in answers])
        return [answer["value"] for answer in answers]

    def together(self, what: str, step: Callable[[], T]) -> T:
        """``step``'s result, once every rank has taken it. SetUpError on every rank if one could not."""
        result, cause = None, None
        try:
            result = step()
        except Exception as error:
            cause = error
        # A step in which others wait for a rank that has failed takes them a timeout of their own.
        answers = self.share({"step": what}, None, None if cause is None else str(cause), patience=2.0)
        failed = [f"rank {rank} could not {what} ({why})" for rank, why in enumerate(answers) if why is not None]
        if failed:
            raise SetUpError("; ".join(failed)) from cause
        return result  # type: ignore[return-value]

    def _talk(self, keys: list[str], mine: str, timeout: timedelta) -> list[bytes]:
        """Every rank's answer. On a thread of its own, because a TCPStore whose host is stopped keeps its clients
        waiting whatever their timeout: they wait for the answer to their cancellation."""
        result: SimpleQueue[list[bytes] | str] = SimpleQueue()
        talk = threading.Thread(target=lambda: result.put(self._ask(keys, mine, timeout)), daemon=True)
        talk.start()
        limit = timeout.total_seconds() + _GRACE_S
        try:
            answers = result.get(timeout=limit)
        except Empty:
            answers = (
                f"the group's store did not answer within {limit:g} s: its host (MASTER_ADDR) is unreachable or stopped"
            )
        if isinstance(answers, str):
            raise RuntimeError(answers)
        return answers

    def _ask(self, keys: list[str], mine: str, timeout: timedelta) -> list[bytes] | str:
        """Every rank's answer, or what went wrong: an exception would keep the store alive in its traceback."""
        store = self._store()
        if store is None:
            return "the group has been destroyed"
        try:
            store.set(keys[self.rank], mine)
            store.wait(keys, timeout)
            answers = store.multi_get(keys)
            # Everyone has read the keys of the previous handshake, or would not have joined this one.
            old = self._old_keys.get((self.name, self.rank))
            if old is not None:
                store.delete_key(old)
        except Exception as cause:
            return f"ranks {self._missing(store, keys)} did not join within {timeout} ({cause})"
        self._old_keys[self.name, self.rank] = keys[self.rank]
        return answers

    def _missing(self, store: Store, keys: list[str]) -> str:
        try:
            return str([rank for rank, key in enumerate(keys) if not store.check([key])])
        except Exception as cause:
            return f"unknown (the store is gone: {cause})"
