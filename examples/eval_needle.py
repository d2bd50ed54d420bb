"""Needles in a haystack: does a model find one sentence anywhere in a long context?

    python examples/eval_needle.py --model MODEL --haystack_dir FOLDER --out out/needle
    torchrun --nproc-per-node 8 examples/eval_needle.py --model MODEL --haystack_dir FOLDER --method dist_flash

MODEL is a folder, a hub name or a GGUF file, FOLDER any folder of .txt files. Answers are generated: the prompt goes
through the model split over the ranks, its key-value cache stays where it is, and every digit is decoded from there
(``seqpar_attn.integrations.generation``). Options with underscores are EasyContext's. --out gets needle.csv (a row per
length and depth, with the answers), needle.png, and accuracy.csv.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Sequence
from pathlib import Path

import launch
import plots
from long_eval import Table, generated_answers, needle_grid
from needle import make_prompt, read_folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--haystack_dir", type=Path, required=True)
    parser.add_argument("--min_context_length", type=int, default=4096)
    parser.add_argument("--max_context_length", type=int, default=32768)
    parser.add_argument("--context_interval", type=int, default=4096)
    parser.add_argument("--depth_interval", type=float, default=0.1)
    parser.add_argument("--num_samples", type=int, default=1, help="prompts per length and depth")
    parser.add_argument("--num_distractor", type=int, default=0, help="sentences about other cities")
    parser.add_argument("--rnd_number_digits", type=int, default=7)
    parser.add_argument("--rope_theta", type=float, help="another base of the rotary embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/needle"))
    parser.add_argument("--pdf", action="store_true", help="the picture as a PDF, too")
    launch.add_options(parser)
    return parser.parse_args(argv)


def grid_of(args: argparse.Namespace) -> tuple[list[int], list[float]]:
    """Context lengths and depths; ValueError for numbers that make none."""
    low, high, step = args.min_context_length, args.max_context_length, args.context_interval
    if not 0 < low <= high or step < 1 or not 0 < args.depth_interval <= 1 or args.num_samples < 1:
        raise ValueError(
            "expected 0 < min_context_length <= max_context_length, context_interval >= 1, 0 < depth_interval <= 1 and "
            f"num_samples >= 1, got {low}, {high}, {step}, {args.depth_interval} and {args.num_samples}"
        )
    count = round(1 / args.depth_interval)
    return list(range(low, high + 1, step)), [i / count for i in range(count + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    group, device = launch.start(args)
    lengths, depths = launch.together(lambda: grid_of(args))
    text = launch.together(lambda: read_folder(args.haystack_dir))
    table, summary = Table(args.out / "needle.csv"), Table(args.out / "accuracy.csv")
    options = {"digits": args.rnd_number_digits, "distractors": args.num_distractor}
    for path in args.model:
        load = functools.partial(launch.model_for, path, args, group, device, args.rope_theta, lengths[-1])
        model, tokenizer, layout = launch.together(load)
        haystack = tokenizer(text, add_special_tokens=False).input_ids
        rng = random.Random(0)
        for length in (lengths[0], lengths[-1]):  # too short for the sentences, or a haystack that is too short
            launch.together(functools.partial(make_prompt, tokenizer, haystack, length, 0.5, rng, **options))
        grid = needle_grid(
            model,
            tokenizer,
            haystack,
            group,
            lengths=lengths,
            depths=depths,
            samples=args.num_samples,
            layout=layout,
            seed=args.seed,
            answers=generated_answers,
            **options,
        )
        scores, name = [], Path(path).stem
        for row in grid:
            scores.append(row["accuracy"])
            if launch.is_first():
                table.add({"model": name, "distractors": args.num_distractor, **row})
                print(f"{name}: {row['length']} tokens, depth {row['depth']:.0%}: {row['accuracy']:.0%}", flush=True)
        if launch.is_first():
            accuracy = sum(scores) / len(scores)
            prompts = len(scores) * args.num_samples
            summary.add({"model": name, "distractors": args.num_distractor, "accuracy": accuracy, "prompts": prompts})
            print(f"{name}: accuracy {accuracy:.1%} of {prompts} prompts", flush=True)
        del model, grid  # before the next one is loaded
    if launch.is_first():
        plots.save(plots.heat_map(plots.read(table.path, ("length", "depth", "accuracy"))), table.path, args.pdf)


if __name__ == "__main__":
    main()
