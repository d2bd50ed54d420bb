"""Does a model train on a split sequence as it would on one device? One call, run before the long one.

seqpar_attn.verify(model, {"input_ids": input_ids}, group)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...api import Grid
from ...batch import shard_batch
from ...comm import Group
from ...kept import Watching
from ...layout import Layout, grid_of, holds_all, layout_for, resolve_group
from ..transformers import enabled
from .record import Record, compare, joined
from .report import Findings, Report, VerificationError, failed_call, judge

__all__ = ["Report", "VerificationError", "verify"]

Batch = dict[str, Any]
Step = Callable[[Any, Batch], torch.Tensor]

_TOLERANCES = {torch.bfloat16: (5e-2, 5e-3), torch.float16: (1e-2, 1e-3)}
"""Relative, of results and gradients, and of the loss. Faults are larger than rounding errors by far."""
_TOLERANCE = 2e-4, 1e-5

IGNORE = -100


def verify(
    model: Any,
    batch: torch.Tensor | Mapping[str, Any],
    group: Group | Grid = None,
    *,
    step: Step | None = None,
    layout: str | None = None,
    grad_reduction: str = "sum",
    tokens_per_rank: int = 64,
    tolerance: float | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Run a training step on a short input twice, sharded over ``group`` and whole on every rank, and compare.

    Compared are what every module takes and gives, the loss and every parameter's gradient. The report names the first
    module that differs and, where it can be told, the cause: attention that was not replaced, positions that are not
    the shard's, labels shifted after sharding, gradients scaled by the group's size. The model's parameters, gradients
    and mode are left as they were.

    Args:
        model: a transformers decoder with a language-model head, after
            :func:`seqpar_attn.integrations.transformers.enable` and before it is wrapped for data parallelism. The
            whole sequence is run with the attention that it had before.
        batch: the same on every rank: ``input_ids``, integer ``[batch, seqlen]``, or a mapping of them and, optionally,
            ``labels`` (not shifted, -100 counts nothing) and ``cu_seqlens``. Cut to a short length.
        group: as for ``enable``, by default the one that was given to it.
        step: your own training step, to be verified instead of the usual one: ``step(model, batch)`` gets the model and
            the short *whole* batch (a dict of ``input_ids``, ``labels``, ``cu_seqlens``), shards it and returns this
            rank's loss, not yet differentiated.
        layout: which tokens a rank holds; by default that of ``enable``, else "zigzag".
        grad_reduction: what training does with the ranks' losses and gradients: "sum", or "mean" as
            DistributedDataParallel and FSDP do unless told otherwise.
        tokens_per_rank: how much of the sequence is used.
        tolerance: largest relative error of a module's result, and a quarter of that of a parameter's gradient; by
            default 5e-2 in bfloat16, 1e-2 in float16, else 2e-4.
        raise_on_failure: False returns the report of a failure, too.

    Returns:
        A report, the same on every rank; ``print`` it.

    Raises:
        VerificationError: (a RuntimeError, with ``report``) on every rank, if anything differs.
        ValueError: on every rank, if the batch is not one, is too short, or differs between ranks.
    """
    handle = enabled(model)
    if group is None and handle is not None:
        group = handle.settings.group
    rank, world_size, _ = resolve_group(group)
    if grad_reduction not in ("sum", "mean"):
        raise ValueError(f"expected grad_reduction to be 'sum' or 'mean', got {grad_reduction!r}")
    chosen = layout_for(layout or (handle.settings.layout if handle is not None else "zigzag"), world_size)
    short = _agreed_batch(batch, chosen, tokens_per_rank, group)
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
    usual, loss_tolerance = _TOLERANCES.get(dtype, _TOLERANCE)
    tolerance = usual if tolerance is None else tolerance
    run = step or (lambda model, batch: _usual_step(model, batch, chosen, group))

    record, watching = Record(model), Watching()
    with _undisturbed(model):
        with record, watching:
            share, errors = _attempt(lambda: run(model, dict(short)), group)
        if not errors:  # a rank without a loss has no backward pass, in which the others would wait for it
            loss, errors = _attempt(lambda: _differentiated(share), group)
        if errors:
            return _finish(failed_call(errors, tolerance), raise_on_failure)
        gradients = _taken_gradients(model)
        handle = enabled(model)  # once more: some are enabled by their first call
        with handle.paused() if handle is not None else contextlib.nullcontext():
            whole, expected_loss = _on_one_device(model, short)
        expected = _taken_gradients(model)

    def mine(x: torch.Tensor) -> torch.Tensor:
        return chosen.shard_all(x) if holds_all(group) else chosen.shard(x, rank)

    scale = 1 / world_size if grad_reduction == "mean" and not holds_all(group) else 1.0
    for x in gradients.values():
        _add_up(x, group)
        x.mul_(scale)
    part = shard_batch(short["input_ids"], None, short["cu_seqlens"], layout=chosen, rank=rank, world_size=world_size)
    if holds_all(group):
        part = shard_batch(short["input_ids"], None, short["cu_seqlens"], layout=chosen, group=group)
    local = {
        "loss": loss,
        "calls": watching.calls,
        "positions": _wrong_positions(record.positions, part.position_ids.cpu()),
        "modules": compare(record, joined(whole), mine, part.seqlen),
    }
    everyone = _everywhere(local, group)
    logits = joined(whole)["", "output", 0]
    errors_of, factor, rest = _gradient_errors(gradients, expected)
    findings = Findings(
        world_size=world_size,
        tolerance=tolerance,
        loss_tolerance=loss_tolerance,
        attention_calls=min(x["calls"] for x in everyone),
        positions=next((f"rank {i}: {x['positions']}" for i, x in enumerate(everyone) if x["positions"]), None),
        modules=_relative([x["modules"] for x in everyone]),
        loss=sum(x["loss"] for x in everyone) * scale,
        expected_loss=expected_loss,
        losses_of_cut_labels=_losses_of_cut_labels(logits, short, chosen, holds_all(group)),
        gradients=errors_of,
        gradient_factor=factor,
        gradient_rest=rest,
    )
    # Rank 0's, so that last bits in which ranks may differ cannot make two verdicts.
    return _finish(judge(_everywhere(findings, group)[0]), raise_on_failure)


def _finish(report: Report, raise_on_failure: bool) -> Report:
    if raise_on_failure and not report.ok:
        raise VerificationError(report)
    return report


# Between ranks --------------------------------------------------------------------------------------------------------


def _everywhere(x: Any, group: Any) -> list[Any]:
    """``x`` of every rank, in rank order."""
    grid = grid_of(group)
    if grid is not None:
        return list(itertools.chain(*_everywhere(_everywhere(x, grid[1]), grid[0])))
    _, world_size, process_group = resolve_group(group)
    if process_group is None:
        return [x]
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, x, group=process_group)
    return found


def _attempt(function: Callable[[], Any], group: Any) -> tuple[Any, dict[int, str]]:
    """The function's result, and the errors of all ranks, of any kind: no rank goes on alone."""
    result, error = None, None
    try:
        result = function()
    except Exception as complaint:
        error = f"{type(complaint).__name__}: {complaint}"
    return result, {rank: x for rank, x in enumerate(_everywhere(error, group)) if x is not None}


def _add_up(x: torch.Tensor, group: Any) -> None:
    for part in grid_of(group) or (group,):
        process_group = resolve_group(part)[2]
        if process_group is not None:
            dist.all_reduce(x, group=process_group)


def _agreed_batch(batch: Any, layout: Layout, tokens_per_rank: int, group: Any) -> Batch:
    """The short batch; ValueError on every rank if there is none, or if two ranks have different ones."""
    error: str | None = None
    short: Batch = {}
    try:
        short = _short(batch, layout, tokens_per_rank)
    except ValueError as complaint:
        error = str(complaint)
    content = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in short.items()}
    answers = _everywhere((error, content), group)
    complaints = [f"rank {i}: {answer[0]}" for i, answer in enumerate(answers) if answer[0] is not None]
    if complaints:
        raise ValueError("; ".join(complaints))
    for i, (_, other) in enumerate(answers):
        for name, x in answers[0][1].items():
            if other[name] != x:
                raise ValueError(f"expected the same {name} on every rank, got others on rank {i} than on rank 0")
    return short


def _short(batch: Any, layout: Layout, tokens_per_rank: int) -> Batch:
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
        raise ValueError(f"expected a batch with input_ids, got {type(batch).__name__}")
    input_ids, labels, bounds = batch["input_ids"], batch.get("labels"), batch.get("cu_seqlens")
    # Checks what it is given, and its labels.
    shard_batch(input_ids, labels, bounds, layout="contiguous", rank=0, world_size=1)
    length = min(input_ids.shape[1], max(tokens_per_rank, 1) * layout.world_size)
    length -= length % layout.multiple
    if not length:
        raise ValueError(f"expected at least {layout.multiple} tokens, got {input_ids.shape[1]}")
    if bounds is not None:
        as_ints: Sequence[int] = bounds.tolist() if isinstance(bounds, torch.Tensor) else bounds
        bounds = [int(c) for c in as_ints if c < length] + [length]
    labels = (input_ids if labels is None else labels)[:, :length]
    return {"input_ids": input_ids[:, :length], "labels": labels, "cu_seqlens": bounds}


# The two runs ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients are put back afterwards; nothing is dropped out meanwhile."""
    kept = [(p, p.grad) for p in model.parameters()]
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for p, _ in kept:
        p.grad = None
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad
        for module in dropouts:
            module.train()


def _taken_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
    return found


def _differentiated(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def _usual_step(model: Any, batch: Batch, layout: Layout, group: Any) -> torch.Tensor:
    part = shard_batch(batch["input_ids"], batch["labels"], batch["cu_seqlens"], layout=layout, group=group)
    packed = {} if batch["cu_seqlens"] is None else {"cu_seqlens": part.cu_seqlens}
    loss: torch.Tensor = model(
        input_ids=part.input_ids,
        position_ids=part.position_ids,
        labels=part.labels,
        shift_labels=part.labels,
        num_items_in_batch=part.num_valid,
        use_cache=False,
        **packed,
    ).loss
    return loss


def _on_one_device(model: Any, batch: Batch) -> tuple[list[Record], float]:
    """Document after document, so that any attention will do; gradients add up in the parameters."""
    whole = shard_batch(batch["input_ids"], batch["labels"], batch["cu_seqlens"], rank=0, world_size=1)
    bounds = batch["cu_seqlens"] or [0, whole.seqlen]
    records, total = [], 0.0
    for first, last in itertools.pairwise(bounds):
        if first == last:
            continue
        labels = whole.labels[:, first:last].contiguous()  # the library views them
        with Record(model) as record:
            loss = model(
                input_ids=batch["input_ids"][:, first:last],
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=whole.num_valid,
                use_cache=False,
            ).loss
        loss.backward()
        total += loss.item()
        records.append(record)
    return records, total


# What can be said about them ------------------------------------------------------------------------------------------


def _relative(ranks: list[list[tuple[str, str, float, float]]]) -> tuple[tuple[str, str, float], ...]:
    """Errors over the tokens of all ranks."""
    results = []
    for events in zip(*ranks):
        error, norm = sum(x[2] for x in events), sum(x[3] for x in events)
        results.append((events[0][0], events[0][1], math.sqrt(error / norm) if norm else math.sqrt(error)))
    return tuple(results)


def _wrong_positions(found: torch.Tensor | None, expected: torch.Tensor) -> str | None:
    if found is not None and found.shape[-1] == expected.shape[1] and bool((found == expected).all()):
        return None
    few = "none" if found is None else f"{found.flatten()[:4].tolist()} and so on"
    return (
        f"position_ids were not sharded as the tokens were: expected {expected[0, :4].tolist()} and so on, got {few}; "
        "pass those of shard_batch"
    )


def _gradient_errors(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[dict[str, float], float, float]:
    """Relative error per parameter; the factor that fits all of them best, and the relative error that it leaves."""
    norms = {name: x.double().norm().item() for name, x in expected.items()}
    largest = max(norms.values(), default=0.0)
    errors, product, squares, found_squares = {}, 0.0, 0.0, 0.0
    for name, truth in expected.items():
        x, truth = found[name].double(), truth.double()
        # Where a gradient is next to nothing beside the others it is nothing but their rounding errors.
        errors[name] = (x - truth).norm().item() / max(norms[name], 1e-3 * largest, 1e-30)
        product += (x * truth).sum().item()
        squares += truth.square().sum().item()
        found_squares += x.square().sum().item()
    factor = product / squares if squares else math.nan
    rest = max(found_squares - factor * product, 0.0)
    return errors, factor, math.sqrt(rest / found_squares) if found_squares else math.nan


def _losses_of_cut_labels(logits: torch.Tensor, batch: Batch, layout: Layout, together: bool) -> tuple[float, ...]:
    """The loss if labels had been shifted shard by shard: over the tokens of all ranks, or from each rank's mean."""
    labels, size = batch["labels"].cpu(), layout.world_size
    shards = [layout.shard_all] if together else [lambda x, r=r: layout.shard(x, r) for r in range(size)]
    sums, counts = [], []
    for shard in shards:
        shifted = nn.functional.pad(shard(labels)[:, 1:], (0, 1), value=IGNORE)
        flat = shard(logits).double().flatten(0, 1), shifted.flatten().long()
        sums.append(nn.functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum").item())
        counts.append(int((shifted != IGNORE).sum()))
    valid = shard_batch(batch["input_ids"], batch["labels"], batch["cu_seqlens"], rank=0, world_size=1).num_valid
    means = sum(x / max(n, 1) for x, n in zip(sums, counts))
    shares = sum(sums) / max(valid, 1)
    return shares, shares / size, means, means / size
