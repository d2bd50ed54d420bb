"""From a part of the tokens with all heads to all tokens with a part of the heads, and back: Ulysses' all-to-all.

Rank w of ``world_size`` gets the query heads ``w * n ... (w + 1) * n`` with ``n = nheads / world_size``, and what key
heads these read. Few key heads go to several ranks each, in *copies*; should a rank's query heads not divide evenly
among its key heads, it gets some of them twice. Either way the copies, in rank order, are ``copies`` of head 0, then
of head 1 and so on, equally many per head, so their gradients are added by one sum over neighbours.

A process may hold several ranks (a LoopbackGroup) and, in a grid, several groups of them (*rows*). Tokens lie in a
tensor as ``[batch, rows * local ranks * shard, nheads, headdim]``; with whole rows, the local ranks stand in the batch:
``[local ranks * batch, rows * row length, heads, headdim]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .comm import Communicator, Message
from .layout import Contiguous, Layout


def key_copies(nheads: int, nheads_kv: int, world_size: int) -> int:
    """To how many slots each key head goes. ``nheads`` is a multiple of both others."""
    readers = nheads // nheads_kv
    return readers // math.gcd(readers, nheads // world_size)


def _heads_of(x: torch.Tensor, rank: int, slots: int, copies: int) -> torch.Tensor:
    """The heads (dimension -2) that ``rank`` gets, one per slot."""
    first, last = rank * slots // copies, ((rank + 1) * slots - 1) // copies
    if last - first + 1 == slots:
        return x[..., first : last + 1, :]
    index = torch.arange(rank * slots, (rank + 1) * slots, device=x.device) // copies
    return x.index_select(-2, index)


def to_heads(
    tensors: Sequence[tuple[torch.Tensor, int]], comm: Communicator, layout: Layout, rows: int
) -> list[torch.Tensor]:
    """Pairs ``(x, copies)``, ``x: [b, tokens, nheads, d]``, to ``[local * b, rows * row length, slots, d]`` in one
    exchange. ``layout`` says which tokens of a row a rank holds; the result is in the order of the sequence."""
    local, world_size = comm.local_ranks, comm.world_size
    sends: list[list[Message]] = [[] for _ in local]
    receives: list[list[Message]] = [[] for _ in local]
    results = []
    for x, copies in tensors:
        batch, tokens, nheads, headdim = x.shape
        shard, slots = tokens // (rows * len(local)), nheads * copies // world_size
        x = torch.unflatten(x, 1, (rows, len(local), shard))
        parts = x.new_empty(len(local), world_size, batch, rows, shard, slots, headdim)
        for i, rank in enumerate(local):
            for peer in range(world_size):
                part = _heads_of(x[:, :, i], peer, slots, copies)
                if peer == rank:
                    parts[i, rank].copy_(part)
                else:
                    sends[i].append((peer, part.contiguous()))
                    receives[i].append((peer, parts[i, peer]))
        results.append(parts)
    comm.exchange(sends, receives).wait()
    whole = [[_in_order(x, layout) for x in parts] for parts in results]
    return [torch.cat(rows_of) if len(local) > 1 else rows_of[0] for rows_of in whole]


def _in_order(parts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[ranks, b, rows, shard, slots, d]`` to ``[b, rows * row length, slots, d]``. Without a copy, if it can be."""
    if isinstance(layout, Contiguous):
        return parts.movedim(0, 2).flatten(1, 3)
    return layout.unshard(parts.unbind(), 2).flatten(1, 2)


def to_tokens(
    tensors: Sequence[tuple[torch.Tensor, int]], comm: Communicator, layout: Layout, rows: int
) -> list[torch.Tensor]:
    """Inverse of :func:`to_heads`; the copies of a head are added up, in the dtype that they have."""
    local, world_size = comm.local_ranks, comm.world_size
    sends: list[list[Message]] = [[] for _ in local]
    receives: list[list[Message]] = [[] for _ in local]
    received = []
    for x, _ in tensors:
        x = torch.unflatten(torch.unflatten(x, 0, (len(local), -1)), 2, (rows, x.shape[1] // rows))
        _, batch, _, length, slots, headdim = x.shape
        parts = x.new_empty(len(local), world_size, batch, rows, length // world_size, slots, headdim)
        for i, rank in enumerate(local):
            for peer in range(world_size):
                part = layout.shard(x[i], peer, 2)
                if peer == rank:
                    parts[i, rank].copy_(part)
                else:
                    sends[i].append((peer, part))
                    receives[i].append((peer, parts[i, peer]))
        received.append(parts)
    comm.exchange(sends, receives).wait()
    results = []
    for parts, (_, copies) in zip(received, tensors):
        # [local, ranks, b, rows, shard, slots, d] -> [b, rows, local, shard, ranks, slots, d]
        x = parts.permute(2, 3, 0, 4, 1, 5, 6).flatten(1, 3).flatten(2, 3)
        if copies > 1:
            x = torch.unflatten(x, 2, (-1, copies)).sum(3)
        results.append(x.contiguous())
    return results
