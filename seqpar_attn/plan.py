"""A call's plan: its schedules, and the masks of its blocks on a device. Remembered, so layers share it."""

from __future__ import annotations

import functools

import torch

from .kernels.base import FULL, BlockMask, interval_mask
from .layout import get_layout
from .mask import Mask, MaskKind
from .program import Program
from .schedule import Block, Schedule, Task, build_schedule
from .schedule.choice import has_own_work_last, owners_per_step


class Plan:
    """Schedules of one configuration, and the block masks that were asked for so far."""

    def __init__(
        self,
        method: str,
        transfer: str,
        layout: str,
        world_size: int,
        mask: Mask,
        owners: int,
        own_last: bool = False,
        ranks_per_host: int | None = None,
    ):
        spans = get_layout(layout, world_size).chunks(mask.seqlen)
        self.forward, self.backward = (
            build_schedule(
                method,
                spans,
                mask,
                backward=backward,
                transfer=transfer,
                owners_per_step=owners,
                own_last=own_last and backward,
                ranks_per_host=ranks_per_host,
            )
            for backward in (False, True)
        )
        self._masks: dict[tuple[int, torch.device], BlockMask] = {}
        self._shared: dict[tuple[Block, Block, torch.device], BlockMask] = {}
        self._programs: dict[tuple[bool, tuple[int, ...], bool], Program] = {}

    @functools.cached_property
    def kinds(self) -> frozenset[MaskKind]:
        """What a kernel must be able to mask, on any rank: every rank decides alike."""
        return frozenset(task.kind for row in self.forward.steps for step in row for task in step.tasks)

    def program(self, backward: bool, local_ranks: tuple[int, ...], alike: bool = False) -> Program:
        key = (backward, local_ranks, alike)
        if key not in self._programs:
            self._programs[key] = Program(self.backward if backward else self.forward, local_ranks, alike)
        return self._programs[key]

    def block_mask(self, task: Task, device: torch.device) -> BlockMask:
        """The mask of a task of this plan's schedules on a device."""
        if task.kind is MaskKind.FULL:
            return FULL
        quick = (id(task), device)  # tasks live as long as the plan; hashing one costs more than a step may
        mask = self._masks.get(quick)
        if mask is None:
            key = (task.query, task.key, device)
            if key not in self._shared:
                causal = task.kind is MaskKind.CAUSAL
                self._shared[key] = (
                    BlockMask(MaskKind.CAUSAL, task.offset) if causal else _interval(self.forward, task, device)
                )
            mask = self._masks[quick] = self._shared[key]
        return mask


_make_plan = functools.lru_cache(maxsize=32)(Plan)


def make_plan(
    method: str, transfer: str, layout: str, world_size: int, mask: Mask, ranks_per_host: int | None = None
) -> Plan:
    """The plan of a configuration; ValueError for unknown names, lengths and ranks per host that do not divide."""
    owners = owners_per_step(mask.seqlen // world_size)
    own_last = method == "ring" and has_own_work_last(layout, transfer, world_size, mask)
    return _make_plan(method, transfer, layout, world_size, mask, owners, own_last, ranks_per_host)


def _positions(schedule: Schedule, block: Block, device: torch.device) -> torch.Tensor:
    """Global positions of a block's tokens, int64."""
    spans = [schedule.span(chunk) for chunk in block.chunks]
    return torch.cat([torch.arange(s.length, device=device) * s.stride + s.start for s in spans])


def key_intervals(mask: Mask, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``Mask.interval`` for a vector of query positions: global ``(lo, hi)``, int64."""
    if mask.cu_seqlens is None:
        lo, hi = torch.zeros_like(positions), torch.full_like(positions, mask.seqlen)
    else:
        bounds = torch.tensor(mask.cu_seqlens, pin_memory=positions.is_cuda)
        bounds = bounds.to(positions.device, non_blocking=True)  # from pinned memory: the host does not wait
        document = torch.searchsorted(bounds, positions, right=True)
        lo, hi = bounds[document - 1], bounds[document]
    if mask.causal:
        hi = positions + 1
    if mask.window_size is not None:
        lo = torch.maximum(lo, positions - (mask.window_size - 1))
    return lo, hi


def _interval(schedule: Schedule, task: Task, device: torch.device) -> BlockMask:
    """A shard is sorted by position, so an interval of positions is an interval of the block's own key indices."""
    bounds = key_intervals(schedule.mask, _positions(schedule, task.query, device))
    spans = [schedule.span(chunk) for chunk in task.key.chunks]
    local = []
    for bound in bounds:
        before = [(-((s.start - bound) // s.stride)).clamp(0, s.length) for s in spans]
        local.append(torch.stack(before).sum(0))
    return interval_mask(local[0], local[1], schedule.length(task.key))
