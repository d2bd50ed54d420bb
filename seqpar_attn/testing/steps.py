"""How many ranks' keys a ring step gathers, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import plan


@contextlib.contextmanager
def keys_per_step(tokens: int) -> Iterator[None]:
    usual, plan.KEYS_PER_STEP = plan.KEYS_PER_STEP, tokens
    try:
        yield
    finally:
        plan.KEYS_PER_STEP = usual
