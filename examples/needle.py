"""Needles in a haystack: a sentence that cannot be guessed, somewhere in a long text, and a question at its end.

The prompts are EasyContext's: "The special magic CITY number is: DIGITS", and distractors, which are the same for other
cities. Used by ``eval_needle.py`` and ``extend_smollm2.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CITIES = (
    "Chicago Yangon Antananarivo Colombo Almaty Sydney Seattle Cairo Barcelona Lagos Amsterdam London Istanbul Bangkok "
    "Toronto Phoenix Zurich Athens Dublin Montreal Lisbon Madrid Berlin Baghdad Budapest Tokyo Stockholm Moscow Prague"
)
CITIES = tuple(_CITIES.split())
BEFORE = "This is a very long story book: <book> "
NEEDLE = "\nThe special magic {city} number is:{value}\n"
AFTER = (
    "</book>.\n Based on the content of the book, Question: What is the special magic {city} number? "
    "Answer: The special magic {city} number is:"
)


@dataclass(frozen=True)
class Prompt:
    """``ids`` end with the answer: a model is right if it predicts every token of it from those before."""

    ids: list[int]
    answer: list[int]
    """Its last tokens."""
    text: str
    """The answer as text."""


def read_folder(folder: str | Path, pattern: str = "*.txt") -> str:
    """All texts of a folder, in the order of their names. ValueError if there are none."""
    paths = sorted(Path(folder).glob(pattern)) if Path(folder).is_dir() else []
    text = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    if not text.strip():
        raise ValueError(f"expected a folder with text in files {pattern}, got {str(folder)!r} with {len(paths)} files")
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def make_prompt(
    tokenizer: Any,
    haystack: Sequence[int],
    length: int,
    depth: float,
    rng: random.Random,
    *,
    digits: int = 7,
    distractors: int = 0,
) -> Prompt:
    """A prompt of exactly ``length`` tokens, the answer included, cut from ``haystack`` at a random place.

    Args:
        depth: 0 puts the needle first, 1 last, always behind the end of a sentence if one is near.
        distractors: as many sentences about other cities, at random places.

    Raises ValueError for a haystack that is too short, a length with no room for the sentences, or bad numbers.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"expected 0 <= depth <= 1, got {depth}")
    if not 0 <= distractors < len(CITIES) or digits < 1:
        raise ValueError(f"expected digits >= 1 and 0 <= distractors < {len(CITIES)}, got {digits} and {distractors}")
    cities = rng.sample(CITIES, distractors + 1)
    values = [" " + str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in cities]
    needles = [_encode(tokenizer, NEEDLE.format(city=c, value=v)) for c, v in zip(cities, values)]
    bos = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    before, after = bos + _encode(tokenizer, BEFORE), _encode(tokenizer, AFTER.format(city=cities[0]))
    answer = _encode(tokenizer, values[0])
    room = length - len(before) - len(after) - len(answer) - sum(map(len, needles))
    if room < 1:
        raise ValueError(f"expected prompts long enough for the question and the needles, got {length} tokens")
    if len(haystack) < room:
        raise ValueError(f"expected a haystack of at least {room} tokens, got {len(haystack)}")
    start = rng.randrange(len(haystack) - room + 1)
    hay = list(haystack[start : start + room])
    # The needle last: the distractors before it would move it. Its depth counts all of them.
    places = [rng.randrange(room + 1) for _ in needles[1:]]
    for place, needle in zip(places, needles[1:]):
        hay[place:place] = needle
    place = _sentence_end(tokenizer, hay, round(depth * len(hay)))
    hay[place:place] = needles[0]
    return Prompt(before + hay + after + answer, answer, values[0].strip())


def _sentence_end(tokenizer: Any, ids: list[int], place: int, near: int = 64) -> int:
    """The place behind the last full stop before ``place``, or ``place`` if there is none near or it is an end."""
    if place in (0, len(ids)):
        return place
    stops = {tokenizer.convert_tokens_to_ids(token) for token in (".", "!", "?")}
    return next((i for i in range(place, max(place - near, 0), -1) if ids[i - 1] in stops), place)
