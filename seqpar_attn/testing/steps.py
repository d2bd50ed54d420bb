"""How a ring's work is cut into steps, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..schedule import choice


@contextlib.contextmanager
def ring_steps(keys: int, own_last_from: int | None = None) -> Iterator[None]:
    """``keys``: tokens of keys per step; ``own_last_from``: see :mod:`seqpar_attn.schedule.choice`, None: never."""
    usual = choice.KEYS_PER_STEP, choice.OWN_LAST_FROM
    choice.KEYS_PER_STEP, choice.OWN_LAST_FROM = keys, 1 << 60 if own_last_from is None else own_last_from
    try:
        yield
    finally:
        choice.KEYS_PER_STEP, choice.OWN_LAST_FROM = usual
