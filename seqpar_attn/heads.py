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
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .comm import Arena, Communicator, Cutter, Message, Shape, bytes_of, in_turn
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


class _Parts:
    """What a process's ranks get from every rank in one exchange: per tensor ``[local, ranks, ...]``.

    They lie in the arena where there is one, so that peers write them from where they have them; then they are there
    only as long as it is this call's turn.
    """

    def __init__(self, comm: Communicator, arena: Arena | None, shapes: Sequence[Shape], device: torch.device):
        self.comm, self.arena = comm, arena
        whole = [((len(comm.local_ranks), comm.world_size, *shape), dtype) for shape, dtype in shapes]
        if arena is None:
            self.tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in whole]
        else:
            cut = Cutter(arena.reserve(bytes_of(whole)))
            self.tensors = [cut(*shape) for shape in whole]

    def fill(self, part: Callable[[int, int, int], torch.Tensor], call: int | None) -> None:
        """``part(number, i, peer)``: what the local rank i has for ``peer`` of this tensor. ``call``: in a backward
        pass, the number of the forward call."""
        local = self.comm.local_ranks
        sends: list[list[Message]] = [[] for _ in local]
        receives: list[list[Message]] = [[] for _ in local]
        targets: list[list[Message]] = [[] for _ in local]
        for number, x in enumerate(self.tensors):
            if not x.numel():
                continue
            for i, rank in enumerate(local):
                for peer in range(self.comm.world_size):
                    if peer == rank:
                        x[i, rank].copy_(part(number, i, peer))
                        continue
                    sends[i].append((peer, part(number, i, peer)))
                    receives[i].append((peer, x[i, peer]))
                    targets[i].append((peer, x[i, rank]))
        self.comm.open(False)
        if not any(sends):
            return
        more: dict[str, Any] = {}
        if self.arena is not None:
            more = {"targets": targets, "where": "an exchange of heads", "call": call}
        self.comm.exchange(sends, receives, **more).wait()

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, made of these tensors, as one that stays when others use the arena."""
        if self.arena is None or x.untyped_storage().data_ptr() != self.tensors[0].untyped_storage().data_ptr():
            return x
        return x.clone(memory_format=torch.contiguous_format)


def to_heads(
    tensors: Sequence[tuple[torch.Tensor, int]],
    comm: Communicator,
    layout: Layout,
    rows: int,
    call: int | None = None,
) -> list[torch.Tensor]:
    """Pairs ``(x, copies)``, ``x: [b, tokens, nheads, d]``, to ``[local * b, rows * row length, slots, d]`` in one
    exchange. ``layout`` says which tokens of a row a rank holds; the result is in the order of the sequence.
    ``call``: in a backward pass, the number of the forward call."""
    local, world_size = len(comm.local_ranks), comm.world_size
    shards, shapes, all_slots = [], [], []
    for x, copies in tensors:
        batch, tokens, nheads, headdim = x.shape
        shard, slots = tokens // (rows * local), nheads * copies // world_size
        shards.append(torch.unflatten(x, 1, (rows, local, shard)))
        shapes.append(((batch, rows, shard, slots, headdim), x.dtype))
        all_slots.append((slots, copies))

    def exchange(arena: Arena | None) -> list[torch.Tensor]:
        parts = _Parts(comm, arena, shapes, tensors[0][0].device)
        parts.fill(lambda number, i, peer: _heads_of(shards[number][:, :, i], peer, *all_slots[number]), call)
        whole = [[parts.out(_in_order(x, layout)) for x in each] for each in parts.tensors]
        return [torch.cat(rows_of) if local > 1 else rows_of[0] for rows_of in whole]

    return in_turn(comm, exchange)


def _in_order(parts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[ranks, b, rows, shard, slots, d]`` to ``[b, rows * row length, slots, d]``. Without a copy, if it can be."""
    if isinstance(layout, Contiguous):
        return parts.movedim(0, 2).flatten(1, 3)
    return layout.unshard(parts.unbind(), 2).flatten(1, 2)


def to_tokens(
    tensors: Sequence[tuple[torch.Tensor, int]],
    comm: Communicator,
    layout: Layout,
    rows: int,
    call: int | None = None,
) -> list[torch.Tensor]:
    """Inverse of :func:`to_heads`; the copies of a head are added up, in the dtype that they have."""
    local, world_size = len(comm.local_ranks), comm.world_size
    whole, shapes = [], []
    for x, _ in tensors:
        x = torch.unflatten(torch.unflatten(x, 0, (local, -1)), 2, (rows, x.shape[1] // rows))
        _, batch, _, length, slots, headdim = x.shape
        whole.append(x)
        shapes.append(((batch, rows, length // world_size, slots, headdim), x.dtype))

    def exchange(arena: Arena | None) -> list[torch.Tensor]:
        parts = _Parts(comm, arena, shapes, tensors[0][0].device)
        parts.fill(lambda number, i, peer: layout.shard(whole[number][i], peer, 2), call)
        results = []
        for each, (_, copies) in zip(parts.tensors, tensors):
            # [local, ranks, b, rows, shard, slots, d] -> [b, rows, local, shard, ranks, slots, d]
            x = each.permute(2, 3, 0, 4, 1, 5, 6).flatten(1, 3).flatten(2, 3)
            if copies > 1:
                x = torch.unflatten(x, 2, (-1, copies)).sum(3)
            results.append(parts.out(x).contiguous())
        return results

    return in_turn(comm, exchange)
