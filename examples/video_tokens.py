"""A small encoder over the tokens of a whole video, split over ranks: attention without a causal mask.

    python examples/video_tokens.py                                    # 131072 tokens on 2 processes (a GPU's work)
    python examples/video_tokens.py --frames 6 --height 24 --width 32  # seconds on a CPU
    torchrun --standalone --nproc-per-node 8 examples/video_tokens.py --frames 512

A token is a patch of one frame; every token attends every other one, in time and space. Half of them are hidden, and
the model learns to paint them. After the last step rank 0 computes the same loss and gradients from the whole video
with torch's own attention and compares (--no-check leaves that out: it needs the memory of all ranks).

Without a causal mask every rank has the same work wherever its tokens lie, so shards are contiguous. Lengths that do
not divide are padded, and ``cu_seqlens`` says that the padding is no part of the video.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_attn
from seqpar_attn.testing.distributed import RankPool

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PATCH, HEADS, HEADDIM, LAYERS = 8, 4, 32, 3
DIM = HEADS * HEADDIM


def video(frames: int, height: int, width: int) -> Tensor:
    """Two discs that drift and fade into each other: ``[frames, height, width]`` in [0, 1]."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    discs = [((x - 0.2 - 0.6 * t) ** 2 + (y - 0.5) ** 2, 0.03), ((x - 0.5) ** 2 + (y - 0.9 + 0.8 * t) ** 2, 0.02)]
    return torch.stack([torch.sigmoid((r - d) * 80) for d, r in discs]).amax(0)


def tokens_of(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Patches ``[1, tokens, PATCH * PATCH]`` in the order time, row, column, and where they are, ``[1, tokens, 3]``."""
    cut = frames.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [t, rows, columns, PATCH, PATCH]
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in cut.shape[:3]), indexing="ij"), -1)
    return cut.reshape(1, -1, PATCH * PATCH), place.reshape(1, -1, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, HEADDIM)).unbind(2)
        x = x + self.proj(attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """``patches [1, tokens, PATCH * PATCH], hidden [1, tokens] bool, place [1, tokens, 3]`` -> painted patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mask = nn.Linear(PATCH * PATCH, DIM), nn.Parameter(torch.zeros(DIM))
        self.where = nn.Linear(3 * 16, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, PATCH * PATCH)

    def forward(self, patches: Tensor, hidden: Tensor, place: Tensor, attention: Attention) -> Tensor:
        angle = place[..., None] * 0.5 ** torch.arange(8, device=place.device, dtype=patches.dtype)
        x = torch.where(hidden[..., None], self.mask, self.embed(patches))
        x = x + self.where(torch.cat((angle.sin(), angle.cos()), -1).flatten(2))
        for block in self.blocks:
            x = block(x, attention)
        return self.head(self.norm(x))


def loss_of(model: Encoder, data: tuple[Tensor, Tensor, Tensor], count: int, attention: Attention) -> Tensor:
    """This rank's share of the mean squared error over the hidden patches of all ranks."""
    patches, hidden, place = data
    error = (model(patches, hidden, place, attention) - patches).square().mean(-1)
    return torch.where(hidden, error, 0.0).sum() / count


def run(rank: int, world_size: int, args: argparse.Namespace) -> dict[str, float]:
    """Train; the last step's loss, and how far loss and gradients are from one device's."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = Encoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    patches, place = tokens_of(video(args.frames, args.height, args.width))
    hidden = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    count, length = int(hidden.sum()), patches.shape[1]
    layout = seqpar_attn.get_layout("contiguous", world_size)
    padding = -length % layout.multiple
    bounds = (0, length, length + padding) if padding else None
    whole = patches, hidden, place
    padded = F.pad(patches, (0, 0, 0, padding)), F.pad(hidden, (0, padding)), F.pad(place, (0, 0, 0, padding))
    mine = tuple(layout.shard(x, rank).to(device) for x in padded)

    def sharded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return seqpar_attn.ring_attention(q, k, v, layout="contiguous", causal=False, cu_seqlens=bounds)

    def one_device(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for step in range(args.steps):
        model.zero_grad()
        loss = loss_of(model, mine, count, sharded)  # type: ignore[arg-type]
        loss.backward()
        sums = [loss.detach(), *(p.grad for p in model.parameters())]
        for x in sums:
            dist.all_reduce(x)  # shares add up
        if rank == 0:
            print(f"step {step}: {length} tokens, loss {sums[0].item():.6f}", flush=True)
        if step + 1 < args.steps:
            optimizer.step()
    result = {"loss": sums[0].item()}
    if rank == 0 and not args.no_check:
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        truth = loss_of(model, tuple(x.to(device) for x in whole), count, one_device)  # type: ignore[arg-type]
        truth.backward()
        scale = max(p.grad.abs().max().item() for p in model.parameters())
        worst = max((x - p.grad).abs().max().item() for x, p in zip(found, model.parameters()))
        result |= {"loss_error": abs(result["loss"] / truth.item() - 1), "gradient_error": worst / scale}
        print(
            f"against one device: loss {result['loss_error']:.1e}, gradients {result['gradient_error']:.1e} (relative)"
        )
    dist.barrier()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--height", type=int, default=256, help=f"pixels, a multiple of {PATCH}")
    parser.add_argument("--width", type=int, default=256, help=f"pixels, a multiple of {PATCH}")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start where torchrun has started none")
    parser.add_argument("--no-check", action="store_true", help="no comparison with one device")
    args = parser.parse_args()
    for name in ("height", "width"):
        if getattr(args, name) < PATCH or getattr(args, name) % PATCH:
            raise ValueError(f"expected --{name} to be a multiple of {PATCH}, got {getattr(args, name)}")
    if args.frames < 1 or args.steps < 1:
        raise ValueError(f"expected at least one frame and one step, got {args.frames} and {args.steps}")
    if "RANK" not in os.environ:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        with RankPool(args.ranks, timeout=24 * 3600, backend=backend) as pool:
            pool.run(run, args)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    run(dist.get_rank(), dist.get_world_size(), args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
