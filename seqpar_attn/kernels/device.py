"""What launching needs to know of a device."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for an H100); 0 for what is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_HERE = contextlib.nullcontext()


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device; make that the tensor's without paying for it when it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
