"""Windows of tokens: written once to a file, cut without losing a token, and shared out over the ranks."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .pose import positions
from .sources import Document

IGNORE = -100


def write(folder: Path, found: Iterable[Document]) -> None:
    """Tokens, which of them are learned, and document boundaries, as files that every process maps.

    The folder appears when all is written: a run that was cut off leaves none.
    """
    if folder.exists():
        return
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True)
    bounds, masked = [0], False
    with open(work / "tokens.bin", "wb") as tokens, open(work / "learned.bin", "wb") as learned:
        for ids, mask in found:
            if not len(ids):
                continue
            ids.tofile(tokens)
            (np.ones(len(ids), dtype=bool) if mask is None else mask).tofile(learned)
            masked |= mask is not None
            bounds.append(bounds[-1] + len(ids))
    if bounds[-1] < 2:
        raise ValueError(f"expected a dataset of at least two tokens, got {bounds[-1]}")
    if not masked:
        (work / "learned.bin").unlink()
    np.save(work / "bounds.npy", np.asarray(bounds, dtype=np.int64))
    work.rename(folder)


def cache_name(**settings: Any) -> str:
    """A folder's name for tokens of these settings."""
    return "tokens-" + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """What one data-parallel rank computes at a time, before it is cut over its sequence ranks. Host tensors.

    ``input_ids, labels [rows, seqlen]`` int64, labels aligned: what to predict at each position, or -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: tuple[int, ...] | None
    position_ids: torch.Tensor | None


class Windows:
    """Windows of ``seqlen`` tokens over the files of :func:`write`, in a random order that depends on ``seed`` only.

    Labels come from the whole stream, so a window's last token predicts the next window's first: no token but the very
    first is lost, except where ``separate`` ends a document. ``separate``: a token attends, and predicts, within its
    document; the windows of a batch lie in one row then. ``whole``: windows of whole documents, as many as fit
    (conversations), padded; else they are cut anywhere. ``pose_context``: see :mod:`training.pose`.
    """

    def __init__(
        self,
        folder: Path,
        seqlen: int,
        batch_size: int,
        *,
        seed: int = 0,
        separate: bool = False,
        whole: bool = False,
        pose_context: int | None = None,
        pose_chunks: int = 2,
    ) -> None:
        self.seqlen, self.batch_size, self.seed, self.separate = seqlen, batch_size, seed, separate
        self.pose_context, self.pose_chunks = pose_context, pose_chunks
        learned = folder / "learned.bin"
        self._bounds = np.load(folder / "bounds.npy")
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self._learned = np.memmap(learned, dtype=bool, mode="r") if learned.exists() else None
        self._spans = _packed(self._bounds, seqlen) if whole else _cut(len(self._tokens), seqlen)
        self._orders: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def _numbers(self, first: int, count: int) -> list[int]:
        """Windows number ``first, ...`` of an endless series of epochs, each in an order of its own."""
        found = []
        for k in range(first, first + count):
            epoch, place = divmod(k, len(self))
            orders = self._orders
            if epoch not in orders:
                orders.pop(epoch - 2, None)
                generator = torch.Generator().manual_seed(self.seed + epoch)
                orders[epoch] = torch.randperm(len(self), generator=generator)
            found.append(int(orders[epoch][place]))
        return found

    def count(self, first: int, count: int) -> int:
        """Labels that count in so many windows of the series from ``first`` on."""
        return sum(int((self._labels(*self._spans[n]) != IGNORE).sum()) for n in self._numbers(first, count))

    def _labels(self, begin: int, end: int) -> np.ndarray:
        tokens, learned, bounds = self._tokens, self._learned, self._bounds
        labels = np.full(end - begin, IGNORE, dtype=np.int64)
        following = tokens[begin + 1 : end + 1]  # one less at the end of the stream
        labels[: len(following)] = following
        if learned is not None:
            labels[: len(following)][~learned[begin + 1 : end + 1]] = IGNORE
        if self.separate:
            starts = bounds[np.searchsorted(bounds, begin, "right") : np.searchsorted(bounds, end, "right")]
            labels[starts - 1 - begin] = IGNORE
        return labels

    def _borders(self, begin: int, end: int) -> list[int]:
        """Ends of the documents' pieces within a window, and of its padding."""
        bounds = self._bounds
        inside = bounds[np.searchsorted(bounds, begin, "right") : np.searchsorted(bounds, end, "left")] - begin
        return [*inside.tolist(), end - begin, *([self.seqlen] if end - begin < self.seqlen else [])]

    def batch(self, first: int) -> Batch:
        """``batch_size`` windows of the series from number ``first`` on."""
        ids = torch.zeros(self.batch_size, self.seqlen, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        borders, places = [0], []
        for row, number in enumerate(self._numbers(first, self.batch_size)):
            begin, end = self._spans[number]
            ids[row, : end - begin] = torch.from_numpy(self._tokens[begin:end].astype(np.int64))
            labels[row, : end - begin] = torch.from_numpy(self._labels(begin, end))
            if self.separate:
                borders += [row * self.seqlen + x for x in self._borders(begin, end)]
            if self.pose_context is not None:
                seed = self.seed * 1_000_003 + first + row
                places.append(positions(self.seqlen, self.pose_context, self.pose_chunks, seed))
        if self.separate:
            return Batch(ids.view(1, -1), labels.view(1, -1), tuple(borders), None)
        return Batch(ids, labels, None, torch.stack(places) if places else None)


def _cut(tokens: int, seqlen: int) -> list[tuple[int, int]]:
    """``[begin, end)`` of windows of inputs; the last token is a label only."""
    return [(a, min(a + seqlen, tokens - 1)) for a in range(0, tokens - 1, seqlen)]


def _packed(bounds: np.ndarray, seqlen: int) -> list[tuple[int, int]]:
    """Windows of whole documents, in order, each as full as it can be."""
    spans, begin = [], 0
    for number, (a, b) in enumerate(itertools.pairwise(bounds.tolist())):
        if b - a > seqlen:
            raise ValueError(
                f"expected conversations of at most --seq-length {seqlen} tokens, got {b - a} in conversation {number}"
            )
        if b - begin > seqlen:
            spans.append((begin, a))
            begin = a
    spans.append((begin, int(bounds[-1])))
    return spans
