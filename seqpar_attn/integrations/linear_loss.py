"""The loss of a Hugging Face causal model without its logits.

    enable(model, group)
    use_linear_loss(model)
    model(input_ids=..., position_ids=..., labels=..., shift_labels=..., num_items_in_batch=...).loss

At 64K tokens and 128K words the library's float32 logits take 34 GB; :func:`seqpar_attn.linear_cross_entropy` holds a
few tokens' at a time. The forward stays the model's own method for FSDP2, DDP and the Trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from ..comm import Group, LoopbackGroup
from ..layout import grid_of
from ..loss import linear_cross_entropy
from .transformers import settings_of

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""What some families multiply their logits by, or divide them by, in configurations."""


class LinearLoss:
    """A model's loss without logits, until ``remove``."""

    def __init__(self, model: Any, before: Callable[..., Any] | None):
        self._model, self._before = model, before

    def remove(self) -> None:
        """The forward that the model had before."""
        del self._model.forward
        if self._before is not None:
            self._model.forward = self._before


def use_linear_loss(model: Any, *, logits_bytes: int = 512 << 20) -> LinearLoss:
    """Let ``model`` compute its loss by ``linear_cross_entropy`` whenever it is called with labels.

    Such a call takes ``input_ids [batch, seqlen]``, ``labels`` and ``shift_labels`` of the same shape as
    ``shard_batch`` returns them, ``num_items_in_batch`` (what the sum of losses is divided by; default: the number of
    labels of the group) and whatever the decoder takes. It returns a CausalLMOutputWithPast with ``loss``, a float32
    scalar, and no logits. Calls without labels are left alone.

    Args:
        model: a causal language model of transformers whose logits are its head's output, soft-capped at most; after
            ``enable``, whose group the loss belongs to, or of one device.
        logits_bytes: see :func:`seqpar_attn.linear_cross_entropy`.

    Raises:
        ValueError: a model without a head, one that scales its logits, or one with a loss of its experts besides.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = getattr(model, "base_model", model)
    if head is None or decoder is model:
        raise ValueError(f"expected a causal language model with a head, got {type(model).__name__}")
    config = model.config.get_text_config()
    scaled = {name: getattr(config, name) for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)}
    if scaled:
        raise ValueError(f"expected a model whose logits are its head's output, got {scaled}")
    if getattr(config, "output_router_logits", False):
        raise ValueError("expected output_router_logits=False, got True: the loss of the experts would be left out")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    inner, before = model.forward, model.__dict__.get("forward")
    softcap = getattr(config, "final_logit_softcapping", None)

    @functools.wraps(inner)
    def forward(
        input_ids: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return inner(input_ids, *args, **kwargs)
        if shift_labels is None:
            assert labels is not None
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        hidden = decoder(input_ids, *args, **kwargs)[0]
        weight, bias = head.weight, getattr(head, "bias", None)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        group: Group = None  # a sum is this rank's alone
        if num_items_in_batch is None:
            settings = settings_of(model)
            found = LoopbackGroup(1) if settings is None else settings.group
            if grid_of(found) is not None:
                raise ValueError("expected num_items_in_batch (method 'usp': no one group has all tokens), got none")
            group = cast(Group, found)
        loss: Any = linear_cross_entropy(
            hidden,
            weight,
            shift_labels,
            bias,
            softcap=softcap,
            reduction="mean" if num_items_in_batch is None else "sum",
            group=group,
            logits_bytes=logits_bytes,
        )
        return CausalLMOutputWithPast(loss=loss if num_items_in_batch is None else loss / num_items_in_batch)

    model.forward = forward
    return LinearLoss(model, before)
