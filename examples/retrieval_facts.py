"""Training sequences for ``extend_smollm2.py``: long text with facts strewn in, and questions about them far behind.

Nothing here uses the words, the kind of key or the kind of value of the evaluation's needles (``needle.py``): those ask
for a city's seven-digit "special magic number", these for persons', projects' and things' words and shorter codes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

_FIRST = (
    "Anna Boris Clara Daniel Edith Felix Greta Henry Irene Jacob Karen Louis Maria Norman Olga Peter Ruth Simon Tessa "
    "Ulrich Vera Walter Yvonne Arthur Beatrice Conrad Dora Edgar Flora Gustav Hilda Ivan Judith Klaus Lydia Martin"
)
_LAST = (
    "Abbott Barlow Carver Dalton Ellwood Farrow Garner Hobbs Ingram Jarvis Keller Lambert Mercer Nolan Osborne Pratt "
    "Quigley Rowland Sutton Tanner Underhill Vickers Whitlock Yardley Zeller Ashby Bolton Crane Drummond Fenwick"
)
_ADJECTIVE = (
    "amber bitter copper distant early frozen gentle hollow idle jagged kindly lonely mellow narrow orange patient "
    "quiet restless silver tender upper velvet wooden yellow broken crimson dusty eager faint golden humble ivory"
)
_NOUN = (
    "anchor basket candle dagger engine feather garden hammer island jacket kettle ladder mirror marble orchard "
    "pebble quarry ribbon saddle teapot umbrella valley window anvil bridge carpet drawer falcon goblet harbour lantern"
)
FIRST, LAST, ADJECTIVE, NOUN = (tuple(x.split()) for x in (_FIRST, _LAST, _ADJECTIVE, _NOUN))

# A statement, whose first part begins the answer, too, and a question. {k} is the key, {v} the value.
TEMPLATES = (
    ("{k}'s locker code is", "What is {k}'s locker code?", "person", "digits"),
    ("The password of the project {k} is", "What is the password of the project {k}?", "thing", "words"),
    ("In the ledger {k} is entered with the sum of", "Which sum does the ledger give for {k}?", "person", "digits"),
    ("The ship {k} sails under the registration", "Which registration has the ship {k}?", "thing", "code"),
    ("The extension of Dr. {k} is", "On which extension can one reach Dr. {k}?", "person", "digits"),
    ("Catalogue entry for the {k}:", "What does the catalogue give for the {k}?", "thing", "digits"),
    ("{k} has left the keys in the", "Where has {k} left the keys?", "person", "words"),
    ("Code word of the {k} lodge:", "What is the code word of the {k} lodge?", "thing", "words"),
    ("The file of {k} has the reference", "What is the reference of {k}'s file?", "person", "code"),
    ("The combination of the {k} safe is", "What is the combination of the {k} safe?", "thing", "digits"),
)  # fmt: skip
QUESTIONS = (
    "\nQuestion: {q}\nAnswer: {s}",
    "\nQ: {q} A: {s}",
    "\nAs was said before: {s}",
    "\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{s}",
    " {q} {s}",
)


def _key(kind: str, rng: random.Random) -> str:
    if kind == "person":
        return f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    return f"{rng.choice(ADJECTIVE)} {rng.choice(NOUN)}"


def _value(kind: str, rng: random.Random) -> str:
    if kind == "digits":
        digits = rng.choice((3, 4, 5, 6, 8))
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind == "words":
        return f"{rng.choice(ADJECTIVE)} {rng.choice(NOUN)}"
    return f"{''.join(rng.choices('ABCDEFGHKLMNPRSTVWXZ', k=2))}-{rng.randrange(100, 10_000)}"


class Encoder:
    """Pieces of text to tokens, remembered."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        return self._known[text]


def training_sequence(
    text: Sequence[int], length: int, encode: Encoder, rng: random.Random, *, tokens_per_fact: int = 640
) -> tuple[list[int], list[bool]]:
    """``length`` tokens: a random cut of ``text`` with facts and questions in it; and which tokens are answers.

    Half of the questions are at the end, the others anywhere behind their facts, so that distances of all lengths
    occur. Raises ValueError if the text is too short.
    """
    if len(text) < length:
        raise ValueError(f"expected a text of at least {length} tokens, got {len(text)}")
    events: list[tuple[float, list[int], list[bool]]] = []
    keys: set[str] = set()
    for _ in range(max(length // tokens_per_fact, 1)):
        statement, question, key_kind, value_kind = rng.choice(TEMPLATES)
        key = _key(key_kind, rng)
        if key in keys:
            continue  # it has a value already
        keys.add(key)
        value = encode(" " + _value(value_kind, rng))
        s = statement.format(k=key)
        begin, stop = encode(rng.choice((" ", "\n")) + s), encode(".\n")
        place = rng.random()
        events.append((place, begin + value + stop, [False] * (len(begin) + len(value) + len(stop))))
        ask = encode(rng.choice(QUESTIONS).format(q=question.format(k=key), s=s))
        asked = 1.0 + rng.random() if rng.random() < 0.5 else rng.uniform(place, 1.0)  # behind 1: at the end, in order
        answers = [False] * len(ask) + [True] * len(value) + [False] * len(stop)
        events.append((asked, ask + value + stop, answers))
    events.sort(key=lambda event: event[0])
    room = length - sum(len(ids) for _, ids, _ in events)
    if room < 1:
        raise ValueError(f"expected sequences with room for facts, got {length} tokens")
    start, done = rng.randrange(len(text) - room + 1), 0
    ids: list[int] = []
    answer: list[bool] = []
    for place, piece, mask in events:
        until = min(round(place * room), room)
        ids.extend(text[start + done : start + until])
        answer.extend([False] * (until - done))
        ids.extend(piece)
        answer.extend(mask)
        done = until
    ids.extend(text[start + done : start + room])
    answer.extend([False] * (room - done))
    return ids, answer
