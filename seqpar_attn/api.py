"""The public functions: exact attention over a sequence that is split over the ranks of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .autograd import attention_backward_op, attention_op
from .comm import Group, LoopbackGroup, agree, communicator, find_ranks_per_host, group_name
from .intercept import Attention, attend
from .layout import grid_of
from .ulysses import ulysses_op
from .validation import as_boundaries

Grid = DeviceMesh | tuple[Group, Group]
"""Two groups of every rank: a mesh of the dimensions (ring, Ulysses), or these two groups."""

Boundaries = torch.Tensor | Sequence[int] | None


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    method: str,
    *,
    group: Group,
    layout: str,
    causal: bool,
    window_size: int | None,
    cu_seqlens: Boundaries,
    softcap: float | None,
    softmax_scale: float | None,
    backend: str,
    deterministic: bool,
    return_lse: bool,
    transfer: str,
    dropout_p: float,
    heads_group: Group = None,
    ranks_per_host: int | None = None,
) -> Any:
    """``heads_group``: for "ulysses" and "usp", the group that exchanges heads; ``group`` is then the ring."""
    exchanges = method in ("ulysses", "usp")
    names = [group_name(group)]
    if exchanges:
        names.insert(0, group_name(heads_group))
    error: ValueError | None = None
    bounds = None
    try:
        if dropout_p:
            raise ValueError(f"expected dropout_p=0: attention dropout is not supported, got {dropout_p!r}")
        if softmax_scale is None:
            if q.dim() != 4 or not q.shape[-1]:
                raise ValueError(f"expected q of shape [batch, seqlen, nheads, headdim], got {list(q.shape)}")
            softmax_scale = 1 / math.sqrt(q.shape[-1])
        if window_size is not None and (isinstance(window_size, bool) or not isinstance(window_size, int)):
            raise ValueError(f"expected window_size to be a positive int or None, got {window_size!r}")
        if ranks_per_host is not None and (isinstance(ranks_per_host, bool) or not isinstance(ranks_per_host, int)):
            raise ValueError(f"expected ranks_per_host to be a positive int or None, got {ranks_per_host!r}")
        if transfer == "double" and method == "ring" and ranks_per_host is None:
            ranks_per_host = find_ranks_per_host(names[0])
        bounds = as_boundaries(cu_seqlens)
    except ValueError as complaint:
        error = complaint
    if error is not None:
        # Tell the other ranks before raising: they wait for this one.
        agree([communicator(name, q.device) for name in names], {}, error)
        raise error
    rest = (
        *names,
        method,
        transfer,
        layout,
        causal,
        window_size,
        bounds,
        softcap,
        softmax_scale,
        backend,
        deterministic,
        ranks_per_host,
    )
    operator, gradients = (ulysses_op, None) if exchanges else (attention_op, attention_backward_op)
    results = attend(Attention(operator, gradients, rest, return_lse), q, k, v)
    return tuple(results[:2]) if return_lse else results[0]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Group = None,
    layout: str = "zigzag",
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Boundaries = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    transfer: str = "pull",
    ranks_per_host: int | None = None,
    dropout_p: float = 0.0,
) -> Any:
    """Exact attention of a sequence whose tokens are split over the ranks of ``group``, by ring attention.

    Every rank passes the queries, keys and values of its own tokens (its *shard*, see :mod:`seqpar_attn.layout`) and
    gets the attention output of its own tokens. Differentiable; the result and the gradients are those of one device
    that holds the whole sequence, and their error does not grow with the number of ranks, because partial results are
    carried in float32 through the kernels.

    Args:
        q: ``[batch, seqlen / world_size, nheads, headdim]``, bfloat16, float16, float32 or float64.
        k: ``[batch, seqlen / world_size, nheads_kv, headdim]``; ``nheads_kv`` divides ``nheads`` (GQA, MQA).
        v: as ``k``.
        group: a ProcessGroup, one dimension of a DeviceMesh, None (the default group; one rank without
            torch.distributed), or a :class:`LoopbackGroup` of virtual ranks, whose shards the tensors hold one after
            the other along ``seqlen``.
        layout: which tokens a rank holds: "zigzag" (balanced for causal masks), "contiguous" or "striped".
        causal: a query sees no later key.
        window_size: number of keys a query sees, itself included (flash-attn's left window + 1); needs ``causal``.
        cu_seqlens: document boundaries of the *global* packed sequence, ``[0, ..., seqlen]``; no query sees another
            document. Integers, best as a list or a CPU tensor (a CUDA tensor is copied to the host).
        softcap: scores s become ``softcap * tanh(s / softcap)``.
        softmax_scale: positive factor of the scores, by default ``1 / sqrt(headdim)``.
        backend: "auto" or a kernel's name, see ``python -m seqpar_attn info``. A name never falls back to another.
        deterministic: refuse backends whose gradients may differ from run to run.
        return_lse: also return the log-sum-exp of the scores, ``[batch, nheads, seqlen / world_size]``, natural
            logarithm, float32 (float64 for float64 inputs), differentiable.
        transfer: "pull" (every key block straight from its owner: least bytes), "ring" (from neighbour to neighbour),
            "all_gather", or "double" for several hosts: a ring of hosts around a ring of the ranks in each. A key block
            then crosses to a host once, not once per rank that reads it, while the ring inside turns, and so does the
            sum of a host's gradients for it; every adapter of a host carries its part.
        ranks_per_host: for "double", of ranks numbered host by host; it must divide the group's size. By default what
            torchrun's ``LOCAL_WORLD_SIZE`` says about this group.
        dropout_p: must be 0.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``.

    Raises:
        ValueError: on every rank, before anything moves, if any rank's input is wrong or two ranks differ.
        CommunicationError: a rank died or did not come within the group's timeout.

    Sources: Ring Attention (Liu, Zaharia, Abbeel 2023, arXiv 2310.01889); zigzag and striped layouts: Striped
    Attention (Brandon et al. 2023, arXiv 2311.09431) and the zigzag variant of ring-flash-attention; online softmax:
    FlashAttention-2 (Dao 2023, arXiv 2307.08691); "double": Double-Ring-Attention of LoongTrain (Gu et al. 2024, arXiv
    2406.18485) and the topology-aware ring of BurstEngine (Sun et al. 2025, arXiv 2509.19836), whose order of blocks it
    has; blocks are fetched from their owners and not handed on from host to host.
    """
    return _attention(
        q,
        k,
        v,
        "ring",
        group=group,
        layout=layout,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
        return_lse=return_lse,
        transfer=transfer,
        dropout_p=dropout_p,
        ranks_per_host=ranks_per_host,
    )


def dist_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Group = None,
    layout: str = "contiguous",
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Boundaries = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    transfer: str = "pull",
    dropout_p: float = 0.0,
) -> Any:
    """Exact attention over contiguous shards with DistFlashAttn's load balancing.

    Arguments, result and errors are those of :func:`ring_attention`, without transfer "double"; ``layout`` must be
    "contiguous", so tokens need no reordering. Ranks that have no earlier keys left help later ranks: they receive
    queries, attend their own keys and return a partial result. Every world size is balanced (odd ones and the last step
    of even ones included).

    Source: DistFlashAttn (Li et al. 2023, arXiv 2310.03294), the algorithm only.
    """
    return _attention(
        q,
        k,
        v,
        "dist_flash",
        group=group,
        layout=layout,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
        return_lse=return_lse,
        transfer=transfer,
        dropout_p=dropout_p,
    )


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Group = None,
    layout: str = "contiguous",
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Boundaries = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    dropout_p: float = 0.0,
) -> Any:
    """Exact attention of a sequence whose tokens are split over the ranks of ``group``, by exchanging heads.

    In one all-to-all every rank gives away the heads that are not its own and gets its own heads' queries, keys and
    values of all tokens; it attends them as one device would, and a second all-to-all brings the results home. Every
    layout is balanced, and any is right: the tokens are put in order before they are attended.

    Arguments, result and errors are those of :func:`ring_attention` (there is no ``transfer``), with one demand more:
    ``nheads`` must be divisible by the number of ranks. ``nheads_kv`` need not be: a key head goes to every rank whose
    query heads read it, and the gradients of such copies are added up in float32.

    Source: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509).
    """
    return _attention(
        q,
        k,
        v,
        "ulysses",
        group=LoopbackGroup(1),
        heads_group=group,
        layout=layout,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
        return_lse=return_lse,
        transfer="pull",
        dropout_p=dropout_p,
    )


def usp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Grid,
    layout: str = "zigzag",
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Boundaries = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    transfer: str = "pull",
    dropout_p: float = 0.0,
) -> Any:
    """Exact attention over a grid of ranks: Ulysses along one dimension, a ring along the other.

    The ranks of a Ulysses group (the second dimension: neighbours, with the fastest links) exchange heads for tokens,
    as in :func:`ulysses_attention`; then ranks with the same heads play a ring, as in :func:`ring_attention`. So more
    ranks can work together than there are heads, and only the ring's blocks cross the slower links.

    Which tokens a rank holds: ``layout`` splits the sequence over the R rows of the grid, and the U ranks of a row hold
    consecutive parts of its shard. As a layout for :func:`shard_batch`, :func:`gather` and positions that is called
    ``f"{layout}/{U}"``, "zigzag/2" for two ranks per row; they take the same ``group``. (Losses take the one group of
    all these ranks.)

    Args:
        q, k, v: this rank's shards, as for :func:`ring_attention`; ``nheads`` divisible by U.
        group: a DeviceMesh of two dimensions (ring, Ulysses), or the two groups ``(ring, ulysses)`` of this rank.
            Virtual ranks: ``(LoopbackGroup(R), LoopbackGroup(U))``; tensors hold the shards row by row.
        layout: of the ring: "zigzag", "contiguous" or "striped".
        transfer: of the ring, but not "double".

    The other arguments, the result and the errors are those of :func:`ring_attention`. Errors name the row first, then
    the rank in it.

    Source: USP (Fang, Zhao 2024, arXiv 2405.07719).
    """
    grid = grid_of(group)
    if grid is None:
        raise ValueError(f"expected a mesh of two dimensions (ring, Ulysses) or a pair of groups, got {group!r}")
    return _attention(
        q,
        k,
        v,
        "usp",
        group=grid[0],
        heads_group=grid[1],
        layout=layout,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
        return_lse=return_lse,
        transfer=transfer,
        dropout_p=dropout_p,
    )
