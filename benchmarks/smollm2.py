"""A trained model on real text, its sequence split over processes, beside one process: logits, loss, gradients.

    python examples/scripts/smollm2_data.py data
    python benchmarks/smollm2.py --data data --out benchmarks/results/smollm2

SmolLM2-135M-Instruct in float32, on CPUs over gloo. The yardstick for logits and loss is what one process gets with the
library's sdpa and its eager attention, which differ as well. Gradients have a truth: one process in float64, norms and
loss included (the library computes those in float32 whatever the weights are). Per parameter the error is the Frobenius
norm of the difference from it over the truth's; ratios are to the error of one process with sdpa, and those of eager
attention show what chance does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import describe, machine, markdown  # first: finds the checkout

# isort: split
import torch
from files import write
from torch import Tensor, nn

import seqpar_attn
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.testing.distributed import RankPool

Gradients = dict[str, Tensor]


class ExactNorm(nn.Module):
    """The model's RMSNorm in the dtype of its input."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


def load(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def exact(model: Any) -> Any:
    """The same model in float64 throughout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))
    return model.double()


def gradients(model: Any) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(folder: Path, attention: str, ids: Tensor, double: bool = False) -> tuple[float, Gradients]:
    """Loss and gradients of one process."""
    model = load(folder, attention)
    model = exact(model) if double else model
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if double:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    else:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(model)


@torch.no_grad()
def logits_alone(folder: Path, attention: str, ids: Tensor) -> tuple[Tensor, float]:
    result = load(folder, attention)(input_ids=ids, labels=ids, use_cache=False)
    return result.logits[0], result.loss.item()


def _inputs(ids: Tensor, layout: str) -> dict[str, Any]:
    batch = seqpar_attn.shard_batch(ids, layout=layout)
    return {
        "input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels,
        "shift_labels": batch.labels, "num_items_in_batch": batch.num_valid, "use_cache": False,
    }  # fmt: skip


@torch.no_grad()
def logits_on_ranks(
    rank: int, world_size: int, folder: Path, ids: Tensor, method: str, files: list[Path]
) -> tuple[list[float], float]:
    """Largest differences of this rank's logits from those in ``files``, and the loss of all ranks."""
    model = load(folder, "sdpa")
    inputs = _inputs(ids, enable(model, method=method).settings.layout)
    result = model(**inputs)
    loss = result.loss.clone()
    torch.distributed.all_reduce(loss)
    positions = inputs["position_ids"][0]
    known = (torch.load(file, mmap=True)[positions] for file in files)
    return [(result.logits[0] - x).abs().max().item() for x in known], loss.item()


def gradients_on_ranks(
    rank: int, world_size: int, folder: Path, ids: Tensor, method: str, file: Path
) -> float:  # the gradients go into the file
    model = load(folder, "sdpa").train()
    layout = enable(model, method=method).settings.layout
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**_inputs(ids, layout)).loss
    loss.backward()
    found, total = gradients(model), loss.detach().clone()
    for x in (total, *found.values()):
        torch.distributed.all_reduce(x)
    if rank == 0:
        torch.save(found, file)
    return total.item()


def errors(found: Gradients, truth: Gradients) -> dict[str, float]:
    return {name: ((found[name].double() - x).norm() / x.norm()).item() for name, x in truth.items()}


def whole(found: Gradients, truth: Gradients) -> float:
    """The error of all gradients as one vector."""
    difference = sum((found[name].double() - x).square().sum().item() for name, x in truth.items())
    return float((difference / sum(x.square().sum().item() for x in truth.values())) ** 0.5)


def measure_logits(folder: Path, ids: Tensor, args: argparse.Namespace, pool: RankPool) -> dict[str, Any]:
    files, losses, kept = [], {}, []
    for attention in ("sdpa", "eager"):
        logits, losses[attention] = logits_alone(folder, attention, ids)
        files.append(folder / f"logits-{attention}")
        torch.save(logits, files[-1])
        kept.append(logits)
    between = (kept[0] - kept[1]).abs().max().item()
    largest = kept[0].abs().max().item()
    del kept, logits
    found: dict[str, Any] = {"tokens": ids.shape[1], "largest_logit": largest, "sdpa_vs_eager": between, "loss": losses}
    for method in args.methods:
        ranks = pool.run(logits_on_ranks, folder, ids, method, files)
        to_sdpa, to_eager = (max(differences[i] for differences, _ in ranks) for i in range(2))
        found[method] = {"vs_sdpa": to_sdpa, "vs_eager": to_eager, "loss": ranks[0][1]}
    return found


def measure_gradients(folder: Path, ids: Tensor, args: argparse.Namespace, pool: RankPool) -> dict[str, Any]:
    loss, truth = alone(folder, "sdpa", ids, double=True)
    found: dict[str, Any] = {"tokens": ids.shape[1], "parameters": len(truth), "loss": {"float64": loss}}
    base: dict[str, float] = {}
    for name in ("sdpa", "eager", *args.methods):
        if name in args.methods:
            file = folder / "gradients"
            found["loss"][name] = pool.run(gradients_on_ranks, folder, ids, name, file)[0]
            mine = torch.load(file)
        else:
            found["loss"][name], mine = alone(folder, name, ids)
        error = errors(mine, truth)
        base = base or error
        ratios = {key: error[key] / base[key] for key in truth}
        worst = max(ratios, key=lambda key: ratios[key])
        found[name] = {
            "whole": whole(mine, truth),
            "median": statistics.median(error.values()),
            "median_ratio": statistics.median(ratios.values()),
            "worst_ratio": ratios[worst],
            "worst_parameter": worst,
            "above_1.1": sum(r > 1.1 for r in ratios.values()),
        }
        print(name, found[name], flush=True)
    return found


def render(payload: dict[str, Any]) -> str:
    x, g, lines = payload["logits"], payload["gradients"], []
    lines.append(["one process: sdpa vs eager", f"{x['sdpa_vs_eager']:.2e}", "", f"{x['loss']['sdpa']:.6f}"])
    for method in payload["methods"]:
        row = x[method]
        lines.append([method, f"{row['vs_sdpa']:.2e}", f"{row['vs_eager']:.2e}", f"{row['loss']:.6f}"])
    first = markdown([f"{x['tokens']} tokens", "largest difference, sdpa", "eager", "loss"], lines)
    lines = []
    for name in ("sdpa", "eager", *payload["methods"]):
        row = g[name]
        whole, worst = row["whole"] / g["sdpa"]["whole"], f"{row['worst_ratio']:.3f} ({row['worst_parameter']})"
        ratios = ["", "", "", ""]  # of sdpa to itself
        if name != "sdpa":
            ratios = [f"{whole:.3f}", f"{row['median_ratio']:.3f}", worst, f"{row['above_1.1']} of {g['parameters']}"]
        lines.append([name, f"{row['whole']:.3e}", f"{row['median']:.3e}", *ratios])
    header = [f"gradients, {g['tokens']} tokens", "error of all", "median error", "ratio of all", "median ratio"]
    second = markdown([*header, "worst ratio", "above 1.1"], lines)
    losses = ", ".join(f"{name} {loss:.7f}" for name, loss in g["loss"].items())
    note = f"{payload['model']}, float32, {payload['ranks']} gloo ranks; largest logit {x['largest_logit']:.1f}."
    return "\n".join([describe(payload["machine"]), note, "", first, "", second, "", f"Losses: {losses}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that examples/scripts/smollm2_data.py fills"
    )
    parser.add_argument("--text", default="heldout/persuasion.txt", help="a file in it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--gradient-tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["ring", "dist_flash"])
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(iter(sorted(args.data.glob("*.gguf"))))
    tokenizer = AutoTokenizer.from_pretrained(args.data, gguf_file=gguf.name)
    ids = torch.tensor([tokenizer((args.data / args.text).read_text(encoding="utf-8")).input_ids[: args.tokens]])
    if ids.shape[1] < max(args.tokens, args.gradient_tokens):
        parser.error(f"expected a text of {args.tokens} tokens, got {ids.shape[1]}")
    payload: dict[str, Any] = {"machine": machine(args.commit), "model": gguf.stem, "text": args.text}
    payload |= {"ranks": args.ranks, "methods": args.methods}
    with tempfile.TemporaryDirectory() as name, RankPool(args.ranks, timeout=3600) as pool:
        folder = Path(name)
        model = AutoModelForCausalLM.from_pretrained(args.data, gguf_file=gguf.name, dtype=torch.float32)
        model.hf_quantizer = None  # its weights are plain numbers by now, but the library would refuse to save them
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        del model
        payload["logits"] = measure_logits(folder, ids, args, pool)
        print(payload["logits"], flush=True)
        payload["gradients"] = measure_gradients(folder, ids[:, : args.gradient_tokens], args, pool)
    write(args.out, "smollm2", payload, render(payload))
    print(render(payload), flush=True)


if __name__ == "__main__":
    main()
