"""Train any Hugging Face causal language model on sequences that are split over ranks.

    torchrun --nproc-per-node 8 examples/train.py --model meta-llama/Llama-2-7b-hf --dataset ... --seq-length 65536 \\
        --rope-theta 1e6 --memory save --activations offload --output-dir out/llama
    python examples/train.py --model folder --random-weights --tokenizer bytes --dataset text.txt --seq-length 1024 \\
        --output-dir out/tiny            # one process, on a CPU, too

Processes are data parallel x sequence parallel (--sequence-parallel; default: all share every sequence); parameters,
gradients and the optimizer are sharded over all of them by FSDP2. A step's loss is the mean over the labels of all its
windows. EasyContext's options keep their names. Recipes: examples/scripts.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import checkpoint
from training.data import Windows, cache_name, write
from training.meter import Clock, Meter, peak_flops
from training.model import build, configuration, flops, parameters_in_products, save
from training.options import identity, parse
from training.ranks import Ranks, launched
from training.sources import documents, sizes, tokenizer_of

import seqpar_attn


def prepare_data(args: argparse.Namespace, name: str, ranks: Ranks) -> Windows:
    """Tokens are written by the first rank, and mapped by all: the folder is one that all can read."""

    def tokenized() -> Path:
        write(
            args.cache_dir / name, documents(args.dataset, args.split, args.sft, lambda: tokenizer_of(args.tokenizer))
        )
        return args.cache_dir / name

    return Windows(
        ranks.on_first(tokenized),
        args.seq_length,
        args.batch_size,
        seed=args.seed,
        separate=args.separate_documents,
        whole=args.sft,
        pose_context=args.pose_context,
        pose_chunks=args.pose_chunks,
    )


class Trainer:
    """One run: a model, its optimizer, and the windows that every step takes."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.config = ranks.on_first(lambda: configuration(args))
        source = {name: getattr(args, name) for name in ("dataset", "split", "tokenizer", "sft")}
        tokens = ranks.on_first(lambda: cache_name(**source, files=sizes(args.dataset)))
        settings = {**identity(args, ranks.data_size, self.config), "tokens": tokens}
        ranks.agree("options", settings)
        found = ranks.on_first(lambda: checkpoint.begin(args.output_dir, settings, args.resume))
        self.windows = prepare_data(args, tokens, ranks)
        tokenizer: list[Any] = []  # the first rank's; asked for now, so that its lack is no surprise in the end
        if not args.no_final:
            ranks.on_first(lambda: tokenizer.append(tokenizer_of(args.tokenizer)))
        self.tokenizer = tokenizer[0] if tokenizer else None
        self.model, self.enabled = build(args, self.config, ranks)
        self.parameters = parameters_in_products(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=args.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.done = 0 if found is None else checkpoint.load(found, self.model, self.optimizer)
        self.peak = peak_flops(ranks.device, args.peak_tflops)

    def micro_step(self, first: int, labels: int, clock: Clock) -> tuple[torch.Tensor, float]:
        """Forward and backward of one batch of this data-parallel rank; its part of the loss, and its FLOPs."""
        device, whole = self.ranks.device, self.windows.batch(first)
        batch = seqpar_attn.shard_batch(
            whole.input_ids,
            whole.labels,
            whole.cu_seqlens,
            layout=self.enabled.settings.layout,
            group=self.ranks.sequence,
            shift_labels=False,
            position_ids=whole.position_ids,
        )
        inputs: dict[str, Any] = {}
        for name in ("input_ids", "position_ids", "labels"):
            x = getattr(batch, name)
            inputs[name] = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        if batch.cu_seqlens is not None or whole.position_ids is not None:
            inputs["cu_seqlens"] = batch.cu_seqlens or (0, batch.seqlen)  # said, not guessed from positions
        clock.lap("batch")
        loss = self.model(**inputs, shift_labels=inputs["labels"], num_items_in_batch=labels, use_cache=False).loss
        (loss * self.ranks.world_size).backward()  # FSDP averages what has to be summed
        clock.lap("model")
        rows, seqlen = whole.input_ids.shape
        return loss.detach(), flops(self.config, self.parameters, rows, seqlen, whole.cu_seqlens)

    def step(self, number: int, clock: Clock) -> tuple[float, float, float, float]:
        """Step ``number`` (from 0): the loss over all ranks, the gradients' norm, the learning rate, FLOPs."""
        args, ranks = self.args, self.ranks
        size, turns = args.batch_size, args.gradient_accumulate_every
        together = size * ranks.data_size * turns
        clock.start()
        labels = max(self.windows.count(number * together, together), 1)
        total, work = torch.zeros((), device=ranks.device), 0.0
        for turn in range(turns):
            first = number * together + (turn * ranks.data_size + ranks.data_rank) * size
            loss, done = self.micro_step(first, labels, clock)
            total, work = total + loss, work + done * ranks.data_size
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm or math.inf)
        lr = args.learning_rate * min((number + 1) / max(args.warmup_steps, 1), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("model")
        dist.all_reduce(total)
        values = total.item(), norm.full_tensor().item(), lr, work  # type: ignore[attr-defined]
        clock.lap("loss")
        return values

    def run(self) -> None:
        args, ranks = self.args, self.ranks
        clock = Clock(ranks.device, args.profile_overhead)
        meter = Meter(args.output_dir, args.max_train_steps, self.done, args.report_to, args.wandb, ranks.first)
        tokens = args.batch_size * ranks.data_size * args.gradient_accumulate_every * args.seq_length
        for number in range(self.done, args.max_train_steps):
            loss, norm, lr, work = self.step(number, clock)
            if not math.isfinite(loss):
                raise ValueError(f"expected a finite loss, got {loss} in step {number + 1}")
            seconds = clock.seconds
            mfu = None if self.peak is None else work / seconds / self.peak / ranks.world_size
            meter.step(number + 1, loss, tokens, seconds, mfu, norm, lr)
            clock.lap("report")
            clock.stop()
            last = number + 1 == args.max_train_steps
            if (args.save_every and (number + 1) % args.save_every == 0) or (last and not args.no_final):
                checkpoint.save(args.output_dir, number + 1, self.model, self.optimizer, args.keep, ranks)
        meter.close()
        if args.profile_overhead and ranks.first:
            print(clock.summary())
        if not args.no_final:
            save(args.output_dir / "final", self.model, self.config, self.tokenizer, torch.bfloat16, ranks)


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    rows = args.ring_degree if args.method == "usp" else None
    with launched(args.sequence_parallel, args.virtual_ranks, rows) as ranks:
        Trainer(args, ranks).run()


if __name__ == "__main__":
    main()
