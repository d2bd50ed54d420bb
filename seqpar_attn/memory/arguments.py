"""What a decoder hands to its blocks besides hidden states, and the part of it that belongs to some tokens."""

from __future__ import annotations

from typing import Any

import torch

_NOT_CUT = ("cu_seqlens", "labels", "shift_labels", "cache_position")
"""What decoders pass down to their blocks although no block's tokens read it, and what is of the whole sequence."""


def _cut(x: torch.Tensor, dim: int, part: slice, tokens: int) -> torch.Tensor:
    return x if x.shape[dim] != tokens else x.narrow(dim, part.start, part.stop - part.start)


class Arguments:
    """Of a block that gets ``hidden: [batch, tokens, dim]``.

    What lies along the tokens is known by name, as Hugging Face's decoders call it: ``position_embeddings...``, tensors
    or tuples of them, ``[..., tokens, dim]``, and ``position_ids``, ``[..., tokens]``. Everything else goes to every
    tile as it is. ValueError for other tensors that seem to lie along the tokens, for a mask, and for tensors whose
    gradients would be lost.
    """

    def __init__(self, name: str, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.tokens, self.args, self.kwargs = tokens, args, kwargs
        named = [*((f"argument {i + 1}", x) for i, x in enumerate(args)), *kwargs.items()]
        for key, value in named:
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(x, torch.Tensor):
                    continue
                if x.requires_grad:
                    raise ValueError(
                        f"expected hidden states to be the only argument of {name} that needs a gradient with "
                        f"tile_block, got {key} of shape {list(x.shape)} that does"
                    )
                if tokens in x.shape and tokens > 1 and self._dim(key) is None and key not in _NOT_CUT:
                    raise ValueError(
                        f"expected arguments of {name} along the tokens to be position_embeddings or position_ids, by "
                        f"name, with tile_block, got {key} of shape {list(x.shape)} for {tokens} tokens"
                    )

    @staticmethod
    def _dim(key: str) -> int | None:
        if key.startswith("position_embeddings"):
            return -2
        return -1 if key == "position_ids" else None

    def part(self, part: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` for the tokens ``part``; views."""
        kwargs = dict(self.kwargs)
        for key, value in self.kwargs.items():
            dim = self._dim(key)
            if dim is None:
                continue
            if isinstance(value, torch.Tensor):
                kwargs[key] = _cut(value, dim, part, self.tokens)
            elif isinstance(value, (tuple, list)):
                kwargs[key] = tuple(_cut(x, dim, part, self.tokens) for x in value)
        return self.args, kwargs
