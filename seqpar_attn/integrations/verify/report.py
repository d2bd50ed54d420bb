"""What a verification found, and what that says about its cause. Numbers in, words out: no tensors, no ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

GRADIENTS = 4
"""How many times as far as results gradients may be off: roundings disturb those of queries and keys more."""


@dataclass(frozen=True)
class Findings:
    """What was measured; the same on every rank."""

    world_size: int
    tolerance: float
    loss_tolerance: float
    attention_calls: int
    """Of this package, in the forward pass of a rank; the fewest of any."""
    positions: str | None
    """What is wrong with the positions that the model saw, or None."""
    modules: tuple[tuple[str, str, float], ...]
    """(module, "input" or "output", relative error) in the order of the forward pass."""
    loss: float
    expected_loss: float
    losses_of_cut_labels: tuple[float, ...]
    """What the loss would be if every rank had shifted labels inside its shard, in several normalisations."""
    gradients: Mapping[str, float]
    """Relative error of each parameter's."""
    gradient_factor: float
    """What the expected gradients, all together, are best multiplied by to be the found ones."""
    gradient_rest: float
    """Relative error of what is left then."""


@dataclass(frozen=True)
class Report:
    """The verdict of :func:`seqpar_attn.verify`, equal on every rank. ``str()`` is readable."""

    ok: bool
    causes: tuple[str, ...]
    """What is wrong, the likeliest cause first; empty if nothing is."""
    first_module: str | None
    """The first module, in the order of the forward pass, whose result differs; None if none does."""
    loss: float
    expected_loss: float
    worst_gradient: tuple[str, float] | None
    """The parameter whose gradient has the largest relative error, and that error."""
    tolerance: float

    def __str__(self) -> str:
        lines = [f"verification {'passed' if self.ok else 'FAILED'} (tolerance {self.tolerance:.1e})"]
        lines += [f"  cause: {cause}" for cause in self.causes]
        if not self.ok:
            lines.append(f"  first module that differs: {self.first_module or 'none'}")
        lines.append(f"  loss: {self.loss:.8g} sharded, {self.expected_loss:.8g} on one device")
        if self.worst_gradient is not None:
            lines.append(f"  worst gradient: {self.worst_gradient[0]}, relative error {self.worst_gradient[1]:.2e}")
        return "\n".join(lines)


class VerificationError(RuntimeError):
    """Sharded and unsharded training differ. ``report`` says how."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report


def first_difference(findings: Findings) -> str | None:
    """The module whose own doing the first difference is. Inputs that differ, although all results before did not, are
    the doing of the module that made them: the parent."""
    for module, what, error in findings.modules:
        if not error <= findings.tolerance:
            return (module if what == "output" else module.rpartition(".")[0]) or "the model itself"
    return None


def failed_call(errors: Mapping[int, str], tolerance: float) -> Report:
    """Of a step that raised on some ranks."""
    causes = tuple(dict.fromkeys(f"rank {rank}: the step raised {error}" for rank, error in errors.items()))
    return Report(False, causes, None, math.nan, math.nan, None, tolerance)


def judge(f: Findings) -> Report:
    """The verdict."""
    module = first_difference(f)
    worst = max(f.gradients.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=None)
    wrong_loss = not _close(f.loss, f.expected_loss, f.loss_tolerance)
    wrong_gradients = worst is not None and not worst[1] <= GRADIENTS * f.tolerance
    ok = module is None and not wrong_loss and not wrong_gradients
    causes = [] if ok else [x for x in _causes(f, module, wrong_loss, wrong_gradients) if x is not None]
    return Report(ok, tuple(causes), module, f.loss, f.expected_loss, worst, f.tolerance)


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(b), 1e-30)


def _causes(f: Findings, module: str | None, wrong_loss: bool, wrong_gradients: bool) -> list[str | None]:
    if module is not None:
        found = [_attention(f), f.positions]
        return found if any(found) else [f"{module} computes something else than on one device"]
    if wrong_loss:
        return [_scaled_loss(f) or _labels(f) or _loss_alone()]
    return [_scaled_gradients(f) or "the forward passes agree, the gradients do not: look at the backward pass"]


def _attention(f: Findings) -> str | None:
    if f.attention_calls or f.world_size == 1:
        return None
    return (
        "attention was not replaced: none of this package's ran, so every rank attended to its own tokens only; call "
        "enable(model, group)"
    )


def _labels(f: Findings) -> str | None:
    if not any(_close(f.loss, cut, f.loss_tolerance) for cut in f.losses_of_cut_labels):
        return None
    return (
        "labels were shifted after sharding: every shard lost the label at its borders; shift them on the whole "
        "sequence, as shard_batch does, and pass them as labels and shift_labels"
    )


def _size(factor: float, f: Findings, tolerance: float) -> str | None:
    """The group's size as a factor, in words."""
    if f.world_size == 1:
        return None
    if _close(factor, f.world_size, tolerance):
        return f"{f.world_size} times (the size of the group)"
    if _close(factor, 1 / f.world_size, tolerance):
        return f"1/{f.world_size} (1 / the size of the group) times"
    return None


def _scaled_loss(f: Findings) -> str | None:
    factors = [f.world_size, 1 / f.world_size]
    nearest = min(factors, key=lambda factor: abs(f.loss - factor * f.expected_loss))
    if any(abs(f.loss - cut) < abs(f.loss - nearest * f.expected_loss) for cut in f.losses_of_cut_labels):
        return None  # that fits better
    size = _size(f.loss / f.expected_loss, f, f.loss_tolerance) if f.expected_loss else None
    return size and (
        f"the loss, and gradients with it, were scaled by the group's size: they are {size} what they should be. A "
        "loss that is a share of the whole belongs to gradients that are summed, one that is the group's size times "
        "as large to gradients that are averaged"
    )


def _loss_alone() -> str:
    return (
        "the model's results agree, the losses do not: look at the labels, at the tokens that count, and at the number "
        "that the sum is divided by (num_valid of shard_batch)"
    )


def _scaled_gradients(f: Findings) -> str | None:
    if not f.gradient_rest <= GRADIENTS * f.tolerance:
        return None
    size = _size(f.gradient_factor, f, f.tolerance)
    if size is None:
        return f"all gradients are {f.gradient_factor:.6g} times what they should be"
    return (
        f"gradients were scaled by the group's size: they are {size} what they should be. Sum the gradients of losses "
        'that add up; where a framework averages them, the losses need grad_reduction="mean"'
    )
