"""What each module of a model takes in and gives out during a forward pass, and how it compares with another one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

Key = tuple[str, str, int]
"""Module, "input" or "output", and how often the module was called before."""


def _tensors(x: Any) -> Iterable[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from _tensors(value)


def _first(*values: Any) -> torch.Tensor | None:
    """The first tensor that can hold something per token."""
    return next((x for x in _tensors(values) if x.is_floating_point() and x.dim() > 1), None)


class Record:
    """While entered: copies, on the host, of what the modules of ``model`` take and give, in the order of events."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.events: dict[Key, torch.Tensor] = {}
        self.positions: torch.Tensor | None = None
        """The first ``position_ids`` that any module was given."""
        self._hooks: list[Any] = []
        self._calls: dict[str, int] = {}

    def __enter__(self) -> Record:
        for name, module in self.model.named_modules():
            before = functools.partial(self._before, name)
            after = functools.partial(self._after, name)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[name] = self._calls.get(name, -1) + 1
        self._put(name, "input", _first(args, kwargs))
        positions = kwargs.get("position_ids")
        if self.positions is None and isinstance(positions, torch.Tensor):
            self.positions = positions.detach().cpu().clone()

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._put(name, "output", _first(output))

    def _put(self, name: str, what: str, x: torch.Tensor | None) -> None:
        if x is not None:
            self.events[name, what, self._calls[name]] = x.detach().cpu().clone()


def joined(records: list[Record]) -> dict[Key, torch.Tensor]:
    """Records of the parts of a sequence as one of the whole, as far as a dimension of tokens can be told."""
    if len(records) == 1:
        return records[0].events
    keys = [key for key in records[0].events if all(key in other.events for other in records)]
    return {key: torch.cat([other.events[key] for other in records], 1) for key in keys}


def compare(
    found: Record, expected: Mapping[Key, torch.Tensor], shard: Callable[[torch.Tensor], torch.Tensor], length: int
) -> list[tuple[str, str, float, float]]:
    """Per event (module, what, squared error, squared norm), of what has tokens along dimension 1. ``shard`` takes this
    rank's tokens from a tensor of the whole sequence, which has ``length`` of them."""
    results = []
    for key, x in found.events.items():
        whole = expected.get(key)
        if whole is None or whole.dim() < 2 or whole.shape[1] != length:
            continue
        truth = shard(whole).double()
        if truth.shape == x.shape:
            error, norm = (x.double() - truth).square().sum().item(), truth.square().sum().item()
            results.append((key[0], key[1], error, norm))
    return results
