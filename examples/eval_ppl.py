"""Perplexity of long texts against the length of the context, for one or more models.

    python examples/eval_ppl.py -m MODEL OTHER -d FOLDER --max-tokens 32768 --truncate --output-file out/ppl.csv
    torchrun --nproc-per-node 8 examples/eval_ppl.py -m MODEL -d emozilla/pg19-test -f text --output-file out/ppl.csv
    python examples/plot_ppl.py out/ppl.csv

A MODEL is a folder, a hub name or a GGUF file; the data is a folder of .txt files or a name for the package datasets.
With --truncate only the first tokens of a text count: as many as the length says. Without it the whole text does, in
windows of that length, each --sliding-window tokens further, of which those count that no window before it had (Press
et al. 2021, arXiv 2108.12409, section B; a stride of 256 means that all but the first see nearly the full context).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import launch
import torch
from long_eval import Table, token_losses
from torch import Tensor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", nargs="+", required=True)
    parser.add_argument("-d", "--dataset", help="a folder of .txt files, or a name for the package datasets")
    parser.add_argument("-s", "--subset", help="of a dataset with several")
    parser.add_argument("-f", "--feature", default="text", help="the dataset's column with the text")
    parser.add_argument("--split", default="test")
    parser.add_argument("--tokenized", type=Path, help="tokens that --save-tokenized wrote, instead of --dataset")
    parser.add_argument("--save-tokenized", type=Path)
    parser.add_argument("--samples", type=int, help="texts to use, at most")
    parser.add_argument("--dataset-min-tokens", type=int, help="shorter texts are left out; default: --max-tokens")
    parser.add_argument("--min-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--tokens-step", type=int, default=2048)
    parser.add_argument("--sliding-window", type=int, default=256, help="stride of the windows; 0: their length")
    parser.add_argument("--truncate", action="store_true")
    parser.add_argument("--rope-theta", type=float, help="another base of the rotary embedding")
    parser.add_argument("--output-file", type=Path, default=Path("out/ppl.csv"))
    parser.add_argument("--aggressive-memory", action="store_true", help="give cached GPU memory back between windows")
    launch.add_options(parser)
    return parser.parse_args(argv)


def lengths_of(args: argparse.Namespace) -> list[int]:
    low, high, step = args.min_tokens, args.max_tokens, args.tokens_step
    if not 2 <= low <= high or step < 1 or args.sliding_window < 0:
        raise ValueError(
            "expected 2 <= min-tokens <= max-tokens, tokens-step >= 1 and sliding-window >= 0, got "
            f"{low}, {high}, {step} and {args.sliding_window}"
        )
    return list(range(low, high + 1, step))


def read_texts(args: argparse.Namespace) -> list[str]:
    """ValueError for a folder without texts, and a name where the package datasets is not installed."""
    folder = Path(args.dataset) if args.dataset else None
    if folder is None:
        raise ValueError("expected --dataset or --tokenized, got neither")
    if folder.is_dir():
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(
                f"expected a folder of .txt files, or the package datasets to be installed, got {args.dataset!r}"
            ) from None
        texts = list(load_dataset(args.dataset, args.subset, split=args.split)[args.feature])
    if not any(text.strip() for text in texts):
        raise ValueError(f"expected texts in {args.dataset!r}, got {len(texts)} and nothing in them")
    return texts


def tokens_of(args: argparse.Namespace, tokenizer: Any) -> list[Tensor]:
    """Texts that are long enough, int64 ``[tokens]`` each. ValueError if there are none."""
    if args.tokenized:
        if not args.tokenized.is_file():
            raise ValueError(f"expected a file that --save-tokenized wrote, got {str(args.tokenized)!r}")
        found = torch.load(args.tokenized, weights_only=True)
    else:
        found = [torch.tensor(tokenizer(text, verbose=False).input_ids) for text in read_texts(args)]
    least = args.max_tokens if args.dataset_min_tokens is None else args.dataset_min_tokens
    long = [x for x in found if len(x) >= max(least, 2)][: args.samples]
    if not long:
        longest = max((len(x) for x in found), default=0)
        raise ValueError(f"expected a text of at least {max(least, 2)} tokens, got {len(found)}, the longest {longest}")
    if args.save_tokenized and launch.is_first():
        args.save_tokenized.parent.mkdir(parents=True, exist_ok=True)
        torch.save(long, args.save_tokenized)
    return long


def windows(seqlen: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(begin, end, count)``: windows over a text, and of how many last tokens of each the loss counts."""
    counted = 1  # nothing predicts the first token
    for begin in range(0, seqlen, stride):
        end = min(begin + length, seqlen)
        yield begin, end, end - counted
        counted = end
        if end == seqlen:
            return


def evaluate(
    model: Any, texts: list[Tensor], lengths: list[int], args: argparse.Namespace, group: Any, layout: str
) -> Iterator[dict[str, Any]]:
    """A row per length."""
    known: list[Tensor] = []
    if args.truncate:  # no token sees a later one: one pass has the losses of all lengths
        known = [token_losses(model, x[None, : lengths[-1]], group, layout)[0].cpu() for x in texts]
    for length in lengths:
        parts = [losses[: length - 1] for losses in known]
        if not args.truncate:
            for x in texts:
                for begin, end, count in windows(len(x), length, args.sliding_window or length):
                    losses = token_losses(model, x[None, begin:end], group, layout)[0]
                    parts.append(losses[losses.shape[0] - count :].cpu())
                    if args.aggressive_memory and losses.is_cuda:
                        torch.cuda.empty_cache()
        every = torch.cat(parts).double()
        yield {"length": length, "perplexity": every.mean().exp().item(), "tokens": len(every), "texts": len(texts)}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    group, device = launch.start(args)
    lengths = launch.together(lambda: lengths_of(args))
    table = Table(args.output_file)
    for path in args.model:
        load = functools.partial(launch.model_for, path, args, group, device, args.rope_theta, lengths[-1])
        model, tokenizer, layout = launch.together(load)
        texts = launch.together(functools.partial(tokens_of, args, tokenizer))
        for row in evaluate(model, texts, lengths, args, group, layout):
            if launch.is_first():
                table.add({"model": Path(path).stem, **row})
                print(f"{Path(path).stem}: perplexity of {row['length']} tokens: {row['perplexity']:.4f}", flush=True)
        del model  # before the next one is loaded


if __name__ == "__main__":
    main()
