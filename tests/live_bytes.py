"""Bytes that tensors take on the CPU, from torch's own record of its allocator, for the tests of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _ExperimentalConfig

from seqpar_attn import autograd, kernels
from seqpar_attn.testing.still import Idle, Still


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes allocated at a time during ``function()``, beyond those before it.

    It must free what it allocates, and nothing else: the record knows blocks by their addresses, only while it runs.
    """
    options = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    activities = {ProfilerActivity.CPU}
    # Not torch.profiler.profile, which makes objects of all operators at the end: that takes longer than the step.
    torch.autograd._prepare_profiler(options, activities)
    torch.autograd._enable_profiler(options, activities)
    try:
        function()
    finally:
        found = torch.autograd._disable_profiler()
    live = most = 0
    events = [x for x in found.events() if x.name() == "[memory]"]
    for event in sorted(events, key=lambda x: x.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def idle_attention(monkeypatch: Any, world_size: int) -> None:
    """Attention of one rank of ``world_size``, with all its buffers and without what it computes."""
    monkeypatch.setattr(autograd, "communicator", lambda name, device: Still(world_size, [world_size // 2]))
    monkeypatch.setattr(kernels, "resolve", lambda *args, **kwargs: Idle())
