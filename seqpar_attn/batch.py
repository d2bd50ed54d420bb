"""Batches of tokens for sequence parallelism: labels shifted before they are cut, explicit padding, positions.

Everything that depends on a token's neighbour (its label, its place in its document) is computed on the whole
sequence; only then is it sharded, so no shard border can lose a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout import Layout, holds_all, layout_for, resolve_group


@dataclass(frozen=True, eq=False)
class ShardedBatch:
    """One rank's part of a batch (for a LoopbackGroup: the parts of all ranks, concatenated in rank order)."""

    input_ids: torch.Tensor
    """``[batch, seqlen / world_size]``, dtype as given."""
    labels: torch.Tensor
    """Shape of ``input_ids``, int64: what to predict *at* each position, or ``ignore_index``. Do not shift again."""
    position_ids: torch.Tensor
    """Shape of ``input_ids``, int64: as given; else in the document where ``cu_seqlens`` was given, or the sequence."""
    cu_seqlens: tuple[int, ...] | None
    """Global document boundaries, the padding being the last document; None if there is neither."""
    seqlen: int
    """Global sequence length, padding included."""
    num_valid: int
    """Labels that count, over the whole batch and all ranks: what to divide a sum of per-token losses by."""
    rank: int
    world_size: int


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A batch of a length that divides. Tensors ``[batch, seqlen]``."""

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    cu_seqlens: tuple[int, ...] | None


def pad_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    *,
    multiple: int,
    ignore_index: int = -100,
    pad_token_id: int = 0,
) -> PaddedBatch:
    """Pad a batch at the end of its sequence to a multiple of ``multiple`` (see ``Layout.multiple``).

    Labels of the padding are ``ignore_index``. The padding becomes a document of its own in ``cu_seqlens`` (which is
    ``(0, seqlen, padded)`` if none was given): causal attention of real tokens never sees what lies at the end
    anyway and needs no ``cu_seqlens`` for it, any other attention does. Nothing is copied if the length divides.
    Raises ValueError on tensors that are not integer ``[batch, seqlen]`` of one shape, and on bad ``cu_seqlens``.
    """
    if multiple < 1:
        raise ValueError(f"expected multiple >= 1, got {multiple}")
    boundaries = _checked(input_ids, labels, cu_seqlens)
    seqlen = input_ids.shape[1]
    padding = -seqlen % multiple
    if not padding:
        return PaddedBatch(input_ids, labels, boundaries)
    boundaries = (*(boundaries or (0, seqlen)), seqlen + padding)
    input_ids = torch.nn.functional.pad(input_ids, (0, padding), value=pad_token_id)
    if labels is not None:
        labels = torch.nn.functional.pad(labels, (0, padding), value=ignore_index)
    return PaddedBatch(input_ids, labels, boundaries)


def shard_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    *,
    layout: str | Layout = "zigzag",
    group: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    ignore_index: int = -100,
    pad_token_id: int = 0,
    shift_labels: bool = True,
    position_ids: torch.Tensor | None = None,
) -> ShardedBatch:
    """This rank's part of a batch that every rank holds whole.

    Args:
        input_ids: integer ``[batch, seqlen]``, any length: padded at the end as :func:`pad_batch` does.
        labels: integer, same shape, *unshifted* as Hugging Face passes them (a copy of ``input_ids`` with
            ``ignore_index`` where nothing is to be learned). Default: ``input_ids`` itself.
        cu_seqlens: document boundaries ``0 = c_0 <= ... <= c_n = seqlen`` of a packed sequence, the same for every row.
        layout: "zigzag", "contiguous", "striped", "zigzag/2" (a grid's, two ranks to a Ulysses group) or a
            :class:`~seqpar_attn.layout.Layout`.
        group: as for ``ring_attention`` or ``usp_attention``; or pass ``rank`` and ``world_size`` instead.
        shift_labels: the label at position i becomes that of token i + 1, and the last token of every document gets
            ``ignore_index``. False: ``labels`` already say what to predict at each position.
        position_ids: integer, same shape as ``input_ids``: positions with gaps, say, for rotary embeddings. They mean
            nothing to attention. Default: counted, see :class:`ShardedBatch`.

    Raises ValueError for tensors that are not integer ``[batch, seqlen]`` of one shape, boundaries that are not
    sorted from 0 to the length, and ranks out of range. Counting the labels waits for a device that holds them.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"expected both rank and world_size or neither, got rank={rank}, world_size={world_size}")
    loopback = group is not None and holds_all(group)
    if rank is None or world_size is None:
        rank, world_size, _ = resolve_group(group)
    elif group is not None:
        raise ValueError("expected either group or rank and world_size, got both")
    layout = layout_for(layout, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size {world_size}, got {rank}")
    if labels is None and not shift_labels:
        raise ValueError("expected labels with shift_labels=False, got None")

    documents = _checked(input_ids, labels, cu_seqlens, position_ids)
    targets = (input_ids if labels is None else labels).long()
    if shift_labels:
        targets = _shifted(targets, documents, ignore_index)
    padded = pad_batch(
        input_ids, targets, documents, multiple=layout.multiple, ignore_index=ignore_index, pad_token_id=pad_token_id
    )
    assert padded.labels is not None
    seqlen = padded.input_ids.shape[1]
    positions = torch.arange(seqlen, device=input_ids.device)
    if position_ids is not None:
        positions = torch.nn.functional.pad(position_ids.long(), (0, seqlen - position_ids.shape[1]))
    elif documents is not None:
        starts = torch.tensor(padded.cu_seqlens, device=input_ids.device)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]

    def mine(x: torch.Tensor) -> torch.Tensor:
        return layout.shard_all(x) if loopback else layout.shard(x, rank)

    return ShardedBatch(
        input_ids=mine(padded.input_ids),
        labels=mine(padded.labels),
        position_ids=mine(positions.expand(input_ids.shape[0], seqlen)),
        cu_seqlens=padded.cu_seqlens,
        seqlen=seqlen,
        num_valid=int((padded.labels != ignore_index).sum()),
        rank=rank,
        world_size=world_size,
    )


def _shifted(labels: torch.Tensor, documents: tuple[int, ...] | None, ignore_index: int) -> torch.Tensor:
    """The label of the next token at every position; ``ignore_index`` where the next token is another document's."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    if documents is not None:
        last = torch.tensor([end - 1 for end in documents if end > 0], device=labels.device)
        shifted = shifted.index_fill(1, last, ignore_index)
    return shifted


def _checked(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None,
    cu_seqlens: Sequence[int] | torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
) -> tuple[int, ...] | None:
    """Raise ValueError unless the arguments fit together; ``cu_seqlens`` as a tuple."""
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"expected input_ids of shape [batch, seqlen >= 1], got {list(input_ids.shape)}")
    for name, x in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
        if x is not None and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise ValueError(f"expected {name} of an integer dtype, got {x.dtype}")
        if x is not None and x.shape != input_ids.shape:
            raise ValueError(f"expected {name} of the shape of input_ids {list(input_ids.shape)}, got {list(x.shape)}")
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            shape = list(cu_seqlens.shape)
            raise ValueError(f"expected integer cu_seqlens of shape [documents + 1], got {cu_seqlens.dtype} {shape}")
        cu_seqlens = cu_seqlens.tolist()
    boundaries = tuple(int(c) for c in cu_seqlens)
    seqlen = input_ids.shape[1]
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != seqlen or list(boundaries) != sorted(boundaries):
        raise ValueError(f"expected cu_seqlens sorted from 0 to seqlen {seqlen}, got {_shown(boundaries)}")
    return boundaries


def _shown(boundaries: tuple[int, ...]) -> str:
    if len(boundaries) <= 8:
        return str(boundaries)
    return f"({', '.join(map(str, boundaries[:4]))}, ..., {', '.join(map(str, boundaries[-3:]))})"
