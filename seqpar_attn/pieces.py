"""The tensors of a pass over a schedule, and the pieces of them that its program names.

What does not outlive a pass (accumulators, what travels) is made once per geometry, with every view of it. Only its
memory comes and goes, through torch's allocator, so under its rules for streams and graphs: a storage is resized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from .comm import Cutter, Shape, bytes_of
from .kernels.tape import Tape
from .program import Program
from .schedule import Kind

Tensors = Sequence[torch.Tensor]


def joined(tensors: Tensors) -> torch.Tensor:
    """Fields ``[..., b, s, h, d]`` that lie next to each other as one tensor ``[..., fields * b, s, h, d]``."""
    first, second, *_ = tensors
    shape, strides = list(first.shape), list(first.stride())
    apart = second.storage_offset() - first.storage_offset()
    assert shape[-4] in (1, apart / strides[-4]), "the fields are not like further batches of the first"
    strides[-4] = apart // shape[-4]
    shape[-4] *= len(tensors)
    return first.as_strided(shape, strides)


class Field(NamedTuple):
    """A tensor by its number, and its sequence dimension."""

    number: int
    dim: int


_TOGETHER = 256 << 20
"""Bytes up to which all that comes and goes is one storage: each costs the host some microseconds per pass, which long
passes have, and what is larger is better not asked of the allocator in one piece."""


class Pieces:
    """Tensors are numbered: those that are given, those that are returned (both new every time), then the scratch, of
    which neighbours that are alike lie next to each other.

    ``own[kind]``: which have the shards of the local ranks one after the other; ``travels[kind]``: those of them for
    which there are slots. Used by one pass at a time, between ``begin`` and ``end``. ``reserve`` gives so many bytes
    for slots to lie in, if they must lie somewhere; that memory stays.
    """

    def __init__(
        self,
        program: Program,
        given: Tensors,
        returned: Sequence[Shape],
        scratch: Sequence[Shape],
        own: dict[Kind, tuple[Field, ...]],
        travels: dict[Kind, tuple[Field, ...]],
        reserve: Callable[[int], torch.Tensor] | None = None,
    ):
        self.program, self.own, self.travels = program, own, travels
        self.device = given[0].device
        self.tensors: list[torch.Tensor] = []
        """Between ``begin`` and ``end``."""
        self.views: list[Tensors | None] = [None] * len(program.views)
        """None: pieces of what is given or returned, not made yet."""
        self._memory: list[tuple[Callable[[int], Any], int]] = []
        """What resizes a storage, and its bytes."""
        self._returned = returned
        self._shapes = [*((x.shape, x.dtype) for x in given), *returned, *scratch]
        # Not in inference mode, whose tensors nobody may write later outside of it, and without gradients.
        with torch.inference_mode(False), torch.no_grad():
            alike: list[Shape] = [([len([*same]), *shape], dtype) for (shape, dtype), same in groupby(scratch)]
            slots = [x for (_, kind), count in program.slots.items() for x in self._slot_shapes(kind, count)]
            cut = self._allocate(alike + (slots if reserve is None else []))
            self._scratch = [x for shape in alike for x in cut(*shape).unbind()]
            self._slots: dict[tuple[int, Kind], Tensors] = {}
            self._first_base: dict[tuple[int, Kind], int] = {}
            number = len(self._shapes)
            if reserve is not None:
                cut = Cutter(reserve(bytes_of(slots)))
            for key, count in program.slots.items():
                self._slots[key] = self._make_slots(key[1], count, cut)
                self._first_base[key] = number
                number += len(self._slots[key])
            for index in range(len(program.views)):
                self._make_own_view(index)
        self.foreign = [index for index, pieces in enumerate(self.views) if pieces is None]
        self._cuts = {index: self._how_to_cut(index) for index in self.foreign}
        self.end()

    def _allocate(self, shapes: Sequence[Shape]) -> Callable[[Sequence[int], torch.dtype], torch.Tensor]:
        """What makes these, one call for each in their order."""

        def memory(size: int) -> torch.Tensor:
            x = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._memory.append((x.untyped_storage().resize_, size))
            return x

        if bytes_of(shapes) <= _TOGETHER:
            return Cutter(memory(bytes_of(shapes)))
        return lambda *shape: Cutter(memory(bytes_of([shape])))(*shape)

    def _slot_shapes(self, kind: Kind, count: int) -> list[Shape]:
        """``[count, ...]`` shards per field that travels, or ``[count, fields, ...]`` if all are alike."""
        shapes: list[Shape] = []
        for number, dim in self.travels[kind]:
            shape, dtype = self._shapes[number]
            shapes.append(([*shape[:dim], self.program.shard, *shape[dim + 1 :]], dtype))
        (shape, dtype), fields = shapes[0], len(shapes)
        if fields > 1 and shapes == fields * shapes[:1]:
            return [([count, fields, *shape], dtype)]
        return [([count, *shape], dtype) for shape, dtype in shapes]

    def _make_slots(self, kind: Kind, count: int, cut: Callable[..., torch.Tensor]) -> Tensors:
        """``[count, ...]`` shards per field that travels; those of a slot next to each other if all are alike."""
        made = [cut(*shape) for shape in self._slot_shapes(kind, count)]
        return made if len(made) == len(self.travels[kind]) else made[0].unbind(1)

    def _make_own_view(self, index: int) -> None:
        """Of slots, with their number as first dimension if there are several, or of the scratch."""
        local, kind, slot, start, length, slots = self.program.views[index]
        if slot is None:
            numbers = [number - len(self._shapes) + len(self._scratch) for number, _ in self.own[kind]]
            if min(numbers) < 0:
                return
            parts = [(self._scratch[number], dim) for number, (_, dim) in zip(numbers, self.own[kind])]
        else:
            parts = [
                (x[slot], dim) if slots == 1 else (x[slot : slot + slots], dim + 1)
                for x, (_, dim) in zip(self._slots[local, kind], self.travels[kind])
            ]
        self.views[index] = [x if length == x.shape[dim] else x.narrow(dim, start, length) for x, dim in parts]

    def _how_to_cut(self, index: int) -> list[tuple[int, tuple[int, int, int] | None]]:
        """Numbers of tensors, and what to narrow them to."""
        _, kind, _, start, length, _ = self.program.views[index]
        return [(n, None if length == self._shapes[n][0][dim] else (dim, start, length)) for n, dim in self.own[kind]]

    def begin(self, given: Tensors) -> list[torch.Tensor]:
        """What is returned, not filled yet."""
        for resize, size in self._memory:
            resize(size)
        returned = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self._returned]
        self.tensors = [*given, *returned, *self._scratch]
        return returned

    def end(self) -> None:
        """Let go of what was given and returned and of the memory: what is behind this on the stream may use it."""
        for index in self.foreign:
            self.views[index] = None
        self.tensors = []
        for resize, _ in self._memory:
            resize(0)

    def view(self, index: int) -> Tensors:
        pieces = self.views[index]
        if pieces is None:
            tensors = self.tensors
            pieces = [tensors[n] if cut is None else tensors[n].narrow(*cut) for n, cut in self._cuts[index]]
            self.views[index] = pieces
        return pieces

    def _bases(self) -> list[torch.Tensor]:
        return [*self.tensors, *[x for stacks in self._slots.values() for x in stacks]]

    def addresses(self) -> list[int]:
        """Of the bases; the last one, number -1, for what stays where it is."""
        return [*[x.data_ptr() for x in self._bases()], 0]

    def locate(self, index: int, tensors: Tensors, tape: Tape) -> None:
        """Tell a tape that records of which bases these, pieces of a view's tensors, are pieces."""
        local, kind, slot, *_ = self.program.views[index]
        if slot is None:
            for x, (number, _) in zip(tensors, self.own[kind]):
                tape.locate(x, number, self.tensors[number])
            return
        for number, (x, start) in enumerate(zip(tensors, self._slots[local, kind]), self._first_base[local, kind]):
            tape.locate(x, number, start)
