"""Sequence-parallel attention in any Hugging Face decoder, through the library's own registries.

    from seqpar_attn.integrations.transformers import enable

    enable(model, group)
    batch = seqpar_attn.shard_batch(input_ids, layout="zigzag", group=group)
    loss = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        shift_labels=batch.labels,
        num_items_in_batch=batch.num_valid,
        use_cache=False,
    ).loss  # this rank's part: the sum over ranks is the loss of the whole sequence, and so are gradients

Nothing is patched: an attention function and a mask function are registered, and the model's configuration names them.
What would go wrong without a word (a padding mask, positions that every rank counts from 0, labels shifted inside a
shard, a key-value cache other than that of ``generation.py``, rotary frequencies that ranks would choose differently,
attention dropout) is a ValueError that says what to do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from ..api import Grid, dist_flash_attention, ring_attention, ulysses_attention, usp_attention
from ..comm import Group, agree
from ..decode import ShardedKV, communicators
from ..layout import get_layout, grid_of, holds_all, resolve_group
from .rotary import disagreement, length_dependent

NAME = "seqpar"
"""Of the registered attention. The library gives names with "flash" in them a meaning of their own."""

_METHODS: dict[str, tuple[Callable[..., Any], str]] = {
    "ring": (ring_attention, "zigzag"),
    "dist_flash": (dist_flash_attention, "contiguous"),
    "ulysses": (ulysses_attention, "contiguous"),
    "usp": (usp_attention, "zigzag"),
}
"""The function, and the layout that it takes if none is given."""

_KEY, _HANDLE = "_seqpar_attn_settings", "_seqpar_attn_enabled"
"""Where modules keep their settings, and a model what ``enable`` returned."""


@dataclass(frozen=True)
class Settings:
    """How the attention of a model is computed; see :func:`enable`."""

    group: Group | Grid
    method: str
    layout: str
    """Of what a rank holds, as ``shard_batch`` takes it; of a grid "zigzag/2"."""
    options: dict[str, Any]
    """For the attention function."""

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world size); of virtual ranks, which one process holds all of, the world is one rank."""
        return (0, 1) if holds_all(self.group) else resolve_group(self.group)[:2]

    def refuse(self, device: torch.device, message: str) -> NoReturn:
        """ValueError here, and on the other ranks, which wait for this one in their first attention."""
        error = ValueError(message)
        agree(communicators(self.group, device), {}, error)
        raise error


class Enabled:
    """Sequence-parallel attention in a model, until ``disable``."""

    def __init__(self, model: Any, settings: Settings):
        self.model, self.settings, self._before = model, settings, model.config._attn_implementation
        self._hooks: list[Any] = []
        self._install()

    def _install(self) -> None:
        model, settings = self.model, self.settings
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"expected a model whose attention can be chosen (one that follows transformers' attention interface), "
                f"got {type(model).__name__}"
            )
        for module in model.modules():
            module.__dict__[_KEY] = settings
        model.__dict__[_HANDLE] = self
        checks = [(model, _check_labels), (getattr(model, "base_model", model), _CheckTokens(settings))]
        self._hooks = [module.register_forward_pre_hook(check, with_kwargs=True) for module, check in checks]

    def disable(self) -> None:
        """The attention that the model had before."""
        for hook in self._hooks:
            hook.remove()
        for module in self.model.modules():
            module.__dict__.pop(_KEY, None)
        self.model.__dict__.pop(_HANDLE, None)
        self.model.set_attn_implementation(self._before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model is on one device, with the attention that it had before."""
        self.disable()
        for module in self.model.modules():
            module.__dict__[_KEY] = None  # so that nobody takes it for one that was never enabled
        try:
            yield
        finally:
            self._install()


def has_settings(module: nn.Module) -> bool:
    """Whether ``enable`` was called for a model with this module (and it is paused, at most)."""
    return _KEY in module.__dict__


def enabled(model: Any) -> Enabled | None:
    """What ``enable`` returned for this model, or for one that is inside it; None without ``enable``."""
    return next((module.__dict__[_HANDLE] for module in model.modules() if _HANDLE in module.__dict__), None)


def enable(
    model: Any,
    group: Group | Grid = None,
    *,
    method: str = "ring",
    layout: str | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    transfer: str = "pull",
    ranks_per_host: int | None = None,
) -> Enabled:
    """Give ``model`` attention over a sequence that is split over the ranks of ``group``.

    Afterwards every rank calls the model with its own shard (:func:`seqpar_attn.shard_batch`): ``input_ids`` and
    ``position_ids`` of the shard, and for a loss ``labels`` and ``shift_labels``, both the shard's labels, which
    ``shard_batch`` has shifted before cutting. Packed documents: ``cu_seqlens=[0, ..., seqlen]`` of the whole sequence
    (and ``position_ids`` that begin anew in each, if the model was trained so). Sliding windows, soft caps, attention
    sinks and grouped key heads are the model's own.

    Args:
        model: a transformers model whose attention goes through its attention registry (Llama, Mistral, Qwen2, Qwen3,
            Gemma2, Phi3, GPT-OSS and most others).
        group: a ProcessGroup, one dimension of a DeviceMesh, None (the default group), or a LoopbackGroup; for "usp" a
            mesh of two dimensions (ring, Ulysses) or a pair of groups, see :func:`seqpar_attn.usp_attention`.
        method: "ring", "dist_flash", "ulysses" or "usp".
        layout: how the sequence is split over the ranks (over the ring of "usp"); by default "zigzag" for "ring" and
            "usp", "contiguous" for the others. What ``shard_batch`` takes is the handle's ``settings.layout``: for
            "usp" with rows of two ranks "zigzag/2".
        backend, deterministic, transfer, ranks_per_host: see :func:`seqpar_attn.ring_attention`; Ulysses has no
            ``transfer``, and only "ring" has "double" with its ``ranks_per_host``.

    Returns:
        A handle whose ``disable()`` undoes this. A model that is enabled already gets the new settings.

    Raises:
        ValueError: not a transformers model, or one that cannot change its attention; an unknown method or layout; a
            group that is not the method's. When the model is called: see the module's documentation, and for "ulysses"
            and "usp" a number of heads that the ranks which exchange them do not divide.
    """
    if method not in _METHODS:
        raise ValueError(f"expected method to be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    chosen = layout or _METHODS[method][1]
    get_layout(chosen, 1)  # an unknown one is named here
    grid = grid_of(group)
    if (grid is not None) != (method == "usp"):
        kind = "a mesh of two dimensions (ring, Ulysses) or a pair of groups" if method == "usp" else "one group"
        raise ValueError(f"expected {kind} for method {method!r}, got {group!r}")
    options: dict[str, Any] = dict(layout=chosen, backend=backend, deterministic=deterministic)
    if method == "ring":
        options["ranks_per_host"] = ranks_per_host
    elif ranks_per_host is not None or transfer == "double":
        raise ValueError(
            f"expected transfer 'double' and ranks_per_host with method 'ring' only, got transfer {transfer!r} and "
            f"ranks_per_host {ranks_per_host!r} with {method!r}"
        )
    if method != "ulysses":
        options["transfer"] = transfer
    elif transfer != "pull":
        raise ValueError(f"expected no transfer for method 'ulysses', got {transfer!r}")
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise ValueError(f"expected a transformers model, got {type(model).__name__}")
    _register()
    while (old := enabled(model)) is not None:
        old.disable()
    whole = chosen if grid is None else f"{chosen}/{resolve_group(grid[1])[1]}"
    return Enabled(model, Settings(group, method, whole, options))


def settings_of(model: nn.Module) -> Settings | None:
    """What ``enable`` was called with; None without it."""
    return model.__dict__.get(_KEY)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


_PADDING = (
    "expected no padding in attention_mask, got some: pad at the end with seqpar_attn.pad_batch, whose labels are "
    "masked, or pack documents with cu_seqlens, and pass no attention_mask"
)


def _check_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Of a model with a head: labels must not be shifted inside the shard."""
    labels = kwargs.get("labels")
    settings: Settings = module.__dict__[_KEY]
    if labels is not None and kwargs.get("shift_labels") is None and settings.place[1] > 1:
        settings.refuse(
            labels.device,
            "expected shift_labels besides labels, both as shard_batch returns them, got labels only: the model would "
            "shift them inside the shard and lose one at every border",
        )


class _CheckTokens:
    """Of the decoder, with or without a head around it: what can be seen of a call before it runs. Positions are looked
    at once per shape, an attention_mask whenever there is one: on a GPU that waits for them. A cache of
    ``generation.py`` is passed on to the attention, which fills and reads it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._known: set[Any] = set()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # By what it is, not by its name: that is past_key_values, and cache from transformers 5.24 on.
        cache = next((x.sharded for x in kwargs.values() if isinstance(getattr(x, "sharded", None), list)), None)
        tokens = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if tokens is not None:
            refuse = functools.partial(self.settings.refuse, tokens.device)
            padding = kwargs.get("attention_mask")
            if isinstance(padding, torch.Tensor) and not bool(padding.all()):
                refuse(_PADDING)
            if cache is not None and cache[0].stored:
                self._check_new(cache[0].seqlen, kwargs, refuse)
            else:
                self._check_shard(length_dependent(module.config), kwargs, refuse)
        return None if cache is None else (args, kwargs | {"sharded_kv": cache})

    def _check_new(self, seqlen: int, kwargs: dict[str, Any], refuse: Callable[[str], NoReturn]) -> None:
        """New tokens are on every rank, behind all that the cache knows."""
        positions = kwargs.get("position_ids")
        if kwargs.get("cu_seqlens") is not None:
            refuse("expected no cu_seqlens with tokens after a prompt, got some")
        if positions is not None:
            expected = torch.arange(seqlen, seqlen + positions.shape[-1], device=positions.device)
            if not torch.equal(positions.reshape(-1, positions.shape[-1])[0], expected):
                refuse(f"expected position_ids from {seqlen} on, behind the cache, got {positions.tolist()}")

    def _check_shard(
        self, rotary: list[tuple[str, int]], kwargs: dict[str, Any], refuse: Callable[[str], NoReturn]
    ) -> None:
        rank, world_size = self.settings.place
        if world_size == 1:
            return
        positions = kwargs.get("position_ids")
        if positions is None:
            refuse(
                "expected position_ids of this rank's shard (shard_batch returns them), got none: the model would "
                "count from 0 on every rank"
            )
        documents = kwargs.get("cu_seqlens")
        if documents is not None:  # positions may begin anew in every document
            if rotary:
                bounds = torch.as_tensor(documents)
                wrong = disagreement(rotary, positions, int((bounds[1:] - bounds[:-1]).max()))
                if wrong is not None:
                    refuse(wrong)
            return
        key = tuple(positions.shape)
        if key not in self._known:
            seqlen = positions.shape[-1] * world_size
            expected = get_layout(self.settings.layout, world_size).positions(rank, seqlen, positions.device)
            if not torch.equal(positions.reshape(-1, positions.shape[-1])[0], expected):
                refuse(
                    f"expected position_ids of rank {rank}'s shard in the {self.settings.layout} layout, "
                    f"{_few(expected)}, got {_few(positions.reshape(-1, positions.shape[-1])[0])}"
                )
            wrong = disagreement(rotary, positions, seqlen)
            if wrong is not None:
                refuse(wrong)
            self._known.add(key)


def _few(x: torch.Tensor) -> str:
    return str(x.tolist()) if len(x) <= 4 else f"[{int(x[0])}, {int(x[1])}, ..., {int(x[-1])}]"


def mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> None:
    """The registered mask function: no mask is made. Padding has been refused before (``_CheckTokens``)."""
    if q_length != kv_length:
        raise ValueError(f"expected as many keys as queries, got {kv_length} and {q_length}: pass use_cache=False")


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    sharded_kv: Sequence[ShardedKV] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered attention function: ``query [b, h, s, d]``, ``key, value [b, h_kv, s, d]`` of this rank's shard to
    ``[b, s, h, d]``. ``s_aux``: ``[h]``, logits of attention sinks (GPT-OSS). ``sharded_kv``: of every layer; with
    a prompt stored in it, the tensors are those of new tokens, the same on every rank."""
    settings: Settings | None = module.__dict__.get(_KEY)
    if settings is None:
        raise ValueError(
            f"expected a model after enable(model, group), got a {type(module).__name__} of one without it"
        )
    wrong = None
    if attention_mask is not None:
        wrong = "expected no attention_mask (packed documents: cu_seqlens), got one"
    elif kwargs.get("cu_seq_lens_q") is not None:
        wrong = "expected cu_seqlens, the boundaries of the whole sequence's documents, got cu_seq_lens_q"
    elif kwargs.get("position_bias") is not None:
        wrong = "expected no position_bias: a bias of the scores is not supported"
    elif key.shape[2] != query.shape[2]:
        wrong = f"expected as many keys as queries, got {key.shape[2]} and {query.shape[2]}: pass use_cache=False"
    if wrong is not None:
        settings.refuse(query.device, wrong)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    function = _METHODS[settings.method][0]
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    kept = None if sharded_kv is None else sharded_kv[int(module.layer_idx)]  # type: ignore[arg-type]
    if kept is not None and kept.stored:
        out, lse = kept.attend(
            q,
            k,
            v,
            window_size=sliding_window,
            softcap=softcap,
            softmax_scale=scaling,
            backend=settings.options["backend"],
        )
    else:
        out, lse = function(
            q,
            k,
            v,
            group=settings.group,
            causal=causal,
            window_size=sliding_window,
            cu_seqlens=cu_seqlens,
            softcap=softcap,
            softmax_scale=scaling,
            dropout_p=dropout,
            return_lse=True,
            **settings.options,
        )
        if kept is not None:
            kept.store(k, v, window_size=sliding_window)
    if s_aux is not None:
        # A sink is one more key with the value 0: it takes its share of the softmax, exp(s) of exp(lse) + exp(s).
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[None, :, None]).transpose(1, 2)
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out, None
