"""The one mask: every query attends one contiguous interval of global key positions.

Query at position i sees the keys ``[lo(i), hi(i))``; lo and hi never decrease with i. Causal masks, sliding windows
and packed documents are all of this form, so areas (numbers of attended pairs) have a closed form and a schedule can
drop what is empty. Standard library only: this module knows integers, not tensors.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass


class MaskKind(enum.Enum):
    """What a kernel has to do about the mask of one block of attention."""

    __hash__ = object.__hash__  # members are single objects; enum's own hash is Python code

    FULL = "full"
    """Every query sees every key."""
    CAUSAL = "causal"
    """Query i of the block sees the keys j <= i + offset."""
    INTERVAL = "interval"
    """Query i of the block sees the keys lo[i] <= j < hi[i]."""


@dataclass(frozen=True)
class Span:
    """Positions ``start, start + stride, ...`` (``length`` of them) of the global sequence."""

    start: int
    length: int
    stride: int = 1

    def index_of(self, position: int) -> int:
        """Number of positions of the span that lie before ``position``."""
        return min(max(-((self.start - position) // self.stride), 0), self.length)

    def position(self, index: int) -> int:
        return self.start + index * self.stride

    def followed_by(self, other: Span) -> bool:
        """Whether ``other`` continues this span without a gap."""
        return other.stride == self.stride and other.start == self.position(self.length)


def pairs_up_to(q_first: int, q_end: int, k_first: int, k_end: int, shift: int) -> int:
    """Number of pairs (i, j), i in [q_first, q_end), j in [k_first, k_end), with j <= i + shift."""
    keys = k_end - k_first
    if keys <= 0 or q_end <= q_first:
        return 0
    # Query i sees clamp(i + shift + 1 - k_first, 0, keys) keys: first none, then a ramp 1, 2, ..., then all of them.
    ramp_first = min(max(k_first - shift, q_first), q_end)
    ramp_end = min(max(k_end - shift, q_first), q_end)
    low, high = ramp_first + shift + 1 - k_first, ramp_end + shift - k_first
    return (low + high) * (ramp_end - ramp_first) // 2 + keys * (q_end - ramp_end)


@dataclass(frozen=True)
class Mask:
    """Which keys each query of a sequence of ``seqlen`` tokens attends.

    ``window_size`` counts the keys a query sees, itself included, and needs ``causal``. ``cu_seqlens`` are the global
    document boundaries ``0 = c_0 <= c_1 <= ... <= c_n = seqlen``: no query sees another document.
    """

    seqlen: int
    causal: bool = True
    window_size: int | None = None
    cu_seqlens: tuple[int, ...] | None = None

    def interval(self, position: int) -> tuple[int, int]:
        """The keys ``[lo, hi)`` that the query at ``position`` attends."""
        lo, hi = 0, self.seqlen
        if self.cu_seqlens is not None:
            document = bisect.bisect_right(self.cu_seqlens, position) - 1
            lo, hi = self.cu_seqlens[document], self.cu_seqlens[document + 1]
        if self.causal:
            hi = position + 1
        if self.window_size is not None:
            lo = max(lo, position - self.window_size + 1)
        return lo, hi

    def _documents(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The documents that have positions in ``[first, end)``."""
        assert self.cu_seqlens is not None
        index = max(bisect.bisect_right(self.cu_seqlens, first) - 1, 0)
        while index + 1 < len(self.cu_seqlens) and self.cu_seqlens[index] < end:
            if self.cu_seqlens[index + 1] > self.cu_seqlens[index]:
                yield self.cu_seqlens[index], self.cu_seqlens[index + 1]
            index += 1

    def area(self, query: Span, key: Span) -> int:
        """Number of attended (query, key) pairs between two spans of the same stride."""
        if not query.length or not key.length:
            return 0
        if self.cu_seqlens is None:
            return self._area(query, key, 0, query.length, 0, key.length)
        total = 0
        for document, document_end in self._documents(query.start, query.position(query.length - 1) + 1):
            q_first, q_end = query.index_of(document), query.index_of(document_end)
            total += self._area(query, key, q_first, q_end, key.index_of(document), key.index_of(document_end))
        return total

    def _area(self, query: Span, key: Span, q_first: int, q_end: int, k_first: int, k_end: int) -> int:
        """Pairs within one document, given as index ranges of the spans."""
        if not self.causal:
            return (q_end - q_first) * (k_end - k_first)
        area = pairs_up_to(q_first, q_end, k_first, k_end, (query.start - key.start) // query.stride)
        if self.window_size is not None:
            too_old = (query.start - key.start - self.window_size) // query.stride
            area -= pairs_up_to(q_first, q_end, k_first, k_end, too_old)
        return area
