"""Checkpointing of a block that knows attention: what the backward pass keeps, fetches back and computes again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from ..kept import Recording, Replaying, Results
from .offload import Offloaded, Offloader

Attention = Literal["save", "offload", "recompute"]
Activations = Literal["keep", "offload"]


@dataclass(frozen=True)
class Policy:
    """What happens between the forward and the backward pass of a block.

    ``attention``: its ``(out, lse)`` stay on the device ("save"), wait in host memory ("offload"), or are computed
    again with all transfers ("recompute"). ``activations``: the block's input stays ("keep") or waits in host memory
    ("offload"). Everything else is computed again.
    """

    attention: Attention = "save"
    activations: Activations = "keep"

    def __post_init__(self) -> None:
        for name, allowed in (("attention", get_args(Attention)), ("activations", get_args(Activations))):
            value = getattr(self, name)
            if value not in allowed:
                choices = ", ".join(repr(x) for x in allowed)
                raise ValueError(f"expected {name} to be one of {choices}, got {value!r}")

    @property
    def offloads(self) -> bool:
        return "offload" in (self.attention, self.activations)


class Trail:
    """The blocks of a model in the order of their forwards, which the backward pass follows back.

    Offloaded tensors of a block are let go of on the device when the next but one begins: two are on their way out at
    a time. On the way back those of the block before are fetched while a block works: two are back at a time.
    """

    def __init__(self, offloader: Offloader | None):
        self.offloader = offloader
        self._blocks: list[weakref.ref[Block]] = []

    def begin(self, block: Block) -> None:
        self._blocks = [x for x in self._blocks if x() is not None]
        for reference in self._blocks[-2:-1]:
            before = reference()
            if before is not None:
                for tensor in before.offloaded:
                    tensor.let_go()
        self._blocks.append(weakref.ref(block))

    def back(self, block: Block) -> None:
        for tensor in block.offloaded:
            tensor.fetch()
        known = [x() for x in self._blocks]
        if block not in known:
            return  # a second backward pass
        index = known.index(block)
        before = known[index - 1] if index else None
        if before is not None:
            for tensor in before.offloaded:
                tensor.fetch()
        del self._blocks[index:]


class Block:
    """One forward of one block: its input, and the results of its attention calls."""

    def __init__(self, trail: Trail, policy: Policy, hidden: torch.Tensor):
        self.trail, self.policy = trail, policy
        self._hidden: torch.Tensor | Offloaded = hidden
        self._results: list[tuple[torch.Tensor | Offloaded, ...]] = []
        self._versions: list[tuple[int, ...]] = []
        self.offloaded: list[Offloaded] = []
        trail.begin(self)

    def __len__(self) -> int:
        return len(self._results)

    def _out(self, tensor: torch.Tensor) -> Offloaded:
        assert self.trail.offloader is not None
        self.offloaded.append(Offloaded(self.trail.offloader, tensor))
        return self.offloaded[-1]

    def hidden(self) -> torch.Tensor:
        return self._hidden.get() if isinstance(self._hidden, Offloaded) else self._hidden

    def end_forward(self) -> None:
        if self.policy.activations == "offload":
            assert isinstance(self._hidden, torch.Tensor)
            self._hidden = self._out(self._hidden)

    def put(self, results: Results) -> None:
        """See :class:`seqpar_attn.kept.Store`."""
        if self.policy.attention == "offload":
            self._results.append(tuple(self._out(x) for x in results))
            self._versions.append(())
        else:
            self._results.append(tuple(x.detach() for x in results))
            self._versions.append(tuple(x._version for x in results))

    def take(self, index: int) -> Results:
        kept = self._results[index]
        for x, version in zip(kept, self._versions[index]):
            if x._version != version:  # type: ignore[union-attr]
                raise RuntimeError(f"expected the results of attention call {index} unchanged, got modified ones")
        return tuple(x.get() if isinstance(x, Offloaded) else x.detach() for x in kept)

    def first(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.policy.attention == "recompute" else Recording(self)

    def again(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.policy.attention == "recompute" else Replaying(self)

    def __del__(self) -> None:
        for tensor in self.offloaded:
            tensor.release()


def run_block(
    function: Callable[..., Any], trail: Trail, policy: Policy, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[Any, int]:
    """``function(hidden, *args, **kwargs)``, checkpointed; and how many attention calls it kept the results of.

    ``hidden``: the block's input, of any shape; what else it gets stays on the device as it is.
    """
    block = Block(trail, policy, hidden)
    forward = True

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward
        if not forward:
            trail.back(block)
        return function(block.hidden(), *args, **kwargs)

    result = checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (block.first(), block.again()), **kwargs)
    forward = False
    block.end_forward()
    return result, len(block)
