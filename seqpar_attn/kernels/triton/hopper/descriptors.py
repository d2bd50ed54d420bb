"""How the Hopper kernels describe tensors to the copy engine."""

from __future__ import annotations

import functools
from typing import Any

from .adapter import TensorDescriptor, gl


@functools.cache
def box_layout(bits: int, rank: int) -> Any:
    """Of boxes in shared memory, whose rows are of at least 128 bytes: the one that tensor cores read."""
    return gl.NVMMASharedLayout(128, bits, rank)


def describe(tensor: Any, shape: list[int], strides: list[int], box: list[int]) -> Any:
    return TensorDescriptor(tensor, shape, strides, box, box_layout(8 * tensor.element_size(), len(box)))
