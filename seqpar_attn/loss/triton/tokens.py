"""What is done once per token beside its row of logits: small kernels for labels, weights and losses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...kernels.triton.common import LN2, cdiv
from ..options import Options
from .launching import launch

BLOCK = 1024


@triton.jit(do_not_specialize=["tokens", "start", "columns", "vocab_size", "ignore_index"])
def labels_kernel(
    labels, target, live, counts, ignore_index, vocab_size, start, columns, tokens, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < tokens
    # labels: [BLOCK]
    label = tl.load(labels + index, mask=exists, other=0).to(tl.int64)
    valid = exists & (label != ignore_index)
    bad = valid & ((label < 0) | (label >= vocab_size))
    column = label - start
    here = valid & (column >= 0) & (column < columns)
    tl.store(target + index, tl.where(here, column, -1).to(tl.int32), mask=exists)
    tl.store(live + index, tl.where(bad, float("nan"), tl.where(valid, 1.0, 0.0)), mask=exists)
    tl.atomic_add(counts, tl.sum(valid.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(bad.to(tl.int64), 0), sem="relaxed")


def launch_labels(
    labels: torch.Tensor, ignore_index: int, vocab_size: int, start: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``labels: [tokens]``, contiguous. ``(target int32, live float32, counts int64 [2])``."""
    tokens, device = labels.shape[0], labels.device
    target = torch.empty(tokens, dtype=torch.int32, device=device)
    live = torch.empty(tokens, dtype=torch.float32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    if tokens:
        numbers = (ignore_index, vocab_size, start, columns)  # which may have 64 bits
        launch(labels_kernel, cdiv(tokens, BLOCK), (labels, target, live, counts), numbers, (tokens,), (BLOCK,))
    return target, live, counts


@triton.jit(do_not_specialize=["tokens", "times"])
def weights_kernel(live, counts, factor, weight, tokens, times, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < tokens
    share = tl.div_rn(times, tl.maximum(tl.load(counts), 1).to(tl.float32))
    if tl.program_id(0) == 0:
        tl.store(factor, share)
    # live, weight: [BLOCK]
    tl.store(weight + index, tl.load(live + index, mask=exists, other=0.0) * share, mask=exists)


def launch_weights(live: torch.Tensor, counts: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``live: [tokens]`` float32, ``counts: [2]`` int64."""
    tokens = live.shape[0]
    factor, weight = live.new_empty(()), torch.empty_like(live)
    programs = max(1, cdiv(tokens, BLOCK))
    launch(weights_kernel, programs, (live, counts, factor, weight), (), (tokens, float(times)), (BLOCK,))
    return factor, weight


@triton.jit
def _losses(
    statistics, weight, start, tokens, keep, uniform, z_loss,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK tokens from ``start`` on, times ``weight``; 0 where there are none."""
    index = start + tl.arange(0, BLOCK)
    exists = index < tokens
    # statistics: [4, tokens]; weight: [tokens]
    peak = tl.load(statistics + index, mask=exists, other=0.0)
    total = tl.load(statistics + tokens + index, mask=exists, other=1.0)
    chosen = tl.load(statistics + tokens * 2 + index, mask=exists, other=0.0)
    w = tl.load(weight + index, mask=exists, other=0.0)
    log_total = tl.log2(total) * LN2
    loss = log_total - keep * (chosen - peak)
    if SMOOTHING:
        loss -= uniform * tl.load(statistics + tokens * 3 + index, mask=exists, other=0.0)
    if Z_LOSS:
        lse = peak + log_total
        loss += z_loss * lse * lse
    return tl.where(w == 0, 0.0, loss * w)


@triton.jit(do_not_specialize=["tokens"])
def losses_kernel(
    statistics, weight, out, tokens, keep, uniform, z_loss,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    loss = _losses(statistics, weight, start, tokens, keep, uniform, z_loss, SMOOTHING, Z_LOSS, BLOCK)
    index = start + tl.arange(0, BLOCK)
    tl.store(out + index, loss, mask=index < tokens)


@triton.jit(do_not_specialize=["tokens"])
def loss_kernel(
    statistics, weight, factor, out, tokens, keep, uniform, z_loss,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Their sum, times ``factor``, by one program: there is little to read, and it is done before a second kernel
    would have started."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, tokens, BLOCK):
        sums += _losses(statistics, weight, start, tokens, keep, uniform, z_loss, SMOOTHING, Z_LOSS, BLOCK)
    tl.store(out, tl.sum(sums, 0) * tl.load(factor))


def _arguments(options: Options, block: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    numbers = (1.0 - options.label_smoothing, options.uniform, float(options.z_loss))
    return numbers, (options.label_smoothing > 0, options.z_loss > 0, block)


def launch_losses(statistics: torch.Tensor, weight: torch.Tensor, options: Options) -> torch.Tensor:
    """``statistics: [4, tokens]`` and ``weight: [tokens]``, contiguous float32."""
    tokens = weight.shape[0]
    out = torch.empty_like(weight)
    if tokens:
        numbers, constants = _arguments(options, BLOCK)
        launch(losses_kernel, cdiv(tokens, BLOCK), (statistics, weight, out), (), (tokens, *numbers), constants)
    return out


LOSS_BLOCK = 4096


def launch_loss(statistics: torch.Tensor, weight: torch.Tensor, options: Options, factor: torch.Tensor) -> torch.Tensor:
    """``factor``: one float32 number on the device."""
    out = weight.new_empty(())
    numbers, constants = _arguments(options, LOSS_BLOCK)
    arrays = (statistics, weight, factor, out)
    launch(loss_kernel, 1, arrays, (), (weight.shape[0], *numbers), constants, num_warps=16)
    return out
