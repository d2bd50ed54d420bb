"""Attention of new tokens over keys and values that stay where a sharded prompt left them.

Every rank has the queries of the new tokens, and attends the keys that it holds itself; then the ranks exchange their
partial results, a head dimension and a log-sum-exp per query and head, and each merges them in the same order. Keys
never move. The prompt's keys lie in the layout of its prefill, without its padding; of the new tokens' keys the one at
position p is kept by rank ``(p - prompt length) % world_size``, so that all ranks grow alike.

Source: partial softmaxes merged by their log-sum-exp, FlashAttention-2 (Dao 2023, arXiv 2307.08691); keys split within
a device, too: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .comm import Communicator, Group, agree, group_name, peers
from .kernels import FULL, Kernel, accumulator_dtype, interval_mask, resolve
from .layout import get_layout, grid_of, holds_all, resolve_group
from .mask import MaskKind, Span
from .validation import Call, check_call, check_tensors

KEYS_PER_PART = 2048
"""One query has few rows of scores for a GPU to share out, so its keys are attended in parts of this many."""
_GROWTH = 256
"""Tokens by which full buffers grow."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""``out [batch, s, nheads, headdim]``, normalised over its own keys, ``lse [batch, nheads, s]``; accumulator dtype."""


Grid = tuple[Group, Group]


def communicators(group: Any, device: torch.device) -> list[Communicator]:
    """Of a group; of a grid (see :func:`seqpar_attn.usp_attention`) one per dimension, that within rows first."""
    grid = grid_of(group)
    return [peers(group_name(part), device) for part in ([group] if grid is None else [grid[1], grid[0]])]


class _Shard:
    """One rank's keys and values ``[batch, tokens, nheads_kv, headdim]`` of one layer, sorted by position."""

    def __init__(self, spans: list[Span], k: torch.Tensor, v: torch.Tensor, reserve: int):
        self.spans, self.tokens = spans, k.shape[1]
        self.buffers = [self._enlarged(x, reserve) for x in (k, v)]

    def _enlarged(self, x: torch.Tensor, more: int) -> torch.Tensor:
        buffer = x.new_empty(x.shape[0], self.tokens + more, *x.shape[2:])
        buffer[:, : self.tokens] = x[:, : self.tokens]
        return buffer

    def before(self, position: int) -> int:
        """How many of the tokens lie before ``position``: the index of the first that does not."""
        return sum(span.index_of(position) for span in self.spans)

    def append(self, new: Span, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.spans and self.spans[-1].followed_by(new):
            last = self.spans.pop()
            self.spans.append(Span(last.start, last.length + new.length, last.stride))
        else:
            self.spans.append(new)
        end = self.tokens + new.length
        if end > self.buffers[0].shape[1]:
            self.buffers = [self._enlarged(x, new.length + _GROWTH) for x in self.buffers]
        for buffer, x in zip(self.buffers, (k, v)):
            buffer[:, self.tokens : end] = x
        self.tokens = end


class ShardedKV:
    """Keys and values of one attention layer, over the ranks of a group: :meth:`store` once, then :meth:`attend`.

    Args:
        seqlen: tokens of the prompt, without padding; 0 if there is none.
        group: as for :func:`seqpar_attn.ring_attention` or, a grid, :func:`seqpar_attn.usp_attention`. With a
            LoopbackGroup, or a pair of them, this process holds all ranks' parts.
        layout: of the prompt's shards ("zigzag/2" for a grid with rows of two).
        reserve: new tokens to have room for; beyond them buffers are copied as they grow.

    Raises ValueError for an unknown layout, and lengths below 0.
    """

    def __init__(self, seqlen: int, *, group: Group | Grid | Any = None, layout: str = "zigzag", reserve: int = 0):
        if seqlen < 0 or reserve < 0:
            raise ValueError(f"expected seqlen >= 0 and reserve >= 0, got {seqlen} and {reserve}")
        rank, self.world_size, _ = resolve_group(group)
        self.group, self.prompt, self.seqlen = group, seqlen, seqlen
        self.ranks = tuple(range(self.world_size)) if holds_all(group) or self.world_size == 1 else (rank,)
        placed = get_layout(layout, self.world_size)
        self._padded = seqlen + -seqlen % placed.multiple
        self._spans = placed.chunks(self._padded)
        self._reserve = -(-reserve // self.world_size)
        self._shards: list[_Shard] = []
        self._window: int | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens' keys each rank of this process holds."""
        return tuple(shard.tokens for shard in self._shards)

    @property
    def stored(self) -> bool:
        """Whether :meth:`attend` can be called: the prompt's keys are here, or it has none."""
        return bool(self._shards) or not self.prompt

    def store(self, k: torch.Tensor, v: torch.Tensor, *, window_size: int | None = None) -> None:
        """Keep a copy of the prompt's keys and values, which the ranks have just attended as shards.

        Args:
            k, v: ``[batch, padded seqlen / world_size, nheads_kv, headdim]``; with a LoopbackGroup the shards one after
                the other. Padding at the sequence's end is left out.
            window_size: of the layer, if it has one: no key is kept that a later token does not see.

        Raises ValueError on every rank for another number of tokens on one, ranks that differ, and if there are keys
        already.
        """
        held = self._padded // self.world_size
        error: ValueError | None = None
        if k.shape != v.shape or k.dim() != 4 or k.shape[1] != held * len(self.ranks):
            expected = f"[batch, {held * len(self.ranks)}, nheads_kv, headdim]"
            error = ValueError(f"expected k and v of shape {expected}, got {list(k.shape)} and {list(v.shape)}")
        elif self.stored:
            error = ValueError(f"expected one store, of a prompt with tokens, got another or a prompt of {self.prompt}")
        elif window_size is not None and window_size < 1:
            error = ValueError(f"expected window_size to be a positive int or None, got {window_size!r}")
        fields: dict[str, object] = {"call": "ShardedKV.store", "k": tuple(k.shape), "dtype": k.dtype}
        fields |= {"prompt length": self.prompt, "window_size": window_size}
        agree(communicators(self.group, k.device), fields, error)
        self._window = window_size
        k, v = k.detach(), v.detach()
        first = 0 if window_size is None else max(self.seqlen - window_size + 1, 0)
        for i, rank in enumerate(self.ranks):
            spans = []
            for span in self._spans[rank]:
                lo, hi = span.index_of(first), span.index_of(self.seqlen)
                if hi > lo:
                    spans.append(Span(span.position(lo), hi - lo, span.stride))
            # Sorted by position, what is too old comes first and padding last.
            begin = i * held + sum(span.index_of(first) for span in self._spans[rank])
            own = slice(begin, begin + sum(span.length for span in spans))
            self._shards.append(_Shard(spans, k[:, own], v[:, own], self._reserve))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window_size: int | None = None,
        softcap: float | None = None,
        softmax_scale: float | None = None,
        backend: str = "auto",
    ) -> Partial:
        """Attention of new tokens, whose keys and values are then kept by the ranks in turns.

        Args:
            q: ``[batch, s, nheads, headdim]`` of the ``s`` tokens that follow all so far, the same on every rank.
            k, v: ``[batch, s, nheads_kv, headdim]`` likewise.
            window_size, softcap, softmax_scale, backend: as for :func:`seqpar_attn.ring_attention`; causal.

        Returns:
            ``out`` like ``q``, and ``lse [batch, nheads, s]`` in float32 (float64 for float64 inputs), the same bits on
            every rank. Not differentiable.

        Raises:
            ValueError: on every rank, before anything moves, if a rank's input is wrong or two ranks differ.
            CommunicationError: a rank died or did not come within the group's timeout.
        """
        comms = communicators(self.group, q.device)
        kinds = frozenset({MaskKind.FULL if q.dim() == 4 and q.shape[1] == 1 else MaskKind.INTERVAL})
        error: ValueError | None = None
        fields: dict[str, object] = {}
        try:
            check_tensors(q, k, v)
            softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
            check_call(
                Call("ring", "pull", "contiguous", True, window_size, None, softcap, softmax_scale, backend, False),
                self.seqlen,
            )
            self._check_fit(k, window_size)
            kernel = resolve(backend, q.device, q.dtype, q.shape[-1], kinds, softcap)
            fields = {
                "call": "ShardedKV.attend", "q": tuple(q.shape), "k": tuple(k.shape), "dtype": q.dtype,
                "prompt length": self.prompt, "window_size": window_size, "softcap": softcap,
                "softmax_scale": softmax_scale, "backend": kernel.name,
            }  # fmt: skip
        except ValueError as complaint:
            error = complaint
        agree(comms, fields, error)
        assert softmax_scale is not None
        position = self.seqlen
        self._append(k.detach(), v.detach())
        options = (position, window_size, softcap, softmax_scale, kernel)
        found = [self._partial(q.detach(), shard, *options) for shard in self._shards]
        out, lse = _merge(_from_all(comms, found, self.world_size))
        return out.to(q.dtype), lse

    def _check_fit(self, k: torch.Tensor, window_size: int | None) -> None:
        """Of new keys to what is here."""
        if not self.stored:
            raise ValueError(f"expected store before attend: the prompt has {self.prompt} tokens, got no keys of them")
        if not k.shape[1]:
            raise ValueError("expected at least one new token, got none")
        if self._window is not None and (window_size is None or window_size > self._window):
            raise ValueError(f"expected window_size <= {self._window}, for which keys were stored, got {window_size}")
        for shard in self._shards:
            known = shard.buffers[0]
            if (known.shape[0], *known.shape[2:]) != (k.shape[0], *k.shape[2:]) or known.dtype != k.dtype:
                raise ValueError(
                    f"expected k like the stored keys, [{known.shape[0]}, s, {known.shape[2]}, {known.shape[3]}] in "
                    f"{known.dtype}, got {list(k.shape)} in {k.dtype}"
                )

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if not self._shards:
            self._shards = [_Shard([], k[:, :0], v[:, :0], self._reserve) for _ in self.ranks]
        for rank, shard in zip(self.ranks, self._shards):
            first = (rank - (self.seqlen - self.prompt)) % self.world_size
            mine = k[:, first :: self.world_size], v[:, first :: self.world_size]
            if mine[0].shape[1]:
                shard.append(Span(self.seqlen + first, mine[0].shape[1], self.world_size), *mine)
        self.seqlen += k.shape[1]

    @staticmethod
    def _partial(
        q: torch.Tensor,
        shard: _Shard,
        position: int,
        window_size: int | None,
        softcap: float | None,
        softmax_scale: float,
        kernel: Kernel,
    ) -> Partial:
        """Attention over one rank's keys; the first query is at ``position``."""
        batch, s, nheads, headdim = q.shape
        first = [0 if window_size is None else shard.before(position + i - window_size + 1) for i in range(s)]
        end = [shard.before(position + i + 1) for i in range(s)]
        k, v = (x[:, first[0] : end[-1]] for x in shard.buffers)
        if not k.shape[1]:
            dtype = accumulator_dtype(q.dtype)
            return q.new_zeros(q.shape, dtype=dtype), q.new_full((batch, nheads, s), float("-inf"), dtype=dtype)
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap}
        if s > 1:
            bounds = torch.tensor([first, end], dtype=torch.int32) - first[0]
            key_lo, key_hi = bounds.to(q.device)
            mask = interval_mask(key_lo, key_hi, k.shape[1])
            out, lse = _outputs(q)
            kernel.forward(q, k, v, lse, out, None, mask, carry=False, **options)
            return out, lse
        # All query heads of a key head see the same keys: to the kernel they are so many queries of one head, so no
        # key is read twice.
        rows = q.reshape(batch, k.shape[2], -1, headdim).transpose(1, 2)
        parts = k.shape[1] // KEYS_PER_PART if batch == 1 else 0
        cut = parts * KEYS_PER_PART if parts > 1 else 0
        pieces = []
        if cut:
            some_k, some_v = (x[0, :cut].unflatten(0, (parts, KEYS_PER_PART)) for x in (k, v))
            every = rows.expand(parts, -1, -1, -1).contiguous()
            out, lse = _outputs(every)
            kernel.forward(every, some_k, some_v, lse, out, None, FULL, carry=False, **options)
            pieces += list(zip(out.split(1), lse.split(1)))
        if cut < k.shape[1]:
            out, lse = _outputs(rows)
            kernel.forward(rows, k[:, cut:], v[:, cut:], lse, out, None, FULL, carry=False, **options)
            pieces.append((out, lse))
        out, lse = _merge(pieces)
        return out.transpose(1, 2).reshape(q.shape), lse.reshape(batch, nheads, 1)


def _outputs(q: torch.Tensor) -> Partial:
    """Empty ``out`` and ``lse`` for these queries."""
    batch, s, nheads, headdim = q.shape
    dtype = accumulator_dtype(q.dtype)
    return q.new_empty(batch, s, nheads, headdim, dtype=dtype), q.new_empty(batch, nheads, s, dtype=dtype)


def _merge(partials: Sequence[Partial]) -> Partial:
    """One softmax from those over parts of its keys. A part without keys has lse -inf and no weight."""
    if len(partials) == 1:
        return partials[0]
    outs, lses = (torch.stack(x) for x in zip(*partials))
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - torch.where(lse == float("-inf"), 0.0, lse))
    return (weights.transpose(2, 3).unsqueeze(-1) * outs).sum(0), lse


def _from_all(comms: Sequence[Communicator], found: Sequence[Partial], world_size: int) -> list[Partial]:
    """The partial results of all ranks, in rank order; ``found`` are this process's."""
    if len(found) == world_size:
        return list(found)
    out, lse = found[0]
    packed = torch.cat([out, lse.transpose(1, 2).unsqueeze(-1)], -1)
    every = packed[None]
    for comm in comms:
        every = _gathered(comm, every).flatten(0, 1)
    return [(x[..., :-1], x[..., -1].transpose(1, 2)) for x in every]


def _gathered(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """``[world_size, *x.shape]``, of all ranks of one group."""
    rank = comm.local_ranks[0]
    every = x.new_empty(comm.world_size, *x.shape)
    every[rank] = x
    peers = [peer for peer in range(comm.world_size) if peer != rank]
    if peers:
        comm.exchange([[(peer, x) for peer in peers]], [[(peer, every[peer]) for peer in peers]]).wait()
    return every
