"""Checkpointing of a block that knows attention: what the backward pass keeps, fetches back and computes again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ..kept import Recording, Replaying, Results
from .offload import Offloaded, Offloader
from .surroundings import Surroundings, gather

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

    @property
    def on_device(self) -> Policy:
        """The same, with nothing offloaded."""
        return Policy("save" if self.attention == "offload" else self.attention)


class Content:
    """What a tensor held at some time: a storage, from where on, and how often it had been written."""

    def __init__(self, tensor: torch.Tensor):
        self._storage, self._where = StorageWeakRef(tensor.untyped_storage()), self._of(tensor)

    @staticmethod
    def _of(x: torch.Tensor) -> tuple[Any, ...]:
        return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, which may be an alias, holds just that. (A weak reference keeps a storage's identity from
        being used again, so this is no mistake about two storages that had one address in turn.)"""
        return self._where == self._of(tensor) and self._storage == StorageWeakRef(tensor.untyped_storage())


class Trail:
    """The blocks of a model in the order of their forwards, which the backward pass follows back.

    Offloaded tensors of a block are let go of on the device when the next but one begins: two are on their way out at
    a time. On the way back those of the block before are fetched while a block works: two are back at a time.
    ``follows``: it also knows whose output a tensor is.
    """

    def __init__(self, offloader: Offloader | None, follows: bool = False):
        self.offloader, self._follows = offloader, follows
        self._blocks: list[weakref.ref[Block]] = []
        self._latest: tuple[weakref.ref[Block], Content] | None = None
        self._gradient: Content | None = None

    def begin(self, block: Block) -> None:
        self._blocks = [x for x in self._blocks if x() is not None]
        for reference in self._blocks[-2:-1]:
            before = reference()
            if before is not None:
                for tensor in before.offloaded:
                    tensor.let_go()
        self._blocks.append(weakref.ref(block))

    def end(self, block: Block, output: Any) -> None:
        self._latest = None
        if self._follows and isinstance(output, torch.Tensor):
            self._latest = weakref.ref(block), Content(output)

    def source(self, hidden: torch.Tensor) -> Block | None:
        """The block that ended last, if ``hidden`` is its output, untouched."""
        if self._latest is None or not self._latest[1].is_of(hidden):
            return None
        return self._latest[0]()

    def gave(self, gradient: torch.Tensor | None) -> None:
        """The gradient that a block gave for its input, if that is the output of the block before; else None."""
        self._gradient = None if gradient is None else Content(gradient)

    def is_given(self, gradient: torch.Tensor) -> bool:
        """Whether this is what the block behind gave, as it gave it."""
        return self._gradient is not None and self._gradient.is_of(gradient)

    def back(self, block: Block) -> None:
        for tensor in block.offloaded:
            tensor.fetch()
        known = [x() for x in self._blocks]
        if block not in known:
            return  # a second backward pass
        index = known.index(block)
        before = known[index - 1] if index else None
        while before is not None:  # and what its input is computed from
            for tensor in before.offloaded:
                tensor.fetch()
            before = before.source
        del self._blocks[index:]


class Block:
    """One forward of one block: its input, and the results of its attention calls.

    ``source``: the block before, if the input is not to be kept but computed again from that one's input.
    """

    def __init__(self, trail: Trail, policy: Policy, hidden: torch.Tensor, source: Block | None = None):
        self.trail, self.policy, self.source = trail, policy, source
        self._hidden: torch.Tensor | Offloaded | None = hidden
        self._version, self._requires_grad = hidden._version, hidden.requires_grad
        self._results: list[tuple[torch.Tensor | Offloaded, ...]] = []
        self._versions: list[tuple[int, ...]] = []
        self.offloaded: list[Offloaded] = []
        self.replay: Callable[[Block, torch.Tensor], torch.Tensor] | None = None
        """The output from the input, without gradients."""
        trail.begin(self)

    def __len__(self) -> int:
        return len(self._results)

    @property
    def input_bytes(self) -> int:
        """Of host memory."""
        return self._hidden.like.nbytes if isinstance(self._hidden, Offloaded) else 0

    @property
    def result_bytes(self) -> int:
        """Of host memory, for attention's results."""
        return sum(x.like.nbytes for x in self.offloaded) - self.input_bytes

    def _out(self, tensor: torch.Tensor) -> Offloaded:
        assert self.trail.offloader is not None
        self.offloaded.append(Offloaded(self.trail.offloader, tensor))
        return self.offloaded[-1]

    def hidden(self, stays: bool = False) -> torch.Tensor:
        """The input, on the device; the caller's is the last one there, unless it ``stays`` for a later call."""
        if isinstance(self._hidden, Offloaded):
            return self._hidden.get(stays)
        if self._hidden is not None:
            if self._hidden._version != self._version:
                raise RuntimeError("expected the input of a block unchanged until its backward, got a modified one")
            return self._hidden
        assert self.source is not None and self.source.replay is not None
        return self.source.replay(self.source, self.source.hidden(stays=True)).requires_grad_(self._requires_grad)

    def end_forward(self, output: Any) -> None:
        if self.source is not None:
            self._hidden = None
        elif self.policy.activations == "offload":
            assert isinstance(self._hidden, torch.Tensor)
            self._hidden = self._out(self._hidden)
        self.trail.end(self, output)

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
    module: nn.Module, function: Callable[..., Any], block: Block, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``function(hidden, *args, **kwargs)``, the forward of ``module``, checkpointed.

    ``hidden``: the block's input, of any shape; what else it gets stays on the device as it is.
    """
    forward, surroundings = True, Surroundings(hidden.device, random=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward
        if not forward:
            block.trail.back(block)
        return function(block.hidden(), *args, **kwargs)

    def replay(block: Block, hidden: torch.Tensor) -> torch.Tensor:  # no closure over its own block: that is a cycle
        gather(module)
        with torch.no_grad(), surroundings.again(), block.again():
            return first_of(function(hidden, *args, **kwargs))

    result = checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (block.first(), block.again()), **kwargs)
    forward = False
    block.replay = replay
    block.end_forward(first_of(result))
    return result


def first_of(result: Any) -> Any:
    """The hidden states that a block returns, alone or before others."""
    return result[0] if isinstance(result, tuple) else result
