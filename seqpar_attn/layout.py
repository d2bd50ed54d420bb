"""Which global positions each rank holds, and what follows from it: shards, positions, labels, padding.

A layout cuts a global sequence of ``seqlen`` tokens into the shards of ``world_size`` ranks, all of one length. It
knows integers and tensors, nothing of attention: :class:`Zigzag` balances causal masks in two chunks per rank,
:class:`Contiguous` keeps neighbours together, :class:`Striped` deals tokens out like cards, and :class:`Nested` cuts
the shards of one of these once more, for a grid of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .mask import Span


def _take(x: torch.Tensor, span: Span, dim: int) -> torch.Tensor:
    """The tokens of a span: a view."""
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(span.start, span.start + span.length * span.stride, span.stride)
    return x[tuple(index)]


@dataclass(frozen=True)
class Layout(ABC):
    """What every layout can do. Subclasses say where the tokens lie (:meth:`chunks`), everything else follows."""

    world_size: int
    _name: ClassVar[str]
    _factor: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"expected world_size >= 1, got {self.world_size}")

    @property
    def name(self) -> str:
        """What :func:`get_layout` knows it by."""
        return self._name

    @property
    def multiple(self) -> int:
        """The number that the global sequence length must be divisible by."""
        return self._factor * self.world_size

    @abstractmethod
    def _spans(self, rank: int, n: int) -> tuple[Span, ...]:
        """The spans of ``rank`` when every shard has ``n`` tokens."""

    def chunks(self, seqlen: int) -> tuple[tuple[Span, ...], ...]:
        """Per rank the spans it holds, in the order of its shard's memory.

        Every rank has the same number of spans; rank r's are chunks ``r * len(spans) + i``.
        """
        n = self.shard_length(seqlen)
        return tuple(self._spans(rank, n) for rank in range(self.world_size))

    def shard_length(self, seqlen: int) -> int:
        """Tokens per rank. Raises ValueError where ``seqlen`` does not divide."""
        if seqlen < 0 or seqlen % self.multiple:
            factor = self.multiple // self.world_size
            how = f"{factor} x world_size {self.world_size}" if factor > 1 else f"world_size {self.multiple}"
            raise ValueError(
                f"expected seqlen divisible by {self.multiple} ({how}) for layout {self.name!r}, got {seqlen}; "
                "pad with pad_batch"
            )
        return seqlen // self.world_size

    def positions(self, rank: int, seqlen: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Global positions of the tokens of ``rank``'s shard: int64 ``[seqlen / world_size]``."""
        spans = self._spans(self._checked(rank), self.shard_length(seqlen))
        parts = [torch.arange(s.length, device=device) * s.stride + s.start for s in spans]
        return torch.cat(parts)

    def permutation(self, seqlen: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions of all shards in rank order, int64 ``[seqlen]``: ``shard_all(x) == x.index_select(dim, it)``."""
        return torch.cat([self.positions(rank, seqlen, device) for rank in range(self.world_size)])

    def inverse(self, seqlen: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Where each global position lies in the concatenated shards, int64 ``[seqlen]``."""
        permutation = self.permutation(seqlen, device)
        return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(seqlen, device=device))

    def shard(self, x: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """The shard of ``rank`` of a tensor that holds the whole sequence along ``dim``. Contiguous, differentiable."""
        spans = self._spans(self._checked(rank), self.shard_length(x.shape[dim]))
        return torch.cat([_take(x, span, dim) for span in spans], dim).contiguous()

    def shard_all(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The shards of all ranks, concatenated in rank order: what the virtual ranks of a LoopbackGroup hold."""
        chunks = self.chunks(x.shape[dim])
        return torch.cat([_take(x, span, dim) for spans in chunks for span in spans], dim).contiguous()

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """Inverse of :meth:`shard`: the whole sequence from the shards of all ranks in rank order. Differentiable."""
        if len(shards) != self.world_size:
            raise ValueError(f"expected {self.world_size} shards (one per rank), got {len(shards)}")
        lengths = [x.shape[dim] for x in shards]
        if len(set(lengths)) > 1:
            raise ValueError(f"expected shards of one length along dim {dim}, got {lengths}")
        return self._join(shards, self.chunks(sum(lengths)), dim)

    def _join(self, shards: Sequence[torch.Tensor], chunks: tuple[tuple[Span, ...], ...], dim: int) -> torch.Tensor:
        pieces: list[tuple[int, torch.Tensor]] = []
        for x, spans in zip(shards, chunks, strict=True):
            offset = 0
            for span in spans:
                pieces.append((span.start, x.narrow(dim, offset, span.length)))
                offset += span.length
        return torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])], dim)

    def unshard_all(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Inverse of :meth:`shard_all`."""
        n = self.shard_length(x.shape[dim])
        return self.unshard([x.narrow(dim, rank * n, n) for rank in range(self.world_size)], dim)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"expected 0 <= rank < world_size {self.world_size}, got {rank}")
        return rank


@dataclass(frozen=True)
class Zigzag(Layout):
    """``2 * world_size`` equal chunks; rank r holds an early one, r, and the mirrored late one, 2W-1-r."""

    _name: ClassVar[str] = "zigzag"
    _factor: ClassVar[int] = 2

    def _spans(self, rank: int, n: int) -> tuple[Span, ...]:
        half = n // 2
        return Span(rank * half, half), Span((2 * self.world_size - 1 - rank) * half, half)


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th part of the sequence, as two spans so that a schedule can give half of it away."""

    _name: ClassVar[str] = "contiguous"

    def _spans(self, rank: int, n: int) -> tuple[Span, ...]:
        first = n - n // 2
        return Span(rank * n, first), Span(rank * n + first, n // 2)


@dataclass(frozen=True)
class Striped(Layout):
    """Rank r holds the positions r, r + W, r + 2W, ..."""

    _name: ClassVar[str] = "striped"

    def _spans(self, rank: int, n: int) -> tuple[Span, ...]:
        return (Span(rank, n, self.world_size),)

    def _join(self, shards: Sequence[torch.Tensor], chunks: tuple[tuple[Span, ...], ...], dim: int) -> torch.Tensor:
        dim = dim % shards[0].dim()
        return torch.stack(list(shards), dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Nested(Layout):
    """A layout's shards, each cut again into ``parts`` consecutive parts: what USP's grid of ranks holds.

    Rank ``r * parts + u`` holds part u of the shard that rank r of ``world_size / parts`` ranks has in the layout
    ``outer``. Its name is "outer/parts", such as "zigzag/2".
    """

    outer: str
    parts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or self.world_size % self.parts:
            raise ValueError(
                f"expected a number of parts that divides world_size {self.world_size}, got layout {self.name!r}"
            )

    @property
    def name(self) -> str:
        return f"{self.outer}/{self.parts}"

    @property
    def whole(self) -> Layout:
        """The layout that is cut, over fewer ranks."""
        return get_layout(self.outer, self.world_size // self.parts)

    @property
    def multiple(self) -> int:
        return math.lcm(self.whole.multiple, self.world_size)

    def _spans(self, rank: int, n: int) -> tuple[Span, ...]:
        row, part = divmod(rank, self.parts)
        begin, end = part * n, (part + 1) * n
        spans, offset = [], 0
        for span in self.whole._spans(row, n * self.parts):
            first = min(max(begin - offset, 0), span.length)
            last = min(max(end - offset, 0), span.length)
            spans.append(Span(span.start + first * span.stride, last - first, span.stride))  # may be empty
            offset += span.length
        return tuple(spans)

    def _join(self, shards: Sequence[torch.Tensor], chunks: tuple[tuple[Span, ...], ...], dim: int) -> torch.Tensor:
        rows = [torch.cat(list(shards[i : i + self.parts]), dim) for i in range(0, self.world_size, self.parts)]
        return self.whole.unshard(rows, dim)


_LAYOUTS: dict[str, type[Layout]] = {kind._name: kind for kind in (Zigzag, Contiguous, Striped)}


def get_layout(name: str, world_size: int) -> Layout:
    """The layout called ``name`` for ``world_size`` ranks: "zigzag", "contiguous" or "striped", or one of these with a
    number of parts, "zigzag/2", see :class:`Nested`."""
    outer, slash, parts = str(name).partition("/")
    if outer not in _LAYOUTS or (slash and not parts.isdecimal()):
        raise ValueError(f"expected one of {sorted(_LAYOUTS)} as layout, got {name!r}")
    return Nested(world_size, outer, int(parts)) if slash else _LAYOUTS[outer](world_size)


def grid_of(group: Any) -> tuple[Any, Any] | None:
    """The two groups ``(ring, ulysses)`` of a grid of ranks, a two-dimensional DeviceMesh or a pair of groups; None for
    another group. In a mesh the second dimension is Ulysses'."""
    if isinstance(group, tuple) and len(group) == 2:
        return group
    if getattr(group, "ndim", 1) == 2 and hasattr(group, "get_group"):
        return group.get_group(0), group.get_group(1)
    return None


def resolve_group(group: Any) -> tuple[int, int, dist.ProcessGroup | None]:
    """``(rank, world_size, process group)`` of what the package takes as ``group``.

    A ProcessGroup, a one-dimensional DeviceMesh, None (the default group if there is one, else a single rank) or a
    LoopbackGroup; the last one and a single rank have no process group. Nor has a grid (see :func:`grid_of`), whose
    ranks count along its second dimension first.
    """
    grid = grid_of(group)
    if grid is not None:
        (row, rows, _), (column, columns, _) = (resolve_group(part) for part in grid)
        return row * columns + column, rows * columns, None
    if getattr(group, "is_loopback", False):
        return 0, int(group.world_size), None
    if hasattr(group, "get_group"):  # a DeviceMesh; raises on its own if it has several dimensions
        group = group.get_group()
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1, None
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("expected a group that this process is a member of, got one that it is not in")
    return rank, dist.get_world_size(group), group


def holds_all(group: Any) -> bool:
    """Whether this process holds the shards of all ranks, virtual ones (a LoopbackGroup, or a pair of them)."""
    grid = grid_of(group)
    return all(holds_all(part) for part in grid) if grid is not None else bool(getattr(group, "is_loopback", False))


class _Gather(torch.autograd.Function):
    """All-gather and unshard; the gradient is summed over the ranks and every rank keeps its own shard of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.layout, ctx.group, ctx.dim = layout, group, dim
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(layout.world_size)]
        dist.all_gather(shards, x.contiguous(), group=group)
        return layout.unshard(shards, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shards = [ctx.layout.shard(grad, rank, ctx.dim) for rank in range(ctx.layout.world_size)]
        mine = torch.empty_like(shards[0])
        dist.reduce_scatter(mine, shards, group=ctx.group)
        return mine, None, None, None


def gather(x_local: torch.Tensor, layout: str | Layout, group: Any = None, dim: int = 1) -> torch.Tensor:
    """The whole sequence on every rank, from the shards of all ranks: for evaluation and tests.

    ``x_local`` is this rank's shard along ``dim`` (for a LoopbackGroup: all shards concatenated), of one shape and
    dtype on all ranks. For a grid of ranks (a two-dimensional DeviceMesh or a pair of groups, see
    :func:`seqpar_attn.usp_attention`) the layout is a :class:`Nested` one.

    Differentiable with the convention of ``torch.distributed.nn.functional.all_gather``: what is differentiated is the
    *sum over ranks* of their losses, so the gradients that the ranks have for the gathered tensor are added up. If
    every rank computes the same loss from it, divide that loss by the world size.
    """
    _, world_size, process_group = resolve_group(group)
    layout = layout_for(layout, world_size)
    grid = grid_of(group)
    if grid is not None and not holds_all(group):
        ring, ulysses = grid
        parts = resolve_group(ulysses)[1]
        if not isinstance(layout, Nested) or layout.parts != parts:
            raise ValueError(f"expected a layout such as 'zigzag/{parts}' for this grid of ranks, got {layout.name!r}")
        return gather(gather(x_local, "contiguous", ulysses, dim), layout.whole, ring, dim)
    if process_group is None:
        return layout.unshard_all(x_local, dim)
    layout.shard_length(x_local.shape[dim] * world_size)
    apply: Callable[..., torch.Tensor] = _Gather.apply  # torch does not type it
    return apply(x_local, layout, process_group, dim)


def layout_for(layout: str | Layout, world_size: int) -> Layout:
    if isinstance(layout, str):
        return get_layout(layout, world_size)
    if layout.world_size != world_size:
        raise ValueError(f"expected a layout for world_size {world_size} (the group's), got {layout}")
    return layout
