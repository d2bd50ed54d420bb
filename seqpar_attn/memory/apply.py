"""One call that puts a memory policy on a decoder's blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .checkpoint import Policy, Trail, run_block
from .offload import Offloader
from .tiling import tiled

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


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


def apply(
    model: nn.Module,
    *,
    attention: str = "save",
    activations: str = "keep",
    tile_mlp: int | None = None,
    blocks: Sequence[nn.Module] | None = None,
    compile: bool | dict[str, Any] = False,
) -> Applied:
    """Checkpoint every block of ``model``, a decoder of Hugging Face or any other whose attention is this package's.

    In the backward pass a block's forward runs again. What its attention calls had computed, ``(out, lse)``, is
    taken from where it was kept: neither their kernels nor their transfers run twice (but Ulysses exchanges heads once
    more, for its backward pass). Per block and token of a bfloat16 model that is ``2 * nheads * headdim + 4 * nheads``
    bytes, and its input ``2 * hidden_size`` bytes. Nothing happens where no gradients are computed.

    Args:
        model: its blocks get another ``forward`` (parameters, their names and FSDP2's wrapping stay as they are, in
            either order of the calls).
        attention: "save" (on the device), "offload" (in page-locked host memory) or "recompute".
        activations: the blocks' inputs: "keep" (on the device) or "offload".
        tile_mlp: tokens that a block's MLP works on at a time; None for all. Needs an MLP that treats every token by
            itself.
        blocks: the modules to checkpoint, where they cannot be found; each takes hidden states first, or as
            ``hidden_states=...``.
        compile: True or the arguments of torch.compile, for what is inside the checkpoint of each block. (Compiled
            from outside, a block could not ask for what it has kept.)

    Returns:
        A handle: ``remove()`` restores the model, ``host_bytes`` is the host memory taken.

    Raises:
        ValueError: an unknown policy name; a model without a recognisable list of blocks or MLPs; a model that
            checkpoints already. In the first step: a block whose attention is not this package's, a key-value cache,
            or too little host memory for all blocks (found before the second block runs).
    """
    policy = Policy(attention, activations)  # type: ignore[arg-type]
    if tile_mlp is not None and (isinstance(tile_mlp, bool) or not isinstance(tile_mlp, int) or tile_mlp < 1):
        raise ValueError(f"expected tile_mlp to be a positive number of tokens or None, got {tile_mlp!r}")
    if getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            "expected a model without gradient checkpointing, got one: call gradient_checkpointing_disable()"
        )
    chosen = list(blocks) if blocks is not None else blocks_of(model)
    if not chosen:
        raise ValueError("expected at least one block, got none")
    mlps = [_mlp_of(block) for block in chosen] if tile_mlp is not None else []
    for module in (*chosen, *mlps):
        if hasattr(module, "_seqpar_attn_memory"):
            raise ValueError(
                f"expected a model without a memory policy, got one on {type(module).__name__}: remove() it"
            )
    device = next(chosen[0].parameters()).device
    offloader = Offloader(device) if policy.offloads else None
    applied, trail = Applied(policy, offloader), Trail(offloader)

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(forward, **(compile if isinstance(compile, dict) else {})) if compile else forward

    for mlp in mlps:
        assert tile_mlp is not None
        applied._replace(mlp, tiled(compiled(mlp.forward), tile_mlp))
    for number, block in enumerate(chosen):
        inner = compiled(block.forward)
        applied._replace(block, _forward(inner, block, number, len(chosen), trail, policy))
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a recomputation would append to the cache once more
    return applied


def _forward(
    inner: Callable[..., Any], block: nn.Module, number: int, count: int, trail: Trail, policy: Policy
) -> Callable[..., Any]:
    """What block ``number`` of ``count`` does instead of ``inner``."""
    name = f"block {number} ({type(block).__name__})"
    checked = False

    @torch.compiler.disable
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        if any(kwargs.get(key) is not None for key in ("past_key_values", "past_key_value")):
            raise ValueError(
                f"expected no key-value cache while gradients are computed, got one in {name}: use_cache=False"
            )
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), args)
        if not isinstance(hidden, torch.Tensor):
            raise ValueError(f"expected hidden states as the first argument of {name}, got {type(hidden).__name__}")
        result, kept = run_block(inner, trail, policy, hidden, *rest, **kwargs)
        if not checked:
            if policy.attention != "recompute" and not kept:
                raise ValueError(
                    f'expected the attention of {name} to be this package\'s, got none: attention="{policy.attention}" '
                    'cannot keep its results; choose attention="recompute"'
                )
            if trail.offloader is not None and number == 0:
                trail.offloader.check_room((count - 1) * trail.offloader.host_bytes)
            checked = True
        return result

    return forward
