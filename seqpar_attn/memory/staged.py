"""A block whose tensors of the whole sequence are few: everything but attention runs on a few tokens at a time, and
attention on a few heads.

Everything in a decoder's block but attention treats each token by itself. So the block's own forward runs on tiles of
the sequence, twice: once up to attention, which gives the tile's queries, keys and values (:class:`_Before`), and once
with attention's result for the tile put in (:class:`_After`). Nothing of the block's code has to be known. Heads are
independent of each other, so attention works on groups of them in turn, whose queries and keys exist while it does.
Token by token is the method of ALST (arXiv 2506.13996), heads in turn that of UPipe (arXiv 2602.21196). Which tensors
are there when, and how much that is, is in ``docs/memory.md``.

Tiles are exact: products over the hidden dimension are those of the whole sequence, and the gradients of weights are
summed over tiles in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..intercept import Attention, Results, intercepting
from ..kept import Replaying
from .arguments import Arguments

Tensor = torch.Tensor


@dataclass(frozen=True)
class Tiling:
    """``tokens`` at a time outside of attention, and attention's key heads in ``groups``."""

    tokens: int
    groups: int

    def tiles(self, tokens: int) -> list[slice]:
        return [slice(i, min(i + self.tokens, tokens)) for i in range(0, tokens, self.tokens)]

    def group(self, number: int, nheads: int) -> slice:
        """Which of ``nheads`` heads, of queries or of keys."""
        return slice(number * nheads // self.groups, (number + 1) * nheads // self.groups)


class _Reached(Exception):
    """A forward has come to its attention; nobody needs the rest."""


@dataclass
class _Before:
    """Takes the queries, keys and values of a tile away."""

    taken: tuple[Attention, Tensor, Tensor, Tensor] | None = None

    def __call__(self, call: Attention, q: Tensor, k: Tensor, v: Tensor) -> Results:
        self.taken = call, q, k, v
        raise _Reached


@dataclass
class _After:
    """Gives attention's results for a tile."""

    results: tuple[Tensor, Tensor]
    calls: int = 0

    def __call__(self, call: Attention, q: Tensor, k: Tensor, v: Tensor) -> Results:
        self.calls += 1
        return self.results


@dataclass
class _Known:
    """Results of one attention call, for a recomputation; a :class:`seqpar_attn.kept.Store`."""

    results: Results

    def put(self, results: Results) -> None:
        raise AssertionError("nothing is recorded")

    def take(self, index: int) -> Results:
        return tuple(x.detach() for x in self.results)

    def __len__(self) -> int:
        return 1


class _Sums:
    """Gradients of parameters, summed over tiles in float32 (float64 of such parameters) and rounded once."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            known = self._sums[i]
            if known is None:  # a copy even of float32: what autograd gives may be another parameter's as well
                self._sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            else:
                known += gradient

    def take(self) -> list[Tensor | None]:
        sums, self._sums = self._sums, []
        return [None if x is None else x.to(p.dtype) for x, p in zip(sums, self.parameters)]


@dataclass
class Whole:
    """What attention made of the whole sequence, ``out [b, s, h, d]`` and ``lse [b, h, s]``, and by which call."""

    out: Tensor
    lse: Tensor
    call: Attention


@dataclass
class StagedBlock:
    """The forward of ``module`` (``inner``, which takes hidden states first) by stages; ``name`` is for errors."""

    module: nn.Module
    inner: Any
    name: str
    tiling: Tiling
    _checked: bool = field(default=False, init=False)

    def check(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """What can be seen before it runs; ValueError if it cannot run in stages."""
        from torch.distributed.fsdp import FSDPModule

        if hidden.dim() != 3:
            raise ValueError(
                f"expected hidden states [batch, tokens, dim] for {self.name} with tile_block, got {list(hidden.shape)}"
            )
        if not self._checked:
            for name, module in self.module.named_modules():
                if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
                    raise ValueError(
                        f"expected no dropout in {self.name} with tile_block, which runs it more than once, got "
                        f"{name} with p={module.p}"
                    )
                if isinstance(module, FSDPModule) and module is not self.module:
                    raise ValueError(
                        f"expected {self.name} to be wrapped by FSDP as a whole with tile_block, got {name} wrapped"
                    )
            self._checked = True
        return Arguments(self.name, hidden.shape[1], args, kwargs)

    # The two halves of the block's own forward, for a tile -----------------------------------------------------------

    def _before(self, hidden: Tensor, arguments: Arguments, part: slice) -> tuple[Attention, Tensor, Tensor, Tensor]:
        taker = _Before()
        args, kwargs = arguments.part(part)
        try:
            with intercepting(taker):
                self.inner(hidden, *args, **kwargs)
        except _Reached:
            pass
        if taker.taken is None:
            raise ValueError(
                f"expected the attention of {self.name} to be this package's, got none: tile_block cannot split it"
            )
        return taker.taken

    def _after(self, hidden: Tensor, arguments: Arguments, part: slice, results: tuple[Tensor, Tensor]) -> Tensor:
        taker = _After(results)
        args, kwargs = arguments.part(part)
        with intercepting(taker):
            output = self.inner(hidden, *args, **kwargs)
        if taker.calls != 1:
            raise ValueError(f"expected one attention call in {self.name} with tile_block, got {taker.calls}")
        if isinstance(output, tuple) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"expected {self.name} to return hidden states {list(hidden.shape)} with tile_block, got {got}"
            )
        return output

    # Stages of the whole sequence ------------------------------------------------------------------------------------

    def _operands(
        self, hidden: Tensor, arguments: Arguments, number: int
    ) -> tuple[Attention, tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
        """The call, how many query and key heads there are, and q, k and v of the head group ``number``."""
        whole: list[Tensor] = []
        for part in self.tiling.tiles(hidden.shape[1]):
            call, *tensors = self._before(hidden[:, part], arguments, part)
            if not whole:
                heads = tensors[0].shape[2], tensors[1].shape[2]
                if heads[1] % self.tiling.groups:
                    raise ValueError(
                        f"expected head_groups to divide the {heads[1]} key heads of {self.name}, got "
                        f"{self.tiling.groups}"
                    )
                for x in tensors:
                    own = self.tiling.group(number, x.shape[2])
                    whole.append(x.new_empty(x.shape[0], hidden.shape[1], own.stop - own.start, x.shape[3]))
            for x, into in zip(tensors, whole):
                into[:, part] = x[:, :, self.tiling.group(number, x.shape[2])]
        q, k, v = whole
        return call, heads, (q, k, v)

    def attend(self, hidden: Tensor, arguments: Arguments) -> Whole:
        """Attention of all heads, group by group. No gradients."""
        found: Whole | None = None
        for number in range(self.tiling.groups):
            call, (nheads, _), operands = self._operands(hidden, arguments, number)
            out, lse = call.operator(*operands, *call.rest)[:2]
            del operands
            if self.tiling.groups == 1:
                return Whole(out, lse, call)
            if found is None:
                batch, tokens, _, headdim = out.shape
                found = Whole(out.new_empty(batch, tokens, nheads, headdim), lse.new_empty(batch, nheads, tokens), call)
            own = self.tiling.group(number, nheads)
            found.out[:, :, own], found.lse[:, own] = out, lse
            del out, lse  # before the next group's
        assert found is not None
        return found

    def finish(self, hidden: Tensor, arguments: Arguments, whole: Whole) -> Tensor:
        """The block's output from its input and attention's. No gradients."""
        output: Tensor | None = None
        for part in self.tiling.tiles(hidden.shape[1]):
            found = self._after(hidden[:, part], arguments, part, (whole.out[:, part], whole.lse[:, :, part]))
            if output is None:
                output = found.new_empty(hidden.shape)
            output[:, part] = found
        assert output is not None
        return output

    def backward(
        self,
        hidden: Tensor,
        arguments: Arguments,
        whole: Whole,
        grad: Tensor,
        into: Tensor | None,
        own: bool,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """``(gradient of hidden, of parameters)``, given that of the output.

        ``into``: where the first goes, ``grad`` itself for example; None for a new tensor. ``own``: ``whole.out`` is
        nobody else's. With a ring's operators it then becomes its own gradient, and that the gradient of the queries;
        else one more tensor like it does.
        """
        sums = _Sums(parameters)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if into is None else into
        steps = _Backward(self, hidden, arguments, whole, own and whole.call.gradients is not None, sums, dhidden)
        steps.after(grad)
        steps.attention()
        steps.before()
        return dhidden, sums.take()


class _Backward:
    """The backward of a block in three stages; each leaves to the next what it needs."""

    def __init__(
        self,
        block: StagedBlock,
        hidden: Tensor,
        arguments: Arguments,
        whole: Whole,
        overwrite: bool,
        sums: _Sums,
        dhidden: Tensor,
    ):
        self.block, self.hidden, self.arguments, self.whole, self.sums = block, hidden, arguments, whole, sums
        self.overwrite, self.dhidden = overwrite, dhidden
        self.dout = whole.out if overwrite else torch.empty_like(whole.out)
        self.extra: Tensor | None = None
        """Of rows of attention: ``rowsum(dout * out) - dlse`` if out is overwritten, else ``dlse``, if there is one."""
        self.keys: list[Tensor] = []
        """dk and dv."""

    def _tiles(self) -> Iterator[slice]:
        yield from self.block.tiling.tiles(self.hidden.shape[1])

    def after(self, grad: Tensor) -> None:
        """What follows attention: gradients of hidden, by that way, and of attention's results."""
        lse = self.whole.lse
        if self.overwrite or self.whole.call.wants_lse:
            self.extra = torch.empty_like(lse)
        for part in self._tiles():
            x, out, row = (t.detach() for t in (self.hidden[:, part], self.whole.out[:, part], lse[:, :, part]))
            leaves = [x.requires_grad_(), out.requires_grad_(), row.requires_grad_(self.whole.call.wants_lse)]
            with torch.enable_grad():
                y = self.block._after(x, self.arguments, part, (out, row))
            targets = [*leaves[: 3 if row.requires_grad else 2], *self.sums.parameters]
            dx, dout, *rest = torch.autograd.grad(y, targets, grad[:, part], allow_unused=True)
            del y
            drow = rest.pop(0) if row.requires_grad else None
            self.sums.add(rest)
            if self.extra is not None:
                into = self.extra[:, :, part]
                into.zero_() if drow is None else into.copy_(drow)
                if self.overwrite and dout is not None:
                    wide = lse.dtype
                    delta = (out.detach().to(wide) * dout.to(wide)).sum(-1).transpose(1, 2)
                    torch.sub(delta, into, out=into)
            self.dout[:, part] = 0 if dout is None else dout
            self.dhidden[:, part] = 0 if dx is None else dx  # last: it may be grad, and dout a view of that

    def attention(self) -> None:
        """Attention: the gradient of the queries takes the place of that of the result, group by group."""
        block, call, groups = self.block, self.whole.call, self.block.tiling.groups
        nheads = self.whole.out.shape[2]
        for number in range(groups):
            _, (_, kv_heads), operands = block._operands(self.hidden, self.arguments, number)
            heads, key_heads = block.tiling.group(number, nheads), block.tiling.group(number, kv_heads)
            dout = self.dout[:, :, heads]
            lse, extra = (None if x is None else _rows(x[:, heads]) for x in (self.whole.lse, self.extra))
            assert lse is not None
            if self.overwrite:
                assert extra is not None and call.gradients is not None
                dq, *keys = call.gradients(dout, None, *operands, extra, lse, *call.rest)
            else:
                q, k, v = (x.requires_grad_() for x in operands)
                known = _Known((self.whole.out[:, :, heads].contiguous(), lse))
                with torch.enable_grad(), Replaying(known):
                    found = call.operator(q, k, v, *call.rest)[:2]
                given = [dout] if extra is None else [dout, extra]
                dq, *keys = torch.autograd.grad(found[: len(given)], (q, k, v), given)
                del q, k, v, known, found
            del operands
            dout.copy_(dq)
            if groups == 1:
                self.keys = keys
                break
            if not self.keys:
                batch, tokens, _, headdim = keys[0].shape
                self.keys = [x.new_empty(batch, tokens, kv_heads, headdim) for x in keys]
            for x, into in zip(keys, self.keys):
                into[:, :, key_heads] = x
            del dq, keys, x, dout

    def before(self) -> None:
        """What leads to attention: gradients by way of queries, keys and values."""
        for part in self._tiles():
            x = self.hidden[:, part].detach().requires_grad_()
            with torch.enable_grad():
                _, *tensors = self.block._before(x, self.arguments, part)
            given = [g[:, part] for g in (self.dout, *self.keys)]
            pairs = [(t, g) for t, g in zip(tensors, given) if t.requires_grad]
            dx, *rest = torch.autograd.grad(
                [t for t, _ in pairs], [x, *self.sums.parameters], [g for _, g in pairs], allow_unused=True
            )
            self.sums.add(rest)
            if dx is not None:
                self.dhidden[:, part] += dx


def _rows(x: Tensor) -> Tensor:
    """``[b, h, s]`` as kernels need it: contiguous, from a multiple of 16 bytes on."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
