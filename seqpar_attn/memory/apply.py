"""One call that puts a memory policy on a decoder's blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checkpoint import Block, Policy, Trail, run_block
from .node import references, run_staged
from .offload import Offloader
from .staged import StagedBlock, Tiling
from .tiling import tiled

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_LAST_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "norm_f", "ln_f")
_CACHES = ("past_key_values", "past_key_value", "sharded_kv")


class Applied:
    """A policy on a model, until ``remove``."""

    def __init__(self, policy: Policy, offloader: Offloader | None):
        self.policy, self.offloader = policy, offloader
        self._replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    @property
    def host_bytes(self) -> int:
        """Host memory that offloaded tensors have taken so far."""
        return 0 if self.offloader is None else self.offloader.host_bytes

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.forward = forward
        module.__dict__["_seqpar_attn_memory"] = self

    def remove(self) -> None:
        """The model as it was; host memory is freed. No backward pass may be pending."""
        for module, forward in self._replaced:
            del module.forward, module.__dict__["_seqpar_attn_memory"]
            if forward is not None:
                module.forward = forward
        self._replaced = []
        if self.offloader is not None:
            self.offloader.close()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: the longest list of modules of one class."""
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) and len({type(y) for y in x}) == 1]
    longest = max((len(x) for x in lists), default=0)
    found = [x for x in lists if len(x) == longest]
    # A list inside another one's modules, such as the experts of a block, is not the decoder's.
    outer = [x for x in found if not any(x is not y and any(z is x for z in y.modules()) for y in lists)]
    if len(outer) != 1:
        raise ValueError(f"expected one list of blocks in {type(model).__name__}, got {len(outer)}: pass blocks=...")
    return list(outer[0])


def _mlp_of(block: nn.Module) -> nn.Module:
    for name in _MLP_NAMES:
        mlp = getattr(block, name, None)
        if isinstance(mlp, nn.Module):
            return mlp
    raise ValueError(f"expected {type(block).__name__} to have an MLP named {', '.join(_MLP_NAMES)}; got none of them")


def _last_norm(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module | None:
    """The norm behind the blocks: of the module that has the list of them. None if it has none by a usual name."""
    for parent in model.modules():
        if any(isinstance(x, nn.ModuleList) and len(x) and x[0] is blocks[0] for x in parent.children()):
            found = (getattr(parent, name, None) for name in _LAST_NORM_NAMES)
            return next((x for x in found if isinstance(x, nn.Module)), None)
    return None


def _check_count(name: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} to be {what}, got {value!r}")


def apply(
    model: nn.Module,
    *,
    attention: str = "save",
    activations: str = "keep",
    tile_mlp: int | None = None,
    tile_block: int | None = None,
    head_groups: int = 1,
    checkpoint_every: int = 1,
    keep_last: int = 0,
    blocks: Sequence[nn.Module] | None = None,
    compile: bool | dict[str, Any] = False,
) -> Applied:
    """Checkpoint every block of ``model``, a decoder of Hugging Face or any other whose attention is this package's.

    In the backward pass a block's forward runs again. What its attention calls had computed, ``(out, lse)``, is
    taken from where it was kept: neither their kernels nor their transfers run twice (but Ulysses exchanges heads once
    more, for its backward pass). Per block and token of a bfloat16 model that is ``2 * nheads * headdim + 4 * nheads``
    bytes, and its input ``2 * hidden_size`` bytes. Where no gradients are computed only tiles have an effect.

    Args:
        model: its blocks get another ``forward`` (parameters, their names and FSDP2's wrapping stay as they are, in
            either order of the calls).
        attention: "save" (on the device), "offload" (in page-locked host memory) or "recompute".
        activations: the blocks' inputs: "keep" (on the device) or "offload".
        tile_mlp: tokens that a block's MLP works on at a time; None for all. Needs an MLP that treats every token by
            itself.
        tile_block: tokens that a block works on at a time, all of it but attention, and the norm behind the blocks;
            None for all. Norms, projections, rotary embeddings, residual sums and MLP then exist for one tile only, and
            are computed once more or twice than without (:mod:`seqpar_attn.memory.staged`). Each block must call this
            package's attention once, treat every other token by itself, and get hidden states ``[batch, tokens, dim]``;
            without dropout. Replaces ``tile_mlp``.
        head_groups: with ``tile_block``, into how many groups attention's key heads (with their query heads) are split
            to be attended in turn: queries, keys, values and attention's buffers exist for one group only, and what
            leads to them is computed once per group. Divides the number of key heads; for Ulysses, every group must
            have query heads that the exchanging ranks divide.
        checkpoint_every: of so many blocks only the first one's input is kept; the others' are computed again from it,
            block by block, in the backward pass. 2 halves what inputs take and runs every second block's forward once
            more (its attention too, if that is "recompute").
        keep_last: the last so many blocks keep on the device what the others offload. 2 are free: when the backward
            pass begins, two blocks' tensors are still there.
        blocks: the modules to checkpoint, where they cannot be found; each takes hidden states first, or as
            ``hidden_states=...``.
        compile: True or the arguments of torch.compile, for what is inside the checkpoint of each block. (Compiled
            from outside, a block could not ask for what it has kept.) Not with ``tile_block``.

    Returns:
        A handle: ``remove()`` restores the model, ``host_bytes`` is the host memory taken.

    Raises:
        ValueError: an unknown policy name; a model without a recognisable list of blocks or MLPs; a model that
            checkpoints already. In the first step: a block whose attention is not this package's, a key-value cache,
            too little host memory for all blocks (found before the second block runs), a block that ``tile_block``
            cannot split, or with ``checkpoint_every`` one whose input is not the output of the block before.

    Sources: tiles and offloaded inputs, ALST (Bekman et al. 2025, arXiv 2506.13996); heads in turn, UPipe (Ghadia et
    al. 2026, arXiv 2602.21196); checkpoints of several layers, Chen et al. 2016, arXiv 1604.06174.
    """
    policy = Policy(attention, activations)  # type: ignore[arg-type]
    for name, tile in (("tile_mlp", tile_mlp), ("tile_block", tile_block)):
        if tile is not None:
            _check_count(name, tile, 1, "a positive number of tokens or None")
    _check_count("head_groups", head_groups, 1, "a positive number of groups")
    _check_count("checkpoint_every", checkpoint_every, 1, "a positive number of blocks")
    _check_count("keep_last", keep_last, 0, "a number of blocks, 0 or more")
    if head_groups > 1 and tile_block is None:
        raise ValueError(f"expected tile_block with head_groups={head_groups}, got none")
    if tile_block is not None and (tile_mlp is not None or compile):
        other = "compile" if compile else f"tile_mlp={tile_mlp}"
        raise ValueError(f"expected no {other} with tile_block, which runs the whole block in tiles, got both")
    if getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            "expected a model without gradient checkpointing, got one: call gradient_checkpointing_disable()"
        )
    chosen = list(blocks) if blocks is not None else blocks_of(model)
    if not chosen:
        raise ValueError("expected at least one block, got none")
    mlps = [_mlp_of(block) for block in chosen] if tile_mlp is not None else []
    norm = _last_norm(model, chosen) if tile_block is not None else None
    norms = [] if norm is None else [norm]
    for module in (*chosen, *mlps, *norms):
        if hasattr(module, "_seqpar_attn_memory"):
            raise ValueError(
                f"expected a model without a memory policy, got one on {type(module).__name__}: remove() it"
            )
    if tile_block is not None:
        references()  # not in the middle of a backward pass
    device = next(chosen[0].parameters()).device
    offloader = Offloader(device) if policy.offloads else None
    applied, trail = (
        Applied(policy, offloader),
        Trail(offloader, follows=checkpoint_every > 1 or tile_block is not None),
    )

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(forward, **(compile if isinstance(compile, dict) else {})) if compile else forward

    for module in mlps:
        assert tile_mlp is not None
        applied._replace(module, tiled(compiled(module.forward), tile_mlp))
    for module in norms:
        assert tile_block is not None
        applied._replace(module, tiled(module.forward, tile_block, random=False))
    for number, block in enumerate(chosen):
        inner, name = compiled(block.forward), f"block {number} ({type(block).__name__})"
        staged = None if tile_block is None else StagedBlock(block, inner, name, Tiling(tile_block, head_groups))
        stays = number >= len(chosen) - keep_last
        after = range(1, len(chosen) - keep_last)
        others = (len([n for n in after if n % checkpoint_every == 0]), len(after)) if number == 0 else None
        kept = Kept(policy.on_device if stays else policy, number % checkpoint_every > 0, others)
        applied._replace(block, _forward(inner, block, name, staged, trail, kept))
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a recomputation would append to the cache once more
    return applied


@dataclass(frozen=True)
class Kept:
    """Of one block: its policy, and whether its input is computed again from the block before. Of the first one also
    how many others offload as it does, their inputs and attention's results."""

    policy: Policy
    drops_input: bool
    others: tuple[int, int] | None


def _forward(
    inner: Callable[..., Any], module: nn.Module, name: str, staged: StagedBlock | None, trail: Trail, kept: Kept
) -> Callable[..., Any]:
    """What a block does instead of ``inner``."""
    policy, checked = kept.policy, False

    def start(hidden: torch.Tensor) -> Block:
        source = None
        if kept.drops_input:
            source = trail.source(hidden)
            if source is None:
                raise ValueError(
                    f"expected the input of {name} to be the output of the block before, which checkpoint_every "
                    "computes again, got another tensor"
                )
        return Block(trail, policy, hidden, source)

    @torch.compiler.disable
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        cache = next((key for key in _CACHES if kwargs.get(key) is not None), None)
        if not torch.is_grad_enabled() and (staged is None or cache is not None):
            return inner(*args, **kwargs)
        if cache is not None:
            raise ValueError(
                f"expected no key-value cache while gradients are computed, got one in {name}: use_cache=False"
            )
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), args)
        if not isinstance(hidden, torch.Tensor):
            raise ValueError(f"expected hidden states as the first argument of {name}, got {type(hidden).__name__}")
        if staged is not None and not torch.is_grad_enabled():
            arguments = staged.check(hidden, rest, kwargs)
            return staged.finish(hidden, arguments, staged.attend(hidden, arguments))
        block = start(hidden)
        if staged is not None:
            result = run_staged(staged, block, hidden, *rest, **kwargs)
        else:
            result = run_block(module, inner, block, hidden, *rest, **kwargs)
        if not checked:
            if policy.attention != "recompute" and not len(block):
                raise ValueError(
                    f'expected the attention of {name} to be this package\'s, got none: attention="{policy.attention}" '
                    'cannot keep its results; choose attention="recompute"'
                )
            if trail.offloader is not None and kept.others is not None:
                inputs, results = kept.others
                trail.offloader.check_room(inputs * block.input_bytes + results * block.result_bytes)
            checked = True
        return result

    return forward
