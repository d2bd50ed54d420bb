"""Text from a Hugging Face model whose prompt does not fit one GPU: its key-value cache stays split over the ranks.

    from seqpar_attn.integrations.generation import generate
    from seqpar_attn.integrations.transformers import enable

    enable(model, group)
    ids = generate(model, input_ids, max_new_tokens=20)  # every rank passes the whole prompt and gets the same

:func:`prefill` runs all of a prompt but its last token, sharded; :func:`generate` decodes greedily from there. For
sampling give the cache to the library: ``model.generate(input_ids, past_key_values=prefill(model, input_ids),
do_sample=True)``, with one random seed on all ranks. While decoding, every rank computes the same tokens; only
attention is divided, see :mod:`seqpar_attn.decode`. Importing this module needs transformers.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..batch import shard_batch
from ..comm import agree
from ..decode import ShardedKV, communicators
from .transformers import Settings, settings_of


class _Layer(CacheLayerMixin):
    """A layer as the library sees it: its keys pass through, and the attention function keeps its part of them."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, kv: ShardedKV):
        super().__init__()
        self.kv = kv

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.kv.seqlen if self.kv.stored else 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        raise ValueError("expected a new ShardedCache for a new prompt, got reset()")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise ValueError("expected greedy decoding or sampling with a ShardedCache, got a beam search")


class ShardedCache(Cache):
    """A model's key-value cache that stays split over the ranks; made by :func:`prefill`.

    ``sharded``: a :class:`seqpar_attn.decode.ShardedKV` per layer, which also knows how many tokens each rank holds.
    """

    def __init__(self, layers: int, seqlen: int, settings: Settings, reserve: int = 0):
        self.sharded = [
            ShardedKV(seqlen, group=settings.group, layout=settings.layout, reserve=reserve) for _ in range(layers)
        ]
        super().__init__(layers=[_Layer(kv) for kv in self.sharded])


def _agreed(model: Any, input_ids: torch.Tensor, max_new_tokens: int, **numbers: object) -> Settings:
    """The model's settings, if all is well with the call and it is the same on all ranks; else a ValueError on all."""
    settings = settings_of(model)
    if settings is None:
        raise ValueError(f"expected a model after enable(model, group), got a {type(model).__name__} without it")
    fields: dict[str, object] = {}
    error: ValueError | None = None
    if input_ids.dim() != 2 or input_ids.shape[1] < 1 or input_ids.is_floating_point():
        got = f"{input_ids.dtype} {list(input_ids.shape)}"
        error = ValueError(f"expected integer input_ids of shape [batch, seqlen >= 1], got {got}")
    elif max_new_tokens < 0:
        error = ValueError(f"expected max_new_tokens >= 0, got {max_new_tokens}")
    elif model.training:
        error = ValueError("expected a model in evaluation mode (model.eval()), got one in training")
    else:
        digest = hashlib.sha256(input_ids.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        fields = {"shape of input_ids": tuple(input_ids.shape), "input_ids (hash)": digest}
        fields |= {"max_new_tokens": max_new_tokens, **numbers}
    agree(communicators(settings.group, input_ids.device), fields, error)
    return settings


@torch.no_grad()
def prefill(model: Any, input_ids: torch.Tensor, *, max_new_tokens: int = 0) -> ShardedCache:
    """The cache of all tokens of ``input_ids`` but the last one, which the first decoding step takes.

    Args:
        model: a transformers decoder after :func:`~seqpar_attn.integrations.transformers.enable`, in evaluation mode.
        input_ids: integer ``[batch, seqlen]``, the same on every rank, prompts of one length without padding; any
            length. What the shards are padded with is never attended and not kept.
        max_new_tokens: how many tokens to have room for; beyond them the cache still grows, by copies.

    Raises ValueError on every rank for a model that is not enabled or in training, bad tokens, and prompts that differ
    between ranks.
    """
    settings = _agreed(model, input_ids, max_new_tokens)
    layers, seqlen = model.config.get_text_config().num_hidden_layers, input_ids.shape[1] - 1
    cache = ShardedCache(layers, seqlen, settings, max_new_tokens + 1)
    if seqlen:
        batch = shard_batch(input_ids[:, :-1], layout=settings.layout, group=settings.group)
        _call(model.base_model, cache, input_ids=batch.input_ids, position_ids=batch.position_ids)
    return cache


def _call(model: Any, cache: ShardedCache, **inputs: torch.Tensor) -> Any:
    """The argument's name has changed in transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(**inputs, **{name: cache}, use_cache=True)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
) -> torch.Tensor:
    """Greedy decoding: ``[batch, seqlen + new]``, the prompt and at most ``max_new_tokens`` more, on every rank.

    Args:
        model, input_ids: as for :func:`prefill`.
        eos_token_id: a row ends with the first of these, and is filled up with ``pad_token_id``; None: no row ends.

    Raises ValueError on every rank, see :func:`prefill`.
    """
    ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
    settings = _agreed(model, input_ids, max_new_tokens, eos_token_id=ends, pad_token_id=pad_token_id)
    cache = prefill(model, input_ids, max_new_tokens=max_new_tokens)
    done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        logits = _call(model, cache, input_ids=input_ids[:, -1:]).logits
        new = _of_first_rank(settings, logits[:, -1].argmax(-1)).masked_fill(done, pad_token_id)
        input_ids = torch.cat([input_ids, new[:, None].to(input_ids.dtype)], 1)
        if ends:
            done |= torch.isin(new, torch.tensor(ends, device=new.device))
            if bool(done.all()):
                break
    return input_ids


def _of_first_rank(settings: Settings, x: torch.Tensor) -> torch.Tensor:
    """Rank 0's ``x``: should rounding differ between devices, the ranks still go on from one token."""
    for comm in reversed(communicators(settings.group, x.device)):  # of a grid: the first row's, then each row's first
        if len(comm.local_ranks) < comm.world_size:
            if comm.local_ranks[0] == 0:
                comm.exchange([[(peer, x) for peer in range(1, comm.world_size)]], [[]]).wait()
            else:
                comm.exchange([[]], [[(0, x)]]).wait()
    return x
