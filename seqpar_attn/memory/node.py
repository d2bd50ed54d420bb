"""A block in stages as one node of autograd's graph."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..intercept import Attention
from .arguments import Arguments
from .checkpoint import Block
from .staged import StagedBlock, Whole
from .surroundings import Surroundings, gather


class _Node(torch.autograd.Function):
    """Its backward runs the stages again, from what :class:`Block` kept."""

    @staticmethod
    def forward(ctx: Any, run: _Run, hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.run = run
        # What is packed in this one's place goes when autograd lets it go, unlike an attribute of ctx.
        ctx.save_for_backward(hidden.new_empty(0))
        return run.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        alone = sys.getrefcount(grad) <= references()
        (_,) = ctx.saved_tensors  # unpacked: see _Run
        dhidden, gradients = ctx.run.backward(grad, alone)
        return (None, dhidden if ctx.needs_input_grad[1] else None, *gradients)


class _Probe(torch.autograd.Function):
    """Counts the references to a gradient that nobody but autograd has, where ``_Node`` counts."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        _Probe.count = sys.getrefcount(grad)
        return torch.empty_like(grad)


@functools.cache
def references() -> int:
    """To a gradient that came from a node like ours and that no hook has put away."""
    with torch.enable_grad(), torch.inference_mode(False):
        _Probe.apply(_Probe.apply(torch.zeros(1, requires_grad=True))).backward(torch.zeros(1))
    return _Probe.count


class _Run:
    """One run of a block in stages: all that its backward needs, but its :class:`Block`, which autograd keeps."""

    def __init__(self, staged: StagedBlock, arguments: Arguments, block: Block, hidden: torch.Tensor):
        self.staged, self.arguments = staged, arguments
        self.surroundings = Surroundings(hidden.device, random=False)
        self.follows = block.trail.source(hidden) is not None
        """Whether its input is the output of the block before, and nothing else is made of that by the decoder."""
        self.block: Block | None = block
        self._call: Attention | None = None

    def parameters(self) -> list[torch.Tensor]:
        """In the same order, whatever FSDP2 has put in their place meanwhile."""
        return [p for p in self.staged.module.parameters() if p.requires_grad]

    def pack(self, token: torch.Tensor) -> tuple[Block, torch.Tensor]:
        assert self.block is not None
        return self.block, token

    def unpack(self, packed: tuple[Block, torch.Tensor]) -> torch.Tensor:
        self.block, token = packed
        return token

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        block = self.block
        assert block is not None
        with self.surroundings.autocast():
            whole = self.staged.attend(hidden, self.arguments)
            self._call = whole.call
            if block.policy.attention != "recompute":
                block.put((whole.out, whole.lse))
            return self.staged.finish(hidden, self.arguments, whole)

    def _whole(self, block: Block, hidden: torch.Tensor) -> Whole:
        if block.policy.attention == "recompute":
            return self.staged.attend(hidden, self.arguments)
        assert self._call is not None
        out, lse = block.take(0)
        return Whole(out, lse, self._call)

    def replay(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        gather(self.staged.module)
        with torch.no_grad(), self.surroundings.autocast():
            return self.staged.finish(hidden, self.arguments, self._whole(block, hidden))

    def backward(self, grad: torch.Tensor, alone: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """``alone``: no one else holds ``grad``. If it is what the block behind gave for this one's output, and not
        part of a sum since, it is nobody's, and becomes the gradient of this block's input in place."""
        block, self.block = self.block, None
        assert block is not None
        trail = block.trail
        trail.back(block)
        into = grad if alone and trail.is_given(grad) else None
        with self.surroundings.autocast():
            hidden = block.hidden().detach()
            whole, own = self._whole(block, hidden), block.policy.attention != "save"
            result = self.staged.backward(hidden, self.arguments, whole, grad, into, own, self.parameters())
        trail.gave(result[0] if self.follows else None)
        return result


def run_staged(staged: StagedBlock, block: Block, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of ``staged.module`` by stages, checkpointed; as :func:`seqpar_attn.memory.checkpoint.run_block`."""
    run = _Run(staged, staged.check(hidden, args, kwargs), block, hidden)
    with torch.autograd.graph.saved_tensors_hooks(run.pack, run.unpack):
        output: torch.Tensor = _Node.apply(run, hidden, *run.parameters())
    run.block = None
    block.replay = run.replay
    block.end_forward(output)
    return output
