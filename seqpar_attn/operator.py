"""Operators of torch's dispatcher, with less Python around each call than ``torch.library.custom_op`` has.

That one fills in defaults, looks for results that are their own inputs and chooses among devices in every call, which
takes much of a short call's host time. What is defined here sees the same dispatcher, so that torch.compile traces it
and selective checkpointing saves its results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("seqpar_attn", "DEF")


def define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: type[torch.autograd.Function] | None = None,
) -> Callable[..., Any]:
    """The operator of ``schema``, ``name(arguments) -> results``, the same on every device. It has no defaults, and
    changes or returns no argument.

    ``fake`` makes results without values. ``differentiable`` is applied where a gradient is asked for; its ``forward``
    calls the operator through :func:`below_autograd`. Without it there is no gradient.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    # Dynamo would look into what a compiled graph calls, too.
    _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqpar_attn::{name}", fake, lib=_library)
    operator = getattr(torch.ops.seqpar_attn, name).default
    if differentiable is not None:

        def with_gradient(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, torch.Tensor)):
                return differentiable.apply(*arguments)
            return below_autograd(operator, *arguments)

        _library.impl(name, with_gradient, "Autograd")
    return operator


def below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
