"""Extend a trained model from 8192 to 65536 positions on one GPU, and measure it before and after.

    python examples/scripts/smollm2_data.py data                  # fetches the model and the texts
    python examples/extend_smollm2.py --data data --out out/extend
    python examples/plots.py out/extend

SmolLM2-135M-Instruct is trained further on long texts, its rotary base raised from stage to stage, each sequence split
over virtual ranks (a LoopbackGroup) exactly as it would be over GPUs. Sequences hold facts and questions about them
(``retrieval_facts.py``), whose answers have a loss of their own: with a few million tokens a model of this size would
not learn from prose alone to look 60000 tokens back. The evaluation's needles are of another wording and kind.

Written to --out: perplexity.csv (texts not trained on; "base raised" is the model before training with the last
stage's base), needle.csv, training.csv and summary.json. The time is what limits training: a stage is given as
LENGTH:ROWS:BASE:SHARE, its share being of the seconds that evaluation leaves of --total-seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from long_eval import Table, final_hidden, load, needle_grid, perplexity_curve, set_rope_base, token_losses
from needle import read_folder
from retrieval_facts import Encoder, training_sequence
from torch import Tensor, nn

import seqpar_attn
from seqpar_attn.integrations.transformers import enable

BEGIN = time.perf_counter()
STAGES = "16384:2:300000:0.35,32768:1:800000:0.35,65536:1:2000000:0.3"


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGIN:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Stage:
    length: int
    rows: int
    base: float
    share: float


def parse_stages(text: str) -> list[Stage]:
    """Of LENGTH:ROWS:BASE:SHARE,... ValueError for anything else; shares are made to sum to 1."""
    try:
        fields = [part.split(":") for part in text.split(",")]
        stages = [Stage(int(n), int(rows), float(base), float(share)) for n, rows, base, share in fields]
    except ValueError:
        raise ValueError(f"expected stages LENGTH:ROWS:BASE:SHARE,..., got {text!r}") from None
    if any(min(s.length, s.rows, s.base, s.share) <= 0 for s in stages):
        raise ValueError(f"expected positive numbers in stages, got {text!r}")
    total = sum(s.share for s in stages)
    return [Stage(s.length, s.rows, s.base, s.share / total) for s in stages]


def library_source(limit: int = 6_000_000) -> str:
    """Python's standard library, its files in a fixed random order."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "lib2to3", "idlelib"}
    paths = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    random.Random(0).shuffle(paths)
    text = "\n\n".join(f"# {p.relative_to(library)}\n{p.read_text(errors='replace')}" for p in paths)
    return text[:limit]


def tokens_of(folder: Path, tokenizer: Any, more: tuple[str, ...] = ()) -> list[list[int]]:
    """Per text of a folder its tokens."""
    read_folder(folder)  # says what is wrong with it
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))] + list(more)
    # In pieces, which the tokenizer works on side by side, cut where a line begins anyway.
    pieces = [[t[i : i + 200_000] for i in range(0, len(t), 200_000)] for t in texts]
    flat = tokenizer([p for parts in pieces for p in parts], add_special_tokens=False).input_ids
    encoded = iter(flat)
    return [[token for _ in parts for token in next(encoded)] for parts in pieces]


class Data:
    """Training batches, the next one made while the device works on this one."""

    def __init__(self, texts: list[list[int]], encode: Encoder, seed: int):
        self.texts, self.encode, self.rng = texts, encode, random.Random(seed)
        self.worker = ThreadPoolExecutor(1)

    def make(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """ids and answer mask, ``[rows, length]``, texts chosen in proportion to their lengths."""
        texts = [t for t in self.texts if len(t) >= stage.length]
        if not texts:
            raise ValueError(f"expected a training text of at least {stage.length} tokens, got none")
        chosen = self.rng.choices(texts, [len(t) for t in texts], k=stage.rows)
        made = [training_sequence(text, stage.length, self.encode, self.rng) for text in chosen]
        return torch.tensor([ids for ids, _ in made]), torch.tensor([answers for _, answers in made])

    def batches(self, stage: Stage) -> Any:
        following = self.worker.submit(self.make, stage)
        while True:
            batch, following = following.result(), self.worker.submit(self.make, stage)
            yield batch


class MasterAdam:
    """AdamW on float32 copies of the weights, which are bfloat16 on a GPU."""

    def __init__(self, model: nn.Module):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.copies = [p.detach().float().clone() for p in self.weights]
        fused = self.copies[0].is_cuda
        self.adam = torch.optim.AdamW(self.copies, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    def step(self, rate: float) -> Tensor:
        """Returns the norm of the gradient before clipping, on the device."""
        for copy, weight in zip(self.copies, self.weights):
            copy.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)
        return norm


def learning_rate(progress: float, peak: float) -> float:
    """Linear to ``peak`` in the first 4%, constant to 60%, then linear to a twentieth."""
    return peak * min(progress / 0.04 + 0.02, 1.0, 1.0 - 0.95 * max(progress - 0.6, 0.0) / 0.4)


def train_step(model: Any, ids: Tensor, answers: Tensor, group: Any, weight: float) -> tuple[Tensor, Tensor]:
    """Gradients of: mean loss of all tokens, and ``weight`` times that of the answers alone."""
    batch = seqpar_attn.shard_batch(ids, group=group)
    only = seqpar_attn.shard_batch(ids, ids.masked_fill(~answers, -100), group=group)
    device, head = model.lm_head.weight.device, model.lm_head.weight
    hidden = final_hidden(model, batch)
    where = (only.labels != -100).to(device)
    loss = seqpar_attn.linear_cross_entropy(hidden, head, batch.labels.to(device), group=group)
    answer_loss = seqpar_attn.linear_cross_entropy(hidden[where], head, only.labels.to(device)[where], group=group)
    (loss + weight * answer_loss).backward()
    return loss.detach(), answer_loss.detach()


def train(model: Any, data: Data, stages: list[Stage], seconds: float, args: argparse.Namespace, group: Any) -> dict:
    """All stages; what was trained on, for the summary."""
    table, optimizer, device = Table(args.out / "training.csv"), MasterAdam(model), model.lm_head.weight.device
    model.train()
    report, step, done = [], 0, 0.0
    for stage in stages:
        set_rope_base(model, stage.base, stage.length)
        # Beyond 32K tokens a step, blocks are computed again in backward, all but their attention.
        policy = seqpar_attn.memory.apply(model) if stage.length * stage.rows > 32768 else contextlib.nullcontext()
        begin, first = time.perf_counter(), step
        for ids, answers in data.batches(stage):
            start = time.perf_counter()
            spent = (start - begin) / (stage.share * seconds)
            if step > first and (spent >= 1 or (args.max_steps and step - first >= args.max_steps)):
                break
            rate = learning_rate(done + stage.share * min(spent, 1.0), args.lr)
            loss, answer_loss = train_step(model, ids, answers, group, args.answer_weight)
            norm = optimizer.step(rate)
            values = {"loss": loss.item(), "answer_loss": answer_loss.item(), "gradient_norm": norm.item(), "lr": rate}
            step += 1
            took = time.perf_counter() - start
            gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            speed = {"seconds": took, "tokens_per_second": ids.numel() / took, "peak_gib": gib}
            where = {"step": step, "length": stage.length, "rows": stage.rows, "base": stage.base}
            table.add(where | values | speed)
            if not math.isfinite(values["loss"]):
                raise RuntimeError(f"the loss of step {step} is {values['loss']}")
            if step == first + 1 or step % 10 == 0:
                say(
                    f"step {step}: {stage.length} tokens, "
                    + ", ".join(f"{k} {v:.4g}" for k, v in (values | speed).items())
                )
        if isinstance(policy, seqpar_attn.memory.Applied):
            policy.remove()
        done += stage.share
        report.append(vars(stage) | {"steps": step - first, "tokens": (step - first) * stage.rows * stage.length})
    model.eval()
    return {"stages": report, "tokens": sum(r["tokens"] for r in report), "train_seconds": seconds}


class Evaluation:
    def __init__(self, args: argparse.Namespace, tokenizer: Any, texts: list[list[int]], group: Any):
        self.args, self.tokenizer, self.group = args, tokenizer, group
        n = args.ppl_length
        self.windows = [t[i : i + n] for t in texts for i in range(0, len(t) - n + 1, n)][: args.ppl_windows]
        if not self.windows:
            raise ValueError(f"expected a held-out text of at least {n} tokens, got {[len(t) for t in texts]}")
        self.haystack = [token for text in texts for token in text]
        self.ppl, self.needles = Table(args.out / "perplexity.csv"), Table(args.out / "needle.csv")

    def perplexity(self, model: Any, name: str) -> None:
        losses = torch.cat([token_losses(model, torch.tensor([w]), self.group).cpu() for w in self.windows])
        lengths = [n for n in self.args.ppl_lengths if n <= self.args.ppl_length]
        for row in perplexity_curve(losses, lengths, self.args.ppl_tail):
            self.ppl.add({"model": name, **row, "texts": len(self.windows)})
            end = row["perplexity_of_last_tokens"]
            say(f"{name}: perplexity of {row['length']}: {row['perplexity']:.3f}, at the end {end:.3f}")

    def needle(self, model: Any, name: str, samples: int, distractors: int = 0) -> float:
        """Returns the accuracy up to --bar-length."""
        depths = [i / (self.args.depths - 1) for i in range(self.args.depths)]
        grid = needle_grid(
            model,
            self.tokenizer,
            self.haystack,
            self.group,
            lengths=self.args.needle_lengths,
            depths=depths,
            samples=samples,
            distractors=distractors,
        )
        counted = []
        for length, rows in itertools.groupby(grid, key=lambda row: row["length"]):
            scores = []
            for row in rows:
                self.needles.add({"model": name, "distractors": distractors, **row})
                scores.append(row["accuracy"])
            say(f"{name}: needles in {length} tokens, {distractors} distractors: {sum(scores) / len(scores):.1%}")
            counted += scores if length <= self.args.bar_length else []
        return sum(counted) / max(len(counted), 1)


def parse() -> argparse.Namespace:
    def lengths(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that scripts/smollm2_data.py fills")
    parser.add_argument("--model", help="another model: a folder, a hub name or a GGUF file")
    parser.add_argument("--out", type=Path, default=Path("out/extend"))
    parser.add_argument("--save", type=Path, help="folder for the extended model")
    parser.add_argument("--ranks", type=int, default=4, help="virtual ranks that share each sequence")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--stages", default=STAGES)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--total-seconds", type=float, default=560, help="for everything, from the program's start")
    parser.add_argument("--train-seconds", type=float, default=330, help="at most, for training")
    parser.add_argument("--max-steps", type=int, help="per stage, for a trial")
    parser.add_argument("--ppl-length", type=int, default=65536)
    parser.add_argument("--ppl-windows", type=int, default=8)
    parser.add_argument("--ppl-tail", type=int, default=2048)
    parser.add_argument(
        "--ppl-lengths", type=lengths,
        default=[1024, 2048, 4096, 6144, 8192, 10240, 12288, 16384, 20480, 24576, 32768, 40960, 49152, 57344, 65536],
    )  # fmt: skip
    parser.add_argument(
        "--needle-lengths", type=lengths, default=[4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536]
    )
    parser.add_argument("--bar-length", type=int, default=32768)
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    stages = parse_stages(args.stages)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    path = args.model or str(next(iter(sorted(args.data.glob("*.gguf"))), args.data))
    model, tokenizer = load(path, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    before = model.config.rope_parameters["rope_theta"], model.config.max_position_embeddings
    set_rope_base(model, *before)  # float32 frequencies
    say(f"loaded {path}: base {before[0]:g}, {before[1]} positions")
    texts = tokens_of(args.data / "train", tokenizer, (library_source(),))
    held_out = tokens_of(args.data / "heldout", tokenizer)
    say(f"{sum(map(len, texts))} tokens to train on, {sum(map(len, held_out))} held out")
    group = seqpar_attn.LoopbackGroup(args.ranks)
    enable(model, group, backend=args.backend)
    evaluation = Evaluation(args, tokenizer, held_out, group)
    data = Data(texts, Encoder(tokenizer), args.seed)

    token_losses(model, torch.tensor([evaluation.windows[0][:2048]]), group)  # compiles kernels
    say("kernels are ready")

    begin = time.perf_counter()
    evaluation.perplexity(model, "before")
    set_rope_base(model, stages[-1].base, stages[-1].length)
    evaluation.perplexity(model, "base raised")
    set_rope_base(model, *before)
    accuracy = {"before": evaluation.needle(model, "before", args.samples)}
    needed = time.perf_counter() - begin

    left = args.total_seconds - (time.perf_counter() - BEGIN) - 1.3 * needed - 20
    seconds = min(args.train_seconds, left)
    say(f"evaluation took {needed:.0f} s, training gets {seconds:.0f} s")
    if seconds < 1:
        raise SystemExit(f"expected --total-seconds to leave time for training, got {args.total_seconds}")
    training = train(model, data, stages, seconds, args, group)
    say(f"trained: {json.dumps(training)}")

    evaluation.perplexity(model, "after")
    accuracy["after"] = evaluation.needle(model, "after", args.samples)
    accuracy["after, 3 distractors"] = evaluation.needle(model, "after", 1, distractors=3)
    say(f"needle accuracy up to {args.bar_length} tokens: {accuracy}")
    summary = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "training": training,
        "needle_accuracy_up_to": {"length": args.bar_length, **accuracy},
        "settings": {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
        | {"model": Path(path).name},
        "seconds": round(time.perf_counter() - BEGIN, 1),
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    data.worker.shutdown(wait=False, cancel_futures=True)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
