"""EasyContext's four functions, so that code written for it changes one import.

    from seqpar_attn.integrations.easy_context import (
        apply_seq_parallel_monkey_patch,
        apply_unsloth_offloaded_gradient_checkpoint_monkey_patch,
        prepare_dataloader,
        prepare_seq_parallel_inputs,
    )

What the algorithms are called here and there: zigzag_ring_attn is "ring" over zigzag shards, dist_flash_attn
"dist_flash", ulysses_attn "ulysses", usp_attn "usp" with ``ring_degree`` rows; data_parallel changes nothing. All work
in training and evaluation, with and without checkpointing, and lengths may change from call to call.

**What is patched.** A family is named before or after its models are made, so its base class (LlamaPreTrainedModel)
gets a ``__call__`` that does one thing more: a model of the family that is called for the first time goes through
:func:`seqpar_attn.integrations.transformers.enable`. Attention itself is registered and chosen, never replaced. A model
may be given instead of a name; then nothing is patched. :func:`remove_monkey_patches` undoes all of it.
``attn_implementation`` of the models does not matter (flash_attention_2 needs flash-attn to be installed, so leave it
out where it is not).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist

from .. import memory
from ..api import Grid
from ..comm import Group, LoopbackGroup, group_name, peers
from ..layout import get_layout
from .transformers import enable, enabled, has_settings

_ALGORITHMS: dict[str, tuple[str, str] | None] = {
    "zigzag_ring_attn": ("ring", "zigzag"),
    "dist_flash_attn": ("dist_flash", "contiguous"),
    "ulysses_attn": ("ulysses", "contiguous"),
    "usp_attn": ("usp", "zigzag"),
    "data_parallel": None,
}
"""Method and layout."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_oss")
"""Names that :func:`apply_seq_parallel_monkey_patch` takes: transformers' ``config.model_type``."""

_APPLIED = "_seqpar_attn_offloaded_checkpoints"


class _State:
    """What was applied in this process."""

    def __init__(self) -> None:
        self.families: dict[str, str] = {}
        """Algorithm per family with a ``__call__`` of ours."""
        self.ring_degree = 1
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()
        """Those that were enabled here."""
        self.meshes: dict[tuple[int, str], tuple[Any, Grid]] = {}
        self.checkpointing: tuple[Any, Any] | None = None
        """The library's own methods, where they were replaced."""


_state = _State()


def _algorithm(seq_algo: str) -> tuple[str, str] | None:
    if seq_algo not in _ALGORITHMS:
        raise ValueError(f"expected seq_algo to be one of {', '.join(_ALGORITHMS)}, got {seq_algo!r}")
    return _ALGORITHMS[seq_algo]


def prepare_seq_parallel_inputs(
    seq_algo: str,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    target_ids: torch.Tensor | None,
    rank: int,
    world_size: int,
    device: torch.device | str,
    ring_degree: int | None = None,
) -> dict[str, torch.Tensor | None]:
    """This rank's part of a batch that every rank holds whole.

    Args:
        seq_algo: zigzag_ring_attn, dist_flash_attn, ulysses_attn, usp_attn or data_parallel (nothing is split).
        input_ids: integer ``[batch, seqlen]``.
        position_ids: integer ``[batch or 1, seqlen]``; expanded to the batch.
        target_ids: what to predict at each position (shifted already), ``[batch, seqlen]``, or None.
        rank, world_size: of all processes.
        device: where the parts go.
        ring_degree: rows of the grid of usp_attn; ``world_size / ring_degree`` neighbours exchange heads. By default
            what was given last, here or to ``apply_seq_parallel_monkey_patch``; models with another degree change.

    Returns:
        ``local_input_ids``, ``local_position_ids`` and ``local_target_ids`` (None if there were none), contiguous
        ``[batch, seqlen / world_size]``.

    Raises:
        ValueError: an unknown algorithm, shapes that do not fit, a length or a ``ring_degree`` that does not divide
            (pad with :func:`seqpar_attn.pad_batch`); on every rank if ``torch.distributed`` runs, also where ranks
            have batches of different shapes.
    """
    device = torch.device(device)
    ring_degree = _state.ring_degree if ring_degree is None else ring_degree
    error: ValueError | None = None
    layout = None
    try:
        layout = _checked_layout(seq_algo, input_ids, position_ids, target_ids, rank, world_size, ring_degree)
    except ValueError as complaint:
        error = complaint
    together = seq_algo != "data_parallel" and dist.is_available() and dist.is_initialized()
    if together and dist.get_world_size() == world_size > 1:
        fields = {"seq_algo": seq_algo, "input_ids shape": tuple(input_ids.shape), "ring_degree": ring_degree}
        peers(group_name(None), device).agree(fields, error)
    if error is not None:
        raise error
    if seq_algo == "usp_attn":
        _change_degree(ring_degree, device)

    def mine(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        return (x if layout is None else layout.shard(x, rank)).to(device)

    return {
        "local_input_ids": mine(input_ids),
        "local_position_ids": mine(position_ids.expand(input_ids.shape[0], -1)),
        "local_target_ids": mine(target_ids),
    }


def _checked_layout(
    seq_algo: str,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    target_ids: torch.Tensor | None,
    rank: int,
    world_size: int,
    ring_degree: int,
) -> Any:
    """The layout, or None for data_parallel; ValueError if anything is wrong."""
    algorithm = _algorithm(seq_algo)
    if input_ids.dim() != 2:
        raise ValueError(f"expected input_ids of shape [batch, seqlen], got {list(input_ids.shape)}")
    batch, seqlen = input_ids.shape
    if position_ids.shape not in ((batch, seqlen), (1, seqlen)):
        raise ValueError(f"expected position_ids of shape [{batch}, {seqlen}], got {list(position_ids.shape)}")
    if target_ids is not None and target_ids.shape != input_ids.shape:
        raise ValueError(f"expected target_ids of shape [{batch}, {seqlen}], got {list(target_ids.shape)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size {world_size}, got {rank}")
    if algorithm is None:
        return None
    name = algorithm[1]
    if seq_algo == "usp_attn":
        if ring_degree < 1 or world_size % ring_degree:
            raise ValueError(f"expected a ring_degree that divides world_size {world_size}, got {ring_degree}")
        name = f"{name}/{world_size // ring_degree}"
    layout = get_layout(name, world_size)
    layout.shard_length(seqlen)
    return layout


def apply_seq_parallel_monkey_patch(seq_algo: str, model: Any, *, ring_degree: int = 1) -> None:
    """Sequence-parallel attention over all processes in every model of a family, made before or after this call.

    Args:
        seq_algo: as for :func:`prepare_seq_parallel_inputs`; data_parallel undoes an earlier call for the family.
        model: a name of :data:`FAMILIES`, or a transformers model of any family that
            :func:`~seqpar_attn.integrations.transformers.enable` takes; then only that model changes.
        ring_degree: rows of the grid of usp_attn until ``prepare_seq_parallel_inputs`` names another.

    Raises:
        ValueError: an unknown algorithm or family.
    """
    algorithm = _algorithm(seq_algo)
    if isinstance(model, str):
        if model not in FAMILIES:
            raise ValueError(f"expected model to be one of {', '.join(FAMILIES)} or a model, got {model!r}")
        _state.ring_degree = ring_degree
        _forget(model)
        if algorithm is not None:
            _state.families[model] = seq_algo
            _watch(model)
        return
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"expected model to be a name or a transformers model, got {type(model).__name__}")
    _state.ring_degree = ring_degree
    if algorithm is not None:
        _enable(model, seq_algo)
    elif (handle := enabled(model)) is not None:
        handle.disable()
        _state.models.discard(model)


def _base_class(family: str) -> Any:
    """The class that all models of a family inherit from, and no others."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

    model_class: Any = MODEL_MAPPING[CONFIG_MAPPING[family]]
    own = [c for c in model_class.__mro__ if c.__module__ == model_class.__module__]
    return [c for c in own if issubclass(c, PreTrainedModel)][-1]


def _watch(family: str) -> None:
    """Let models of a family be enabled when they are called. The outermost is called first, which covers the rest."""
    base = _base_class(family)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_settings(self):
            _enable(self, _state.families[family])
        return super(base, self).__call__(*args, **kwargs)

    base.__call__ = __call__


def _forget(family: str) -> None:
    if family in _state.families:
        del _state.families[family], _base_class(family).__call__
    for model in [x for x in _state.models if x.config.model_type == family]:
        if (handle := enabled(model)) is not None:
            handle.disable()
        _state.models.discard(model)


def _enable(model: Any, seq_algo: str) -> None:
    algorithm = _algorithm(seq_algo)
    assert algorithm is not None
    group: Group | Grid = None
    if seq_algo == "usp_attn":
        group = _mesh(_state.ring_degree, next(model.parameters()).device)
    enable(model, group, method=algorithm[0], layout=algorithm[1])
    _state.models.add(model)


def _change_degree(ring_degree: int, device: torch.device) -> None:
    if ring_degree == _state.ring_degree:
        return
    _state.ring_degree = ring_degree
    for model in list(_state.models):
        handle = enabled(model)
        if handle is not None and handle.settings.method == "usp":
            enable(model, _mesh(ring_degree, device), method="usp")


def _mesh(ring_degree: int, device: torch.device) -> Grid:
    """The grid of all processes. Made once: that takes all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return LoopbackGroup(1), LoopbackGroup(1)
    world, key = dist.group.WORLD, (ring_degree, device.type)
    known = _state.meshes.get(key)
    if known is None or known[0] is not world:
        size = dist.get_world_size()
        if ring_degree < 1 or size % ring_degree:
            raise ValueError(f"expected a ring_degree that divides world_size {size}, got {ring_degree}")
        shape = (ring_degree, size // ring_degree)
        known = world, dist.init_device_mesh(device.type, shape, mesh_dim_names=("ring", "ulysses"))
        _state.meshes[key] = known
    return known[1]


def prepare_dataloader(seq_algo: str, dataloader: Any, accelerator: Any) -> Any:
    """For data_parallel ``accelerator.prepare(dataloader)``, which deals batches out; otherwise the loader itself, as
    every rank needs the same batches (seed its shuffling alike). ValueError for an unknown algorithm."""
    return accelerator.prepare(dataloader) if _algorithm(seq_algo) is None else dataloader


def apply_unsloth_offloaded_gradient_checkpoint_monkey_patch() -> None:
    """From now on ``model.gradient_checkpointing_enable()`` keeps the blocks' inputs in host memory.

    It puts :func:`seqpar_attn.memory.apply` on the model instead of the library's checkpoints: results of
    sequence-parallel attention are saved, so that neither its kernels nor its ring's transfers run twice (with
    data_parallel they are computed again). ``gradient_checkpointing_disable()`` takes it off. Arguments of
    ``gradient_checkpointing_enable`` are not looked at.
    """
    from transformers import PreTrainedModel

    if _state.checkpointing is not None:
        return
    methods: Any = PreTrainedModel
    before = methods.gradient_checkpointing_enable, methods.gradient_checkpointing_disable

    def gradient_checkpointing_enable(self: Any, *args: Any, **kwargs: Any) -> None:
        if _APPLIED in self.__dict__:
            return
        if self.is_gradient_checkpointing:
            before[1](self)
        ours = has_settings(self) or self.config.model_type in _state.families
        attention = "save" if ours else "recompute"
        self.__dict__[_APPLIED] = memory.apply(self, attention=attention, activations="offload")

    def gradient_checkpointing_disable(self: Any) -> None:
        applied = self.__dict__.pop(_APPLIED, None)
        if applied is not None:
            applied.remove()
        before[1](self)

    methods.gradient_checkpointing_enable = gradient_checkpointing_enable
    methods.gradient_checkpointing_disable = gradient_checkpointing_disable
    _state.checkpointing = before


def remove_monkey_patches() -> None:
    """Undo all that the functions above did to classes, and disable the models that they enabled. Checkpoints of a
    model stay until its ``gradient_checkpointing_disable()``, so call that before."""
    for family in list(_state.families):
        _forget(family)
    for model in list(_state.models):
        if (handle := enabled(model)) is not None:
            handle.disable()
    _state.models.clear()
    _state.ring_degree = 1
    if _state.checkpointing is not None:
        from transformers import PreTrainedModel

        methods: Any = PreTrainedModel
        methods.gradient_checkpointing_enable, methods.gradient_checkpointing_disable = _state.checkpointing
        _state.checkpointing = None
