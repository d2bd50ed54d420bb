"""What a mask leaves of the blocks of a layout."""

from __future__ import annotations

from dataclasses import replace

from ..mask import Mask, MaskKind, Span, pairs_up_to
from .data import Block, Task


class Blocks:
    """Areas and mask kinds of blocks, for one layout and mask."""

    def __init__(self, mask: Mask, spans: tuple[tuple[Span, ...], ...]):
        self.mask = mask
        self.span = [span for rank in spans for span in rank]
        self._areas: dict[tuple[int, int], int] = {}

    def area(self, query: int, key: int) -> int:
        pair = (query, key)
        if pair not in self._areas:
            self._areas[pair] = self.mask.area(self.span[query], self.span[key])
        return self._areas[pair]

    def prune(self, query: Block, key: Block) -> tuple[Block, Block] | None:
        """The smallest sub-blocks that hold every non-empty pair; None when there is none."""
        pairs = [(i, j) for i in query.chunks for j in key.chunks if self.area(i, j)]
        if not pairs:
            return None
        q_used, k_used = {i for i, _ in pairs}, {j for _, j in pairs}
        q_chunks = tuple(i for i in query.chunks if min(q_used) <= i <= max(q_used))
        k_chunks = tuple(j for j in key.chunks if min(k_used) <= j <= max(k_used))
        return Block(query.owner, q_chunks), Block(key.owner, k_chunks)

    def _joined(self, block: Block) -> Span | None:
        """The block as one span, if its chunks follow each other in the sequence."""
        whole = self.span[block.chunks[0]]
        for chunk in block.chunks[1:]:
            if not whole.followed_by(self.span[chunk]):
                return None
            whole = replace(whole, length=whole.length + self.span[chunk].length)
        return whole

    def task(self, query: Block, key: Block) -> Task:
        area = sum(self.area(i, j) for i in query.chunks for j in key.chunks)
        seqlen_q, seqlen_k = (sum(self.span[c].length for c in block.chunks) for block in (query, key))
        if area == seqlen_q * seqlen_k:
            return Task(query, key, MaskKind.FULL, 0, area)
        # The mask allows no more than causality does, so an equal area means the same set of pairs.
        if self.mask.causal:
            joined_q, joined_k = self._joined(query), self._joined(key)
            offset = None
            if query.chunks == key.chunks:
                offset = 0
            elif joined_q is not None and joined_k is not None:
                offset = (joined_q.start - joined_k.start) // joined_q.stride
            if offset is not None and area == pairs_up_to(0, seqlen_q, 0, seqlen_k, offset):
                return Task(query, key, MaskKind.CAUSAL, offset, area)
        return Task(query, key, MaskKind.INTERVAL, 0, area)
