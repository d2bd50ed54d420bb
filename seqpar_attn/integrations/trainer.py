"""transformers' Trainer with every sequence split over ranks, and losses that are means over all tokens.

    from seqpar_attn.integrations.accelerate import SequenceParallelConfig
    from seqpar_attn.integrations.trainer import SequenceParallelTrainer

    arguments = TrainingArguments(..., parallelism_config=SequenceParallelConfig(cp_size=4))
    SequenceParallelTrainer(model, arguments, train_dataset=..., method="ring").train()

Batches are those of one device: ``input_ids`` and ``labels`` ``[batch, seqlen]``, unshifted. Packed documents come as
``cu_seqlens`` (or ``cu_seq_lens_q``, as the library's DataCollatorWithFlattening(return_flash_attn_kwargs=True) names
them), the same for every row.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from transformers import Trainer

from ..batch import shard_batch
from ..comm import LoopbackGroup
from ..layout import resolve_group
from .accelerate import sequence_mesh
from .transformers import enable

IGNORE = -100
_DOCUMENTS = ("cu_seqlens", "cu_seq_lens_q")
_REDUNDANT = (*_DOCUMENTS, "attention_mask", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keys of a batch that are used here and not passed on."""


class SequenceParallelTrainer(Trainer):
    """A Trainer whose processes split sequences, over the ``cp`` dimension of accelerate's mesh.

    A step's loss is the mean over the tokens with a label of *all* its batches: of every rank, every accumulated batch
    and every document (whose last token predicts nothing). So are an evaluation's, over the whole data set. Weights and
    logged losses are those of one device up to rounding.

    Args:
        method, layout, backend, deterministic, transfer, ranks_per_host: see
            ``seqpar_attn.integrations.transformers.enable``, which is called on the model.
        all others: the Trainer's.

    Raises:
        ValueError: options that would give a wrong loss (see ``_check_arguments``). In training, on every rank: padding
            before the end of a row or with labels, positions that begin anew without document boundaries, or ranks
            that would split different batches.
    """

    def __init__(
        self,
        *args: Any,
        method: str = "ring",
        layout: str | None = None,
        backend: str = "auto",
        deterministic: bool = False,
        transfer: str = "pull",
        ranks_per_host: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sequence = sequence_mesh(self.accelerator)
        self._sequence_rank, self._sequence_size = (
            (0, 1) if self._sequence is None else resolve_group(self._sequence)[:2]
        )
        self._check_arguments()
        self._group = LoopbackGroup(1) if self._sequence is None else self._sequence  # None would be all processes
        self._enabled = enable(
            self.model,
            self._group,
            method=method,
            layout=layout,
            backend=backend,
            deterministic=deterministic,
            transfer=transfer,
            ranks_per_host=ranks_per_host,
        )
        self._evaluated: torch.Tensor | None = None

    def _check_arguments(self) -> None:
        loaders: Any = self.args.accelerator_config
        wrong = {
            "average_tokens_across_devices=True": not self.args.average_tokens_across_devices,
            "label_smoothing_factor=0, which would shift labels inside a shard": self.label_smoother is not None,
            "no compute_loss_func": self.compute_loss_func is not None,
            "no compute_metrics: predictions are sharded": self.compute_metrics is not None,
            "one GPU per process": self.args.n_gpu > 1,
            "accelerator_config.split_batches=False": loaders.split_batches,
            "a model that takes num_items_in_batch": not self.model_accepts_loss_kwargs,
            "a causal language model": not self._loss_shifts_labels,
        }
        for expected, found in wrong.items():
            if found:
                raise ValueError(f"expected {expected}, got otherwise")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Or the Trainer would remove them from a data set without a word: no model names them among its arguments.
        known: Any = self._signature_columns
        self._signature_columns = [*dict.fromkeys([*known, *_DOCUMENTS])]  # type: ignore[assignment]

    def get_train_dataloader(self) -> Any:
        return self._checked_loader(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._checked_loader(super().get_eval_dataloader(eval_dataset))

    def _checked_loader(self, loader: Any) -> Any:
        if self._sequence_size > 1 and isinstance(loader, DataLoaderDispatcher):
            raise ValueError(
                "expected accelerator_config.dispatch_batches=False with an iterable data set, got a loader that sends "
                "each rank a batch of its own"
            )
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Labels that count in these batches of all ranks: one gather, which also tells every rank of bad batches."""
        if not batch_samples:
            return None
        count, complaint = 0, ""
        try:
            for batch in batch_samples:
                count += int((_targets(batch) != IGNORE).sum())
        except ValueError as error:
            complaint = str(error)
        # Ranks of one sequence must have the same tokens: their sum is compared with those of the first rank.
        tokens = 0 if complaint else sum(int(batch["input_ids"].sum()) for batch in batch_samples)
        mine = torch.tensor([[count, tokens, bool(complaint)]], device=device)
        every = self.accelerator.gather(mine) if self.args.world_size > 1 else mine
        counts, sums, wrong = every.view(-1, self._sequence_size, 3).unbind(-1)  # sequence ranks are neighbours
        if bool(wrong.any()):
            ranks = wrong.flatten().nonzero().flatten().tolist()
            raise ValueError(complaint or f"expected batches that can be sharded, got others on ranks {ranks}")
        if not torch.equal(sums, sums[:, :1].expand_as(sums)) or not torch.equal(counts, counts[:, :1].expand_as(sums)):
            raise ValueError(
                "expected the same batch on all ranks that share a sequence, got different tokens: a sampler or a "
                "dataset depends on the rank"
            )
        return counts[:, 0].sum().clamp(min=1)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """This rank's shard of a batch, which the Trainer asks for where it would enter torch's context parallelism."""
        inputs = dict(inputs)
        labels, documents = _targets(inputs), _documents(inputs)
        tokens, positions = inputs["input_ids"], inputs.get("position_ids")
        batch = shard_batch(
            tokens,
            labels,
            documents,
            layout=self._enabled.settings.layout,
            group=self._group,
            shift_labels=False,
            position_ids=None if documents is not None else positions,
        )
        for name in _REDUNDANT:
            inputs.pop(name, None)
        unknown = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.shape[:2] == tokens.shape]
        unknown = [name for name in unknown if name not in ("input_ids", "labels", "shift_labels", "position_ids")]
        if unknown:
            raise ValueError(f"expected no inputs per token besides input_ids, labels, position_ids, got {unknown}")
        inputs.update(
            input_ids=batch.input_ids,
            labels=batch.labels,
            shift_labels=batch.labels,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        if batch.cu_seqlens is not None or positions is not None:
            inputs["cu_seqlens"] = batch.cu_seqlens or (0, batch.seqlen)
        return contextlib.nullcontext, inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer adds up what every rank says of its whole batch."""
        return super().floating_point_ops(inputs) // self._sequence_size

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if not prediction_loss_only:
            raise ValueError("expected prediction_loss_only, got a call for predictions, which are sharded")
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        total = self._get_num_items_in_batch([inputs], self.args.device)
        assert total is not None and self._evaluated is not None
        _, mine = self._prepare_context_parallel_inputs(model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, mine, num_items_in_batch=total)
        loss = loss.detach()  # this rank's share x the number of processes
        count = (mine["shift_labels"] != IGNORE).sum().double()
        self._evaluated += torch.stack([loss.double() / self.args.world_size * total, count])
        return loss, None, None

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Samples that a loader repeats, to fill the last batch of every rank, must not count again."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            tokens = inputs["input_ids"]
            first = self.accelerator.process_index // self._sequence_size * tokens.shape[0]
            rows = torch.arange(first, first + len(tokens), device=tokens.device)
            repeated = (rows >= state.remainder)[:, None]
            names = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
            return {**inputs, **{name: inputs[name].masked_fill(repeated, IGNORE) for name in names}}
        return inputs

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self.is_in_train and not self.is_fsdp_enabled and self.model_wrapped is self.model:
            # accelerate has noted that this model is prepared, for evaluation that is; train() would believe it and not
            # wrap it in DDP: every rank would go its own way.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self._evaluated)
        loss, tokens = self._evaluated.tolist()
        # The Trainer's own is a mean of means, with a rank's share where the last batch is cut.
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": loss / tokens if tokens else float("nan")}
        return output._replace(metrics=metrics)


def _documents(batch: dict[str, Any]) -> Any:
    found = next((batch[name] for name in _DOCUMENTS if batch.get(name) is not None), None)
    if isinstance(found, torch.Tensor) and found.dim() == 2:  # a collator has stacked those of the rows
        if not torch.equal(found, found[:1].expand_as(found)):
            raise ValueError(
                "expected one cu_seqlens for all rows of a batch, got different ones: batch size 1, or pack"
            )
        return found[0]
    return found


def _targets(batch: dict[str, Any]) -> torch.Tensor:
    """``[batch, seqlen]``: what to predict at each position of a whole batch. ValueError if it cannot be sharded."""
    tokens, labels, documents = batch["input_ids"], batch.get("labels"), _documents(batch)
    if labels is None:
        raise ValueError(f"expected labels in a batch, got {sorted(batch)} only")
    padding = batch.get("attention_mask")
    if padding is not None:
        if padding.shape != tokens.shape:
            raise ValueError(f"expected attention_mask of shape {list(tokens.shape)}, got {list(padding.shape)}")
        padding = padding.bool()
        if not bool((padding[:, 1:] <= padding[:, :-1]).all()) or bool((labels[~padding] != IGNORE).any()):
            raise ValueError(
                "expected padding only at the end of a row, with labels -100 (causal attention never sees it there), "
                "got other padding in attention_mask"
            )
    positions = batch.get("position_ids")
    if positions is not None and documents is None and bool((positions[:, 1:] <= positions[:, :-1]).any()):
        raise ValueError(
            "expected cu_seqlens with position_ids that begin anew, got none: documents are not guessed from positions "
            "(DataCollatorWithFlattening: return_flash_attn_kwargs=True)"
        )
    shifted = batch.get("shift_labels")
    if shifted is not None:
        return shifted
    return shard_batch(tokens, labels, documents, rank=0, world_size=1, layout="contiguous").labels
