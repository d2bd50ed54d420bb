"""Checkpoints by torch.distributed.checkpoint: every rank writes its shards, and any number of ranks can read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .ranks import Ranks

RUN = "run.json"


def finished(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end (their metadata comes last), oldest first."""
    return sorted(x.parent for x in folder.glob("step-*/.metadata"))


def begin(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to resume from, or None; for the first rank. Notes the run's ``settings`` in ``folder``.

    Raises:
        ValueError: a folder of a run with other settings, or, without ``resume``, one that has checkpoints.
    """
    settings = json.loads(json.dumps(settings))
    file = folder / RUN
    found = finished(folder)
    if found and not resume:
        raise ValueError(f"expected --resume or an --output-dir without checkpoints, got {found[-1]}")
    if resume and file.exists():
        before = json.loads(file.read_text())
        differ = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if differ:
            was, now = ({name: x.get(name) for name in differ} for x in (before, settings))
            raise ValueError(f"expected the configuration that {folder} was begun with, {was}, got {now}")
    elif found:
        raise ValueError(f"expected {file} beside the checkpoints of {folder}, got none")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")
    return found[-1] if found else None


def save(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, keep: int, ranks: Ranks) -> None:
    """Everything that step ``step`` begins with; older checkpoints than the last ``keep`` are removed."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step-{step:08d}")

    def prune() -> None:
        for old in finished(folder)[:-keep]:
            shutil.rmtree(old)

    ranks.on_first(prune)


def load(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Weights and optimizer as they were; the number of steps done."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(checkpoint.name.removeprefix("step-"))
