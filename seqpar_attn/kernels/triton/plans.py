"""Launching with little host time: what depends only on shapes and strides is worked out once per geometry.

Triton's own launch path looks at every argument again on every call, 30 to 60 us for kernels with forty of them. A ring
calls the same few geometries over and over, so a call here is one dictionary look-up and one driver call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime import _allocation, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tape import Place, recording
from .config import Tile

_MOST_PLANS = 4096


@dataclass
class Plan:
    """One kernel for one geometry. Arguments: the arrays, ``numbers``, what changes per call, ``constants``."""

    programs: int
    numbers: tuple[int, ...]
    """Strides and sizes."""
    constants: dict[str, Any]
    """The ``tl.constexpr`` parameters, in the order of the signature."""
    tile: Tile
    boxes: dict[int, list[int]]
    """Which arrays are read through the copy engine, and in tiles of which shape."""
    needs_scratch: bool = False
    describe: Callable[[Any, list[int], list[int], list[int]], Any] = TensorDescriptor
    """``(tensor, shape, strides, box)`` -> what the kernel takes for a tensor that is read through the copy engine."""
    compiled: Any = None
    descriptors: tuple[tuple[int, list[int], list[int]], ...] = ()
    """Per box: the array, and its shape and strides as the copy engine wants them."""


_plans: dict[Hashable, Plan] = {}


def launch(
    kernel: Any,
    options: Hashable,
    arrays: Sequence[torch.Tensor | None],
    variables: tuple[float, ...],
    make_plan: Callable[[], Plan],
) -> None:
    """Launch ``kernel`` on the current stream.

    ``options``, the shapes of the first two arrays, the dtype of the first, and strides and alignments of all must
    determine the plan, and the shapes of what is read through the copy engine.
    """
    first, second = arrays[0], arrays[1]
    assert first is not None and second is not None
    device = first.device.index
    pointers: list[Any] = [0 if x is None else x.data_ptr() for x in arrays]
    key: tuple[Hashable, ...] = (
        id(kernel), device, options, first.shape, second.shape, first.dtype,
        *[x if x is None else x.stride() for x in arrays],
    )  # fmt: skip
    together = 0
    for pointer in pointers:
        together |= pointer
    if together & 15:  # mostly all are aligned, and then there is nothing to add
        key += tuple([pointer % 16 for pointer in pointers])
    plan = _plans.get(key)
    if plan is None:
        _compile(kernel, key, arrays, variables, make_plan())
    else:
        _run(plan, device, pointers, variables)
    tape = recording()
    if tape is not None:
        tape.append(_Replay(_plans[key], device, [tape.place(x) for x in arrays], variables))


def _run(plan: Plan, device: int, pointers: list[Any], variables: tuple[float, ...]) -> None:
    if plan.needs_scratch:
        _provide_scratch()
    for index, shape, strides in plan.descriptors:
        pointers[index] = _Descriptor(pointers[index], shape, strides)
    compiled = plan.compiled
    # The three None are Triton's launch hooks.
    compiled.run(
        plan.programs, 1, 1, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *pointers, *plan.numbers, *variables, *plan.constants.values(),
    )  # fmt: skip


class _Replay:
    """A launch as a tape keeps it."""

    __slots__ = ("device", "places", "plan", "variables")

    def __init__(self, plan: Plan, device: int, places: list[Place], variables: tuple[float, ...]) -> None:
        self.plan, self.device, self.places, self.variables = plan, device, places, variables

    def __call__(self, addresses: Sequence[int]) -> None:
        pointers = [addresses[base] + offset for base, offset in self.places]
        _run(self.plan, self.device, pointers, self.variables)


def _compile(
    kernel: Any, key: Hashable, arrays: Sequence[torch.Tensor | None], variables: tuple[float, ...], plan: Plan
) -> None:
    """Launch through Triton, which compiles if it has to, and remember the plan."""
    tile = plan.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.maxnreg is not None:
        options["maxnreg"] = tile.maxnreg
    if plan.needs_scratch:
        _provide_scratch()
    arguments: list[Any] = list(arrays)
    plan.descriptors = tuple((index, *_heads_first(arguments[index], len(box))) for index, box in plan.boxes.items())
    for index, shape, strides in plan.descriptors:
        arguments[index] = plan.describe(arguments[index], shape, strides, plan.boxes[index])
    plan.compiled = kernel[(plan.programs,)](*arguments, *plan.numbers, *variables, **plan.constants, **options)
    if plan.compiled is None:  # the interpreter
        return
    assert tuple(plan.constants) == tuple(kernel.arg_names[-len(plan.constants) :])
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan


def _heads_first(x: torch.Tensor, rank: int) -> tuple[list[int], list[int]]:
    """Shape and strides for the copy engine: ``[..., s, h, d]`` as ``[..., h, s, d]``; ``[b, h, s]`` as it is.

    Of rank 5, the first dimension counts parts: one part where the tensor has no such dimension.
    """
    shape, strides = list(x.shape), list(x.stride())
    if rank == 5 and len(shape) == 4:
        # Any stride serves a dimension of one, but the copy engine refuses 0.
        shape, strides = [1, *shape], [max(strides[0], 16), *strides]
    if rank > 3:
        shape[-3], shape[-2] = shape[-2], shape[-3]
        strides[-3], strides[-2] = strides[-2], strides[-3]
    return shape, strides


class _Descriptor:
    """What Triton's launcher reads of a ``TensorDescriptor``, without validating it again."""

    __slots__ = ("address", "padding", "shape", "strides")

    def __init__(self, address: int, shape: list[int], strides: list[int]) -> None:
        self.address, self.shape, self.strides, self.padding = address, shape, strides, "zero"

    @property
    def base(self) -> _Descriptor:
        return self

    def data_ptr(self) -> int:
        return self.address


def fits_tma(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can address these tensors: bases and strides in multiples of 16 bytes."""
    for x in tensors:
        bytes_per_element = x.element_size()
        if x.data_ptr() % 16 or any(stride * bytes_per_element % 16 for stride in x.stride()[:-1]):
            return False
    return True


def without_tma(tile: Tile) -> Tile:
    return tile.otherwise or replace(tile, tma=False, specialized=False)


def _provide_scratch() -> None:
    """Descriptors made on the device live in scratch memory that Triton asks of an allocator; a caller's own is kept.
    Triton keeps it per thread, so look every time (autograd runs backward in a thread of its own)."""
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


_scratch_buffers: dict[tuple[int, int | None], torch.Tensor] = {}


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """One buffer per stream: kernels of a stream run one after the other, and an allocation per launch is host time."""
    key = (torch.cuda.current_device(), stream)
    buffer = _scratch_buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _scratch_buffers[key] = torch.empty(max(size, 1 << 20), dtype=torch.int8, device="cuda")
    return buffer
