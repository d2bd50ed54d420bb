"""What both losses do before and around their rows: check, agree with other ranks, count tokens, exchange."""

from __future__ import annotations

import collections
import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..comm import P2P, Group, group_name, peers
from ..kernels import accumulator_dtype
from . import reference
from .options import Options, check_options

Tensor = torch.Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "reference")


@functools.cache
def choose_rows(backend: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The rows' backend. "auto": Triton's kernels on GPUs that they serve, else plain torch. ValueError if the one
    asked for by name cannot serve: it is never replaced by another."""
    if backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return reference.ReferenceRows()
    from . import triton

    reason = triton.refuses(device, dtype)
    if reason is None:
        return triton.TritonRows()
    if backend == "triton":
        raise ValueError(f"expected a backend that can serve this call, got 'triton': {reason}")
    return reference.ReferenceRows()


def check_floats(name: str, x: Tensor, least: int) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"expected {name} in bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.dim() < least:
        raise ValueError(f"expected {name} of at least {least} dimensions, got shape {list(x.shape)}")


def check_labels_like(name: str, x: Tensor, labels: Tensor) -> None:
    """``labels: x.shape[:-1]``, integers, on the same device."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"expected labels of an integer dtype, got {labels.dtype}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"expected labels of the shape of {name} without its last dimension, {list(x.shape[:-1])}, "
            f"got {list(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"expected labels on the device of {name}, {x.device}, got {labels.device}")


_AS_IT_IS = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products and sums in the dtypes that are asked for; costs nothing where autocast is off anyway."""
    if not torch.is_autocast_enabled(device.type):
        return _AS_IT_IS
    return torch.autocast(device.type, enabled=False)


def refuse_double_backward(kind: str) -> None:
    """To be called in backward, where gradients are enabled only with create_graph=True: gradients that look constant
    would be wrong in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"expected create_graph=False: {kind} can be differentiated once only")


@dataclass(frozen=True)
class Slice:
    """Which words of the vocabulary this rank has, and who has the others."""

    start: int
    columns: tuple[int, ...]
    """Words per rank of the tensor-parallel group."""
    group: dist.ProcessGroup | None

    def merge(self, statistics: Tensor) -> Tensor:
        """Statistics over the whole vocabulary from those of this rank's columns: one all-gather."""
        if self.group is None:
            return statistics
        parts = statistics.new_empty(len(self.columns), *statistics.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), statistics.contiguous(), group=self.group)
        return reference.merge(parts, list(self.columns))

    def sum_(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


@dataclass(frozen=True)
class Setup:
    """A call that has been checked. ``tokens``-long tensors are flat."""

    options: Options
    reduction: str
    rows: Any
    slice: Slice
    target: Tensor
    live: Tensor
    """See :class:`seqpar_attn.loss.reference.Labels`."""
    factor: Tensor
    """One number: what the sum of the losses is multiplied by."""
    weight: Tensor
    """``live * factor``."""
    verdict: Verdict

    def scaled(self, upstream: Tensor) -> Tensor:
        """Per-token weights ``live * upstream``, 0 for ignored tokens even where ``upstream`` is not finite."""
        return torch.where(self.live == 0, 0.0, self.live * upstream)

    def loss(self, statistics: Tensor) -> Tensor:
        if self.reduction == "none":
            return self.rows.losses(statistics, self.live, self.options)
        return self.rows.loss(statistics, self.live, self.options, self.factor)


def prepare(
    kind: str,
    x: Tensor,
    labels: Tensor,
    vocab: int,
    error: ValueError | None,
    *,
    options: dict[str, Any],
    reduction: str,
    grad_reduction: str,
    group: Group,
    tp_group: Group,
    vocab_size: int | None,
    backend: str,
    check_labels: bool,
    fields: dict[str, object],
) -> Setup:
    """``x``: hidden states or logits; ``vocab``: this rank's words; ``error``: what is wrong with the tensors already;
    ``fields``: what the ranks of ``tp_group`` have to agree on beside the usual.

    Every rank of the groups raises if one does, before anything is computed.
    """
    if group is not None and reduction != "mean":
        raise ValueError(f"expected group only with reduction 'mean', got reduction {reduction!r}")
    if reduction == "mean" and tp_group is not None and group is None:
        raise ValueError(
            "expected group with tp_group and reduction 'mean' (the ranks that have other tokens; LoopbackGroup(1) if "
            "there are none), got None"
        )
    tp = _peers("tp_group", tp_group, x.device) if tp_group is not None else None
    peers = _peers("group", group, x.device) if reduction == "mean" else None
    if vocab_size is None:
        vocab_size = vocab * (tp.world_size if tp else 1)
        fields = {"vocabulary slice": vocab} | fields
    chosen = None
    try:
        if error is not None:
            raise error
        made = Options(vocab_size, **options)
        check_options(made, reduction, grad_reduction)
        chosen = choose_rows(backend, x.device, x.dtype)
        piece = _slice(vocab, vocab_size, tp)
    except ValueError as complaint:
        error = complaint
    if tp is not None or peers is not None:
        common: dict[str, object] = {"loss": kind, "reduction": reduction, "grad_reduction": grad_reduction}
        if tp is not None:
            tp_fields = {"tokens": tuple(labels.shape), "dtype": x.dtype, **fields, "vocab_size": vocab_size, **options}
            error = _agree(tp, common | tp_fields, error)
        if peers is not None:
            error = _agree(peers, common, error)
    if error is not None:
        raise error
    assert chosen is not None
    flat = labels if labels.dim() == 1 else labels.reshape(-1)
    wide = accumulator_dtype(x.dtype)
    known = chosen.labels(flat, made, piece.start, vocab, wide)
    if peers is not None:
        dist.all_reduce(known.counts, group=peers.group)
    if reduction == "mean":
        times = peers.world_size if peers is not None and grad_reduction == "mean" else 1
        factor, weight = chosen.weights(known.live, known.counts, times)
    else:
        factor, weight = torch.ones((), dtype=wide, device=x.device), known.live
    return Setup(
        options=made,
        reduction=reduction,
        rows=chosen,
        slice=piece,
        target=known.target,
        live=known.live,
        factor=factor,
        weight=weight,
        verdict=Verdict(known.counts if check_labels else None, flat, made),
    )


def _peers(name: str, group: Group, device: torch.device) -> P2P | None:
    """The ranks of a group of several processes; None for one process."""
    comm = peers(group_name(group), device)
    if name == "tp_group" and not isinstance(comm, P2P) and comm.world_size > 1:
        raise ValueError(f"expected tp_group to be a group of processes, got {group!r}")
    return comm if isinstance(comm, P2P) and comm.world_size > 1 else None


def _slice(vocab: int, vocab_size: int, tp: P2P | None) -> Slice:
    world, rank = (tp.world_size, tp.rank) if tp is not None else (1, 0)
    share = -(-vocab_size // world)
    columns = tuple(max(0, min(share, vocab_size - r * share)) for r in range(world))
    if columns[rank] != vocab:
        raise ValueError(
            f"expected {columns[rank]} words on rank {rank} of {world} (a vocabulary of {vocab_size} in slices of "
            f"{share}), got {vocab}"
        )
    return Slice(rank * share, columns, tp.group if tp is not None else None)


def _agree(comm: P2P, fields: dict[str, object], error: ValueError | None) -> ValueError | None:
    """Compare with the other ranks, and tell them what is wrong here; what any of them says, if anything is."""
    try:
        comm.agree(fields if error is None else {}, error)
    except ValueError as complaint:
        return complaint
    return error


_spare: dict[torch.device, list[tuple[Tensor, torch.cuda.Event]]] = collections.defaultdict(list)
"""Pinned memory and events of calls that have been read: making them takes as long as a launch."""


class Verdict:
    """Whether all labels are in range, found by the device and read once per call.

    On a GPU the answer is copied to pinned memory as soon as the labels are known, and read (:meth:`read`) after all of
    the loss's work is queued: the host then waits for what was queued *before* the loss, while the device still has the
    loss itself to do, so it does not run dry.
    """

    def __init__(self, counts: Tensor | None, labels: Tensor, options: Options) -> None:
        self._labels, self._options = labels, options
        self._counts: Tensor | None = counts
        self._event: torch.cuda.Event | None = None
        self._device = labels.device
        if counts is None:
            return
        if counts.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # a graph's replays cannot be asked
                self._counts = None
                return
            spare = _spare[counts.device]
            try:
                self._counts, self._event = spare.pop()
            except IndexError:
                self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                self._event = torch.cuda.Event()
            self._counts.copy_(counts, non_blocking=True)
            self._event.record(torch.cuda.current_stream(counts.device))
        else:
            self.read()

    def read(self) -> None:
        """ValueError if a label of this rank, or of another in its group, is out of range."""
        if self._counts is None:
            return
        if self._event is not None:
            self._event.synchronize()
        number = int(self._counts[1])
        if self._event is not None:
            _spare[self._device].append((self._counts, self._event))
        self._counts = self._event = None
        if not number:
            return
        labels, vocab_size = self._labels.long(), self._options.vocab_size
        wrong = labels[(labels != self._options.ignore_index) & ((labels < 0) | (labels >= vocab_size))]
        where = (
            f"{wrong[0].item()} ({len(wrong)} such labels)" if len(wrong) else f"{number} such labels on other ranks"
        )
        raise ValueError(
            f"expected labels in [0, {vocab_size}) or ignore_index {self._options.ignore_index}, got {where}"
        )
