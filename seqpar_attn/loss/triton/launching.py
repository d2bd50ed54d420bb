"""Launching the loss's kernels with little host time: a dictionary look-up and a driver call.

As :mod:`seqpar_attn.kernels.triton.plans`, for kernels that know a tensor by address alone: Triton's own launch path
looks at every argument again on every call, and a loss of small logits was done before the host had queued it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime import driver

_MOST_PLANS = 4096
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    arrays: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    variables: tuple[float, ...],
    constants: tuple[int, ...],
    num_warps: int = 4,
) -> None:
    """Launch ``kernel``, whose parameters come in this order, on the current stream of the current device, which is
    that of ``arrays``.

    ``numbers``: what Triton may compile a kernel for; each value is looked up. ``variables``: floats, and integers of
    32 bits that the kernel has in ``do_not_specialize``.
    """
    device = arrays[0].get_device()
    pointers = [x.data_ptr() for x in arrays]
    together = 0
    for pointer in pointers:
        together |= pointer
    # Mostly all are aligned, and then there is nothing to add.
    odd = tuple([pointer % 16 == 0 for pointer in pointers]) if together & 15 else ()
    key = (id(kernel), device, numbers, constants, num_warps, odd, *[x.dtype for x in arrays])
    compiled = _compiled.get(key)
    if compiled is not None:
        # The three None are Triton's launch hooks.
        compiled.run(
            programs, 1, 1, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *numbers, *variables, *constants,
        )  # fmt: skip
        return
    names = kernel.arg_names[-len(constants) :]
    compiled = kernel[(programs,)](*arrays, *numbers, *variables, **dict(zip(names, constants)), num_warps=num_warps)
    if compiled is None:  # the interpreter
        return
    # From now on they go by position.
    assert [p.is_constexpr for p in kernel.params].index(True) == len(kernel.params) - len(constants)
    if len(_compiled) >= _MOST_PLANS:
        _compiled.clear()
    _compiled[key] = compiled
