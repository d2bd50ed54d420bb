r"""Memory and time of one rank of W that trains a decoder on a long sequence, measured on one GPU.

    python3 benchmarks/memory.py --model llama-2-7b --gpus 8 --contexts 512k 700k 1m --out benchmarks/results/memory
    python3 benchmarks/memory.py --model llama-3-8b --attention recompute --tile-block 8192 --head-groups 8 \
        --keep-last 4 --contexts 3700000 --no-time --out benchmarks/results/memory --name llama-3-8b-staged

What is real and what stands in: benchmarks/one_rank_model.py. Peak memory is that of one step of the whole model, with
attention's kernels launching nothing (their buffers are there) and the optimizer's states in place. Time comes from
models of one and of two of the layers with everything running: their difference times the layers, what the model of one
layer takes besides, and the whole model's optimizer step. Tokens/s are those of all W GPUs if FSDP's and attention's
transfers are hidden. MFU counts no operation twice, over --peak TFLOP/s per GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

from common import clocks, describe, machine, markdown  # first: finds the checkout

# isort: split
import torch
from files import write
from one_rank_model import MODELS, Parts, begin, build, flops_per_token, stand_in

from seqpar_attn import get_layout, memory

GIB = 2**30
OPTIONS = ("tile_mlp", "tile_block", "head_groups", "checkpoint_every", "keep_last")


def tokens_of(text: str) -> int:
    """ "700k" is 700 * 1024, "1m" is 1024 * 1024."""
    for suffix, factor in (("k", 1 << 10), ("m", 1 << 20)):
        if text.lower().endswith(suffix):
            return int(float(text[:-1]) * factor)
    return int(text)


def options_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    """For memory.apply, beside what attention and activations are."""
    return {name: getattr(arguments, name) for name in OPTIONS}


def _forward_backward(model: Any, batch: tuple[torch.Tensor, ...]) -> None:
    model(*batch).backward()


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.sizes = arguments, dict(MODELS[arguments.model])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.sequence_ranks = arguments.gpus if arguments.sequence_ranks is None else arguments.sequence_ranks
        self.rank = self.sequence_ranks // 2
        self.rounds: dict[int, list[float]] = {}
        """Milliseconds of every step that counts, by the layers of the model."""

    def _batch(self, context: int) -> tuple[torch.Tensor, ...]:
        positions = get_layout("zigzag", self.sequence_ranks).positions(self.rank, context)
        ids = torch.randint(int(self.sizes["vocab_size"]), (2, 1, len(positions)), device=self.device)
        return ids[0], ids[1], positions.to(self.device)[None]

    def _model(self, layers: int, parts: Parts | None = None) -> tuple[Any, memory.Applied]:
        a = self.arguments
        model = build(self.sizes, layers, a.gpus, self.device, parts)
        applied = memory.apply(
            model,
            attention=a.attention,
            activations=a.activations,
            **options_of(a),
            blocks=list(model.model.layers),
        )
        return model, applied

    def _free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self, context: int) -> dict[str, Any]:
        """Bytes of one step of the whole model."""
        model, applied = self._model(int(self.sizes["num_hidden_layers"]))
        parts = Parts()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.cuda)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        batch, static = self._batch(context), self._allocated()
        step = parts.timed("optimizer", optimizer.step) if self.cuda else optimizer.step
        try:
            with stand_in(self.sequence_ranks, self.rank, None, idle=True, cuda=self.cuda):
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                model(*batch).backward()
                step()
            if self.cuda:
                torch.cuda.synchronize()
            return {
                "static_bytes": static,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else 0,
                "reserved_bytes": torch.cuda.max_memory_reserved() if self.cuda else 0,
                "host_bytes": applied.host_bytes,
                "optimizer_ms": parts.milliseconds().get("optimizer", 0.0),
            }
        finally:
            optimizer.zero_grad()
            applied.remove()
            del model, optimizer, step, batch  # all that holds parameters, before what is cyclic is collected
            self._free()

    def steps(self, layers: int, context: int) -> dict[str, float]:
        """Milliseconds of forward and backward of a model of so many layers, in all and by part."""
        parts = Parts()
        model, applied = self._model(layers, parts)
        batch, totals, by_part = self._batch(context), [], []
        with stand_in(self.sequence_ranks, self.rank, parts, idle=False, cuda=self.cuda):
            for n in range(self.arguments.rounds + 1):
                parts.events.clear()
                total = Parts()
                total.timed("total", _forward_backward)(model, batch)
                torch.cuda.synchronize()
                if n:
                    totals.append(total.milliseconds()["total"])
                    by_part.append(parts.milliseconds())
                model.zero_grad()
        applied.remove()
        del model, batch
        self._free()
        self.rounds[layers] = totals
        medians = {name: statistics.median(x[name] for x in by_part) for name in by_part[0]}
        return {"total": statistics.median(totals)} | medians

    def row(self, context: int) -> dict[str, Any]:
        a, layers = self.arguments, int(self.sizes["num_hidden_layers"])
        row: dict[str, Any] = {"context": context}
        try:
            row |= self.peak(context)
        except torch.OutOfMemoryError as error:
            self._free()
            return row | {"out_of_memory": str(error).splitlines()[0]}
        if a.no_time or not self.cuda:
            return row
        one, two = self.steps(1, context), self.steps(2, context)
        per_layer = {name: two[name] - one[name] for name in two if name != "loss"}
        step = one["total"] - per_layer["total"] + layers * per_layer["total"] + row["optimizer_ms"]
        rest = row["optimizer_ms"]
        row["step_rounds_ms"] = [x + (layers - 1) * (y - x) + rest for x, y in zip(self.rounds[1], self.rounds[2])]
        attention = layers * (per_layer["attention forward"] + per_layer["attention backward"])
        row |= {"one_layer_ms": one, "two_layers_ms": two, "step_ms": step, "attention_ms": attention}
        row["attention_forward_ms"] = layers * per_layer["attention forward"]
        row["loss_forward_ms"] = one["loss"]
        row["other_layers_ms"] = layers * per_layer["total"] - attention
        row["tokens_per_second"] = context * a.gpus / self.sequence_ranks / step * 1e3
        row["mfu"] = flops_per_token(self.sizes, context) * row["tokens_per_second"] / (a.gpus * a.peak * 1e12)
        return row

    def longest(self) -> dict[str, Any]:
        """The longest context that fits, to 1/32 of itself, by doubling and halving."""
        unit = 2 * self.arguments.gpus * 1024
        fits, fails = 0, None
        length = tokens_of(self.arguments.contexts[-1]) // unit
        tried = []
        while fails is None or fails - fits > max(1, fits // 32):
            try:
                tried.append({"context": length * unit} | self.peak(length * unit))
                fits = length
            except torch.OutOfMemoryError:
                self._free()
                tried.append({"context": length * unit, "out_of_memory": True})
                fails = length
            length = 2 * fits if fails is None else (fits + fails) // 2
        return {"longest": fits * unit, "tried": tried}


def render(payload: dict[str, Any]) -> str:
    header = ["context", "tokens/GPU", "peak GiB", "of it at rest", "host GiB", "step s*", "attention s*", "other s*"]
    header += ["optimizer s", "tokens/s*", "MFU*"]
    lines = []
    for row in payload["rows"]:
        cells = [
            f"{row['context'] // 1024}K",
            str(row["context"] // (payload.get("sequence_ranks") or payload["gpus"])),
        ]
        if "out_of_memory" in row:
            lines.append(cells + ["out of memory"] + [""] * (len(header) - 3))
            continue
        cells += [f"{row[key] / GIB:.1f}" for key in ("peak_bytes", "static_bytes", "host_bytes")]
        if "step_ms" in row:
            other = row["step_ms"] - row["attention_ms"] - row["optimizer_ms"]
            cells += [f"{x / 1e3:.2f}" for x in (row["step_ms"], row["attention_ms"], other, row["optimizer_ms"])]
            cells += [f"{row['tokens_per_second']:.0f}", f"{100 * row['mfu']:.1f}%"]
        lines.append(cells + [""] * (len(header) - len(cells)))
    tiles = f"MLP tiles of {payload['tile_mlp']} tokens"
    if payload.get("tile_block"):
        tiles = f"blocks in tiles of {payload['tile_block']} tokens, {payload['head_groups']} groups of heads"
    if payload.get("checkpoint_every", 1) > 1:
        tiles += f", inputs of every {payload['checkpoint_every']}. block kept"
    if payload.get("keep_last"):
        tiles += f", those of the last {payload['keep_last']} on the device"
    note = (
        f"{payload['model']}, one rank of {payload['gpus']}: attention {payload['attention']}, activations "
        f"{payload['activations']}, {tiles}. * from one and two of the layers, "
        f"transfers hidden; MFU over {payload['peak']:g} TFLOP/s."
    )
    parts = [describe(payload["machine"]), note, "", markdown(header, lines)]
    if "longest" in payload:
        parts += ["", f"Longest context that fits: {payload['longest']['longest']} tokens."]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the files; default: from the model and the policy")
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--sequence-ranks", type=int, help="that share a sequence, the others have their own; default: all"
    )
    parser.add_argument("--contexts", nargs="+", default=["512k", "700k", "1m"], help="tokens; k is 1024")
    parser.add_argument("--attention", default="save")
    parser.add_argument("--activations", default="offload")
    parser.add_argument("--tile-mlp", type=int, help="default 16384 without --tile-block")
    parser.add_argument("--tile-block", type=int, help="tokens that a block works on at a time, but for attention")
    parser.add_argument("--head-groups", type=int, default=1, help="of attention, in turn; with --tile-block")
    parser.add_argument("--checkpoint-every", type=int, default=1, help="blocks per kept input")
    parser.add_argument("--keep-last", type=int, default=0, help="blocks that offload nothing")
    parser.add_argument("--rounds", type=int, default=1, help="of timed steps after a first one")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--find-max", action="store_true", help="only the longest context that fits")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.tile_mlp is None and arguments.tile_block is None:
        arguments.tile_mlp = 16384
    torch.manual_seed(0)
    sequence_ranks = arguments.gpus if arguments.sequence_ranks is None else arguments.sequence_ranks
    if not 1 <= sequence_ranks <= arguments.gpus or arguments.gpus % sequence_ranks:
        parser.error(f"expected --sequence-ranks that divide {arguments.gpus} GPUs, got {sequence_ranks}")
    begin(arguments.gpus, arguments.gpus // 2)
    bench = Bench(arguments)
    keys = ("model", "gpus", "attention", "activations", *OPTIONS, "peak", "sequence_ranks")
    payload: dict[str, Any] = {"machine": machine(arguments.commit)} | {key: getattr(arguments, key) for key in keys}
    payload["rows"] = []
    name = arguments.name or f"{arguments.model}-{arguments.attention}-{arguments.activations}"
    if arguments.find_max:
        payload["longest"] = bench.longest()
    for context in [] if arguments.find_max else arguments.contexts:
        payload["rows"].append(bench.row(tokens_of(context)))
        payload["machine"]["clocks_after"] = clocks()
        write(arguments.out, "memory", payload, render(payload), name)
    write(arguments.out, "memory", payload, render(payload), name)
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
