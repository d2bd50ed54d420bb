"""A token-wise function over tiles of the sequence, so that only one tile's intermediates exist at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor], tokens: int, random: bool = True
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``function`` on ``[..., seqlen, dim]``, ``tokens`` at a time; in the backward pass each tile is computed again.

    ``function`` must treat every token by itself, as a transformer's MLP does (the method of ALST, arXiv 2506.13996).
    ``random``: it may draw random numbers, and draws the same ones again.
    """

    @torch.compiler.disable  # the function may be compiled, once for all tiles of a length
    def call(hidden: torch.Tensor) -> torch.Tensor:
        tiles = hidden.split(tokens, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([function(x) for x in tiles], dim=-2)
        found = [checkpoint(function, x, use_reentrant=False, preserve_rng_state=random) for x in tiles]
        return torch.cat(found, dim=-2)

    return call
