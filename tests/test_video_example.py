"""examples/video_tokens.py: an encoder without a causal mask on ranks is the same encoder on one device."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import video_tokens

from seqpar_attn.testing.distributed import RankPool


def test_ranks_equal_one_device():
    args = argparse.Namespace(frames=7, height=24, width=40, steps=3, lr=1e-3, no_check=False)  # 105 tokens: padded
    with RankPool(3, timeout=60) as pool:
        first = pool.run(video_tokens.run, args)[0]
    assert first["loss_error"] < 1e-5 and first["gradient_error"] < 1e-4, first
    args.steps = 1
    assert first["loss"] < 0.9 * start(args)


def start(args):
    """The loss before any step, on one device without this package."""
    torch.manual_seed(0)
    model = video_tokens.Encoder()
    patches, place = video_tokens.tokens_of(video_tokens.video(args.frames, args.height, args.width))
    hidden = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5

    def attention(q, k, v):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    return video_tokens.loss_of(model, (patches, hidden, place), int(hidden.sum()), attention).item()
