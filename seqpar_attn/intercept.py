"""Attention calls of a thread that go elsewhere, for who runs a model's own code on a few of its tokens.

Everything in a decoder's block but attention treats each token by itself. :mod:`seqpar_attn.memory.staged` therefore
runs a block's forward on tiles of the sequence; where the block calls attention, it takes the tile's queries, keys and
values away, or puts the results in that it knows. It does so here, where the public functions have checked and
completed their arguments, above autograd, and for every method alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Attention:
    """A call of attention but for its tensors: ``operator(q, k, v, *rest)`` begins with ``(out, lse)``.

    ``gradients(dout, None, q, k, v, delta, lse, *rest)`` gives ``dq, dk, dv``, with ``delta = rowsum(dout * out) -
    dlse``, ``[b, h, s]`` of the dtype of ``lse``, in place of ``out``; None for operators that cannot.
    """

    operator: Callable[..., Results]
    gradients: Callable[..., Results] | None
    rest: tuple[Any, ...]
    wants_lse: bool
    """Whether the caller gets ``lse`` as well, and may use it."""


Taker = Callable[[Attention, torch.Tensor, torch.Tensor, torch.Tensor], Results]
"""Takes the call and ``q [b, s, h, d]``, ``k, v [b, s, h_kv, d]``; gives ``out`` like ``q`` and ``lse [b, h, s]``."""

_this_thread = threading.local()


@contextmanager
def intercepting(taker: Taker) -> Iterator[None]:
    """Within it this thread's attention calls go to ``taker``."""
    outer = getattr(_this_thread, "taker", None)
    _this_thread.taker = taker
    try:
        yield
    finally:
        _this_thread.taker = outer


def attend(call: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Results:
    """The call's results, from its operator or from who takes this thread's calls. (Nobody does in compiled code.)"""
    if not torch.compiler.is_compiling():
        taker: Taker | None = getattr(_this_thread, "taker", None)
        if taker is not None:
            return taker(call, q, k, v)
    return call.operator(q, k, v, *call.rest)
