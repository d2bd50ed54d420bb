"""Train a small Llama on real text with its sequence split over several ranks, and check it against one device.

    python examples/train_text.py                        # 4 gloo processes on the CPU, or one per GPU
    python examples/train_text.py --virtual 8            # 8 virtual ranks in this process (default on a single GPU)
    torchrun --standalone --nproc-per-node 4 examples/train_text.py

The text is Python's own standard library, byte by byte (or --text FILES). The last step's loss and gradients are
compared with the same weights and tokens on one device that runs torch's attention on the whole sequence.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_llama import Attention, Llama, one_device
from torch import Tensor, nn
from tqdm import tqdm

import seqpar_attn
from seqpar_attn.batch import ShardedBatch, shard_batch

METHODS = {"zigzag": "zigzag", "dist_flash": "contiguous"}
"""The layout that each method wants."""


def read_text(paths: list[str] | None, least: int) -> Tensor:
    """At least ``least`` bytes of text if there are that many, the library's files in a fixed random order."""
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "test", "tests", "encodings"}  # packages, odd text, tables of numbers
        paths = sorted(str(p) for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
        random.Random(0).shuffle(paths)
    text = bytearray()
    for path in paths:
        if len(text) < least:
            text += Path(path).read_bytes()
    return torch.frombuffer(text, dtype=torch.uint8).long()


def loss_and_gradients(model: nn.Module, batch: ShardedBatch, attention: Attention) -> tuple[Tensor, list[Tensor]]:
    """This rank's part of the mean loss over the valid tokens of *all* ranks, and the gradients of that part."""
    weight = next(model.parameters())
    device, bf16 = weight.device, weight.is_cuda and weight.dtype == torch.float32
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(batch.input_ids.to(device), batch.position_ids.to(device), attention)
    logits = logits.to(weight.dtype).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.labels.to(device).flatten(), reduction="sum") / batch.num_valid
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """One all-reduce for all of them, in place."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(args: argparse.Namespace, device: torch.device) -> None:
    parallel = dist.is_initialized()
    rank = dist.get_rank() if parallel else 0
    group = None if parallel else seqpar_attn.LoopbackGroup(args.world_size)
    method = {"zigzag": seqpar_attn.ring_attention, "dist_flash": seqpar_attn.dist_flash_attention}[args.method]
    layout = METHODS[args.method]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return method(q, k, v, group=group, layout=layout, causal=True)

    torch.manual_seed(0)  # the same weights on every rank
    model = Llama().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.1 - i / args.steps))
    text = read_text(args.text, least=4_000_000)
    if len(text) < args.seqlen:
        raise SystemExit(f"expected at least --seqlen {args.seqlen} bytes of text, got {len(text)}")
    windows, losses = random.Random(0), []
    progress = tqdm(total=args.steps, disable=rank != 0, unit="step", mininterval=1.0)
    for step in range(args.steps):
        begin, offset = time.perf_counter(), windows.randrange(len(text) - args.seqlen + 1)
        tokens = text[None, offset : offset + args.seqlen]
        batch = shard_batch(tokens, layout=layout, group=group)
        loss, gradients = loss_and_gradients(model, batch, attention)
        if parallel:
            sum_over_ranks([loss, *gradients])
        losses.append(loss.item())
        if step + 1 < args.steps:  # the last step is for the comparison
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        rate = args.seqlen / (time.perf_counter() - begin)
        note = f"loss {losses[-1]:.3f}, {rate:.0f} tokens/s, {memory_gib(device):.2f} GiB per process"
        progress.set_postfix_str(note, refresh=False)
        progress.update()
    progress.close()
    if rank == 0:
        finish(args, model, tokens, gradients, losses)


def finish(
    args: argparse.Namespace, model: nn.Module, tokens: Tensor, gradients: list[Tensor], losses: list[float]
) -> None:
    """Compare, print the table, write the curve and the JSON; fail if sharding has cost accuracy."""
    batch = shard_batch(tokens, layout="contiguous", rank=0, world_size=1)
    runs = {f"{args.method}, {args.world_size} ranks": (losses[-1], [g.clone() for g in gradients])}
    for name, twin in {"one device": model, "one device, float64": copy.deepcopy(model).double()}.items():
        loss, grads = loss_and_gradients(twin, batch, one_device)
        runs[name] = loss.item(), grads
    true_loss, truth = runs["one device, float64"]
    rows = []
    print(f"{'last step, same weights and tokens':36}{'loss':>12}{'error':>10}{'gradient norm':>15}{'worst error':>13}")
    for name, (value, grads) in runs.items():
        norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
        worst = max(((g - t).norm() / t.norm()).item() for g, t in zip(grads, truth))
        rows.append(dict(run=name, loss=value, gradient_norm=norm, worst_gradient_error=worst))
        print(f"{name:36}{value:12.8f}{abs(value - true_loss):10.1e}{norm:15.8f}{worst:13.1e}")
    print("(worst error: of any parameter's gradient, Frobenius norm relative to float64)")

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    report = dict(settings=settings, losses=losses, last_step=rows)
    (args.out / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses, alpha=0.4)
    axes.plot([sum(part) / len(part) for part in (losses[max(i - 9, 0) : i + 1] for i in range(len(losses)))])
    axes.set(title=f"{args.method}, {args.world_size} ranks", xlabel="step", ylabel="loss (nats per byte)")
    figure.savefig(args.out / "loss.png", dpi=120)
    print(f"wrote {args.out / 'result.json'} and {args.out / 'loss.png'}")
    if rows[0]["worst_gradient_error"] > 2 * rows[1]["worst_gradient_error"]:
        raise SystemExit("the sequence-parallel gradients are further from float64 than those of one device")


def run_rank(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One process of a distributed run."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(max((os.cpu_count() or 1) // args.world_size, 1))
    dist.init_process_group("nccl" if gpu else "gloo", rendezvous, rank=rank, world_size=args.world_size)
    train(args, device)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="zigzag")
    parser.add_argument("--ranks", type=int, help="processes to start (default: one per GPU, or 4 on the CPU)")
    parser.add_argument("--virtual", type=int, help="virtual ranks in this one process instead")
    parser.add_argument("--seqlen", type=int, default=2048, help="bytes per step, over all ranks")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to train on")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if "RANK" in os.environ:
        args.world_size = int(os.environ["WORLD_SIZE"])
        run_rank(int(os.environ["RANK"]), args, "env://")
    elif args.virtual or (gpus == 1 and not args.ranks):
        args.world_size = args.virtual or 4
        train(args, torch.device("cuda" if gpus else "cpu"))
    else:
        args.world_size = args.ranks or gpus or 4
        multiprocessing.set_forkserver_preload(["torch"])  # or every process spends seconds importing it
        with tempfile.TemporaryDirectory() as folder:
            arguments = (args, f"file://{folder}/rendezvous")
            torch.multiprocessing.start_processes(run_rank, arguments, args.world_size, start_method="forkserver")


if __name__ == "__main__":
    main()
