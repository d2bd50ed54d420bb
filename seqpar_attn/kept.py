"""Results of attention that a recomputation takes back instead of computing them once more.

Activation checkpointing runs a block twice. The second run would repeat attention's kernels and its communication, only
to find the ``(out, lse)`` that the first one had. So around the first run there is a :class:`Recording`, and around the
second a :class:`Replaying`, which the attention operator asks. It asks where it computes, below autograd, so
torch.compile makes no difference, and no other operator is slowed down.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch

Results = tuple[torch.Tensor, ...]


class Store(Protocol):
    """Keeps the results of the attention calls of one block, in the order of the calls."""

    def put(self, results: Results) -> None: ...

    def take(self, index: int) -> Results:
        """Those of the call with this number. They may be taken more than once."""
        ...

    def __len__(self) -> int: ...


_this_thread = threading.local()


def _current() -> Recording | Replaying | None:
    return getattr(_this_thread, "current", None)


class _Scope:
    """What the attention calls of this thread do while it is entered."""

    def __init__(self, store: Store):
        self.store = store
        self._outer: Recording | Replaying | None = None

    def __enter__(self) -> _Scope:
        self._outer = _current()
        _this_thread.current = self
        return self

    def __exit__(self, *_: object) -> None:
        _this_thread.current = self._outer


class Recording(_Scope):
    """Attention calls put their results into the store."""


class Replaying(_Scope):
    """Attention calls take their results from the store."""

    def __enter__(self) -> _Scope:
        self.index = 0
        return super().__enter__()


class Watching:
    """Counts the attention calls of this thread that compute something, whatever else they are asked to do."""

    calls = 0

    def __enter__(self) -> Watching:
        self._outer = getattr(_this_thread, "watching", None)
        _this_thread.watching = self
        return self

    def __exit__(self, *_: object) -> None:
        _this_thread.watching = self._outer


def replayed(q: torch.Tensor) -> Results | None:
    """The results of this call, if it is a recomputation."""
    scope = _current()
    if not isinstance(scope, Replaying):
        return None
    if scope.index >= len(scope.store):
        raise RuntimeError(f"expected {len(scope.store)} attention calls in the recomputation, as before, got more")
    results = scope.store.take(scope.index)
    scope.index += 1
    if results[0].shape != q.shape:
        raise RuntimeError(
            f"expected q of shape {list(results[0].shape)} in the recomputation, as before, got {list(q.shape)}"
        )
    return results


def record(results: Results) -> None:
    """Keep the results of this call, if somebody asked for that, and count it."""
    watching: Watching | None = getattr(_this_thread, "watching", None)
    if watching is not None:
        watching.calls += 1
    scope = _current()
    if isinstance(scope, Recording):
        scope.store.put(results)
