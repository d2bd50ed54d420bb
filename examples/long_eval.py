"""What the long-context examples share: models from a folder or a GGUF file, losses per token, answers to prompts.

Everything works on the shards of a group, of processes or of virtual ranks; results are whole, on every rank.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from needle import Prompt, make_prompt
from torch import Tensor

import seqpar_attn


def load(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or hub name, or of a GGUF file (which needs the package gguf)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = str(path), {}
    if place.endswith(".gguf"):
        place, options = str(Path(place).parent), {"gguf_file": Path(place).name}
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options).to(device)
    if "gguf_file" in options:  # its weights are plain numbers by now, but the library would refuse to save them
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model.eval(), tokenizer


def set_rope_base(model: Any, base: float, max_positions: int) -> None:
    """Another base of the rotary embedding, and what the configuration calls the longest sequence.

    The frequencies are made anew, so they are float32 even if the model was cast to bfloat16 with its buffers: rounded
    to 8 bits, positions of thousands would be nonsense. For models with one rotary embedding of the default kind.
    """
    rotary = model.model.rotary_emb
    parameters = model.config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"expected a model with rope_type 'default', got {parameters.get('rope_type')!r}")
    parameters["rope_theta"] = float(base)
    model.config.max_position_embeddings = max_positions
    model.model.rotary_emb = type(rotary)(model.config).to(rotary.inv_freq.device)


def final_hidden(model: Any, batch: seqpar_attn.batch.ShardedBatch) -> Tensor:
    """``[batch, local seqlen, hidden]``: what the head gets. The batch may lie on the host."""
    device = model.lm_head.weight.device
    tokens, positions = (x.to(device, non_blocking=True) for x in (batch.input_ids, batch.position_ids))
    return model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, group: Any, layout: str = "zigzag") -> Tensor:
    """``ids [batch, seqlen]`` to float32 ``[batch, seqlen - 1]``: minus the log-probability of each token but the
    first, given all before it."""
    batch = seqpar_attn.shard_batch(ids, layout=layout, group=group)
    losses = seqpar_attn.linear_cross_entropy(
        final_hidden(model, batch),
        model.lm_head.weight,
        batch.labels.to(model.lm_head.weight.device),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        reduction="none",
    )
    return seqpar_attn.gather(losses, layout, group)[:, : ids.shape[1] - 1].float()


@torch.no_grad()
def greedy_answers(model: Any, prompts: Sequence[Prompt], group: Any, layout: str = "zigzag") -> list[list[int]]:
    """What greedy decoding of every prompt without its answer gives, up to its first wrong token and no further.

    One pass over prompts *with* their answers: as long as all tokens so far are the answer's, the most likely next one
    given the answer's tokens is the one that greedy decoding would choose. Prompts must have one length.
    """
    batch = seqpar_attn.shard_batch(torch.tensor([p.ids for p in prompts]), layout=layout, group=group)
    hidden = final_hidden(model, batch)
    first = len(prompts[0].ids) - max(len(p.answer) for p in prompts) - 1
    wanted = (batch.position_ids >= first).to(hidden.device)
    chosen = torch.zeros(batch.position_ids.shape, dtype=torch.int64, device=hidden.device)
    chosen[wanted] = model.lm_head(hidden[wanted]).argmax(-1)
    rows = seqpar_attn.gather(chosen, layout, group)[:, : len(prompts[0].ids)].tolist()
    return [row[len(p.ids) - len(p.answer) - 1 : len(p.ids) - 1] for row, p in zip(rows, prompts)]


def generated_answers(model: Any, prompts: Sequence[Prompt], group: Any, layout: str = "zigzag") -> list[list[int]]:
    """What greedy decoding of every prompt without its answer gives, as many tokens as the answer has, really decoded,
    over a key-value cache that stays on the ranks. Group and layout are those that ``enable`` was told."""
    from seqpar_attn.integrations.generation import generate

    answers: list[list[int]] = [[]] * len(prompts)
    for count in sorted({len(p.answer) for p in prompts}):  # prompts of one length go together
        chosen = [i for i, p in enumerate(prompts) if len(p.answer) == count]
        ids = torch.tensor([prompts[i].ids[:-count] for i in chosen], device=model.lm_head.weight.device)
        for i, row in zip(chosen, generate(model, ids, count)[:, -count:].tolist()):
            answers[i] = row
    return answers


def perplexity_curve(losses: Tensor, lengths: Iterable[int], window: int = 2048) -> list[dict[str, float]]:
    """Of ``losses [texts, seqlen - 1]``, per length: the perplexity of all tokens up to it, and of the last ``window``
    of them, which shows what the model makes of those positions alone."""
    rows = []
    for length in lengths:
        part = losses[:, : length - 1].double()
        rows.append(
            {
                "length": length,
                "perplexity": part.mean().exp().item(),
                "perplexity_of_last_tokens": part[:, -min(window, length // 2) :].mean().exp().item(),
                "tokens": part.numel(),
            }
        )
    return rows


def needle_grid(
    model: Any,
    tokenizer: Any,
    haystack: Sequence[int],
    group: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    distractors: int = 0,
    digits: int = 7,
    layout: str = "zigzag",
    seed: int = 0,
    answers: Callable[..., list[list[int]]] = greedy_answers,
) -> Iterable[dict[str, Any]]:
    """A row per length and depth as soon as it is known. One seed asks every model the same."""
    for length in lengths:
        for depth in depths:
            rng = random.Random(f"{seed} {length} {depth}")
            prompts = [
                make_prompt(tokenizer, haystack, length, depth, rng, digits=digits, distractors=distractors)
                for _ in range(samples)
            ]
            found = []
            rows = max(1, 32768 // length)  # short prompts together: a GPU has little to do with one
            for i in range(0, samples, rows):
                found += answers(model, prompts[i : i + rows], group, layout)
            right = [answer == prompt.answer for answer, prompt in zip(found, prompts)]
            yield {
                "length": length,
                "depth": round(depth, 3),
                "accuracy": sum(right) / samples,
                "samples": samples,
                "expected": " ".join(prompt.text for prompt in prompts),
                "answers": " | ".join(tokenizer.decode(answer).strip().replace("\n", "\\n") for answer in found),
            }


class Table:
    """A CSV file that is complete after every row."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        new = not self.rows
        self.rows.append(row)
        with self.path.open("w" if new else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            if new:
                writer.writeheader()
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})
