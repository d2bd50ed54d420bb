"""What a forward depends on besides its arguments, so that it can run again later as it ran first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


class Surroundings:
    """Autocast and, if ``random`` is set, the states of the random number generators, as they are now."""

    def __init__(self, device: torch.device, random: bool):
        self.device = device
        kind = device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._states = [torch.get_rng_state()] if random else []
        if random and kind == "cuda":
            self._states.append(torch.cuda.get_rng_state(device))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Without its cache: a weight that was cast while no gradients were computed would get none later."""
        enabled, dtype = self._autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was; the generators go on afterwards as if nothing had been."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            if self._states:
                cuda = [self.device] if len(self._states) > 1 else []
                stack.enter_context(torch.random.fork_rng(devices=cuda))
                torch.set_rng_state(self._states[0])
                for state in self._states[1:]:
                    torch.cuda.set_rng_state(state, self.device)
            yield


def gather(module: nn.Module) -> None:
    """The weights of a module that FSDP2 wraps are there; it lets go of them after the module's own backward."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.unshard()
