"""Calls of the C interface with little host time: a struct is filled once per geometry, a call adds the addresses.

A geometry is everything but the addresses: shapes, strides, dtype and options.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tape import Place, recording
from .library import load
from .structs import Strides

_MOST_PLANS = 4096


@dataclass(frozen=True)
class Plan:
    """A filled struct without its addresses."""

    name: str
    function: Any
    words: Any
    """The struct as an array of 64-bit words."""
    slots: tuple[int, ...]
    """Which words are the addresses of the arrays, in their order."""
    counter: int | None
    """The word for the address of zeroed ints, and"""
    counters: int = 0
    """how many of them, and"""
    shared_by: str = ""
    """which launches use the same ones, one after the other."""


_plans: dict[Hashable, Plan] = {}


def strides(x: torch.Tensor | None) -> Strides:
    """Of ``[batch, seqlen, nheads, headdim]``, with or without parts in front."""
    if x is None:
        return Strides()
    *part, batch, seq, head, _ = x.stride()
    return Strides(part[0] if part else 0, batch, seq, head)


def make_plan(name: str, struct: ctypes.Structure, fields: Sequence[str], counters: str = "") -> Plan:
    """``fields``: those of the arrays' addresses; a dot leads into a nested struct. ``counters``: a name for those
    launches that leave each other zeroed ints, as many as the library says."""
    library = load()
    function = getattr(library, f"seqpar_attn_{name}")
    count = ctypes.sizeof(struct) // 8
    assert ctypes.sizeof(struct) == 8 * count
    words = (ctypes.c_uint64 * count).from_buffer_copy(struct)
    slots = tuple(_word(type(struct), field) for field in fields)
    if not counters:
        return Plan(name, function, words, slots, None)
    most = getattr(library, f"seqpar_attn_{name}_counters")(ctypes.byref(struct))
    return Plan(name, function, words, slots, _word(type(struct), "counter") if most else None, most, counters)


def _word(struct: Any, field: str) -> int:
    outer, _, inner = field.partition(".")
    offset = getattr(struct, outer).offset
    if inner:
        offset += getattr(dict(struct._fields_)[outer], inner).offset
    assert offset % 8 == 0
    return int(offset // 8)


def launch(
    name: str,
    options: Hashable,
    arrays: Sequence[torch.Tensor | None],
    new_plan: Callable[[], Plan],
) -> None:
    """Call ``seqpar_attn_<name>`` on the current stream.

    ``options``, the shapes of the first two arrays, the dtype of the first and the strides of all must determine the
    plan.
    """
    first, second = arrays[0], arrays[1]
    assert first is not None and second is not None
    key = (
        name, options, first.shape, second.shape, first.dtype, first.device.index,
        *[x if x is None else x.stride() for x in arrays],
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = new_plan()
    _call(plan, first.device.index, [0 if x is None else x.data_ptr() for x in arrays])
    tape = recording()
    if tape is not None:
        tape.append(_Replay(plan, first.device.index, [tape.place(x) for x in arrays]))


class _Replay:
    """A call as a tape keeps it: with a struct of its own, for one thread plays a tape at a time."""

    __slots__ = ("device", "function", "moving", "plan", "struct", "words")

    def __init__(self, plan: Plan, device: int, places: Sequence[Place]) -> None:
        self.function, self.device = plan.function, device
        self.words = type(plan.words).from_buffer_copy(plan.words)
        self.struct = ctypes.addressof(self.words)
        self.moving = []
        """(word, base, bytes after its start) of the addresses that change."""
        for slot, (base, offset) in zip(plan.slots, places):
            if base < 0:
                self.words[slot] = offset
            else:
                self.moving.append((slot, base, offset))
        self.plan = plan

    def __call__(self, addresses: Sequence[int]) -> None:
        words, device = self.words, self.device
        for slot, base, offset in self.moving:
            words[slot] = addresses[base] + offset
        stream = torch._C._cuda_getCurrentRawStream(device)
        plan = self.plan
        if plan.counter is not None:
            words[plan.counter] = _zeroed(device, stream, plan)
        code = self.function(self.struct, stream)
        if code:
            raise _error(code)


def _call(plan: Plan, device: int, addresses: Sequence[int]) -> None:
    words = type(plan.words).from_buffer_copy(plan.words)  # another thread may be at the same geometry
    for slot, address in zip(plan.slots, addresses):
        words[slot] = address
    stream = torch._C._cuda_getCurrentRawStream(device)
    if plan.counter is not None:
        words[plan.counter] = _zeroed(device, stream, plan)
    code = plan.function(words, stream)
    if code:
        raise _error(code)


def _error(code: int) -> RuntimeError:
    return RuntimeError(f"libseqpar_attn: {load().seqpar_attn_error(code).decode()} (code {code})")


_counters: dict[tuple[int, int, str], tuple[torch.Tensor, int, int]] = {}
"""Per device, stream and kind of launch: ints, how many, and their address."""


def _zeroed(device: int, stream: int, plan: Plan) -> int:
    """Address of zeroed ints that no other launch in flight uses: launches on one stream follow each other, and each
    leaves to the next of its kind what that expects zeroed."""
    count = plan.counters
    if torch.cuda.is_current_stream_capturing():
        # A graph may run at the same time as other work of this stream, so it gets its own, zeroed whenever it runs.
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device)).data_ptr()
    known = _counters.get((device, stream, plan.shared_by))
    if known is None or known[1] < count:
        size = max(count, 1024)
        ints = torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device))
        known = _counters[device, stream, plan.shared_by] = (ints, size, ints.data_ptr())
    return known[2]
