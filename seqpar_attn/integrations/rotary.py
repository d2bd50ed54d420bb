"""Rotary embeddings whose frequencies depend on the length, which a rank that has a shard only does not see."""

from __future__ import annotations

from typing import Any

import torch


def length_dependent(config: Any) -> list[tuple[str, int]]:
    """``(type, length from which on it matters)`` of every such set of parameters in a transformers configuration."""
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    sets = [given] if "rope_type" in given else [x for x in given.values() if isinstance(x, dict)]
    found = []
    for parameters in sets:
        kind = parameters.get("rope_type") or "default"
        if kind == "longrope" or "dynamic" in kind:
            border = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append((kind, int(border)))
    return found


def disagreement(kinds: list[tuple[str, int]], positions: torch.Tensor, longest: int) -> str | None:
    """What is wrong with this rank's ``positions``, where the longest document has ``longest`` tokens, or None.

    The library takes the largest position *of the call* for the length. "longrope" only asks on which side of a border
    it is; the frequencies of "dynamic" move with the length itself.
    """
    for kind, border in kinds:
        if longest <= border:
            continue
        here = int(positions.max()) + 1
        if kind != "longrope":
            return (
                f"expected at most {border} positions with rotary embeddings of type {kind!r}, whose frequencies "
                f"follow the length, got {longest} split over ranks: use a fixed type (yarn, linear, llama3)"
            )
        if here <= border:
            return (
                f"expected positions beyond {border} on every rank (longrope's frequencies change there, for {longest} "
                f"tokens), got {here} at most on this one: use the zigzag layout, and a longer sequence or a fixed type"
            )
    return None
