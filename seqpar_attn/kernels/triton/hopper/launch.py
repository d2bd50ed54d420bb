"""Launching the Hopper kernels: which arguments a block gives them."""

from __future__ import annotations

from typing import Any

import torch

from ....mask import MaskKind
from ...base import BlockMask
from ...device import multiprocessors
from ..common import KIND_NUMBER, cdiv, key_sizes, score_scales
from ..plans import Plan, fits_tma, launch
from .backward import backward_kernel
from .backward_wide import backward_wide_kernel
from .config import (
    BACKWARD_KEYS,
    BACKWARD_WIDE_KEYS,
    BACKWARD_WIDE_TILE,
    BackwardConfig,
    ForwardConfig,
    beyond,
    heads_at_once,
    heads_together,
    padded,
    permuted,
    shift,
)
from .descriptors import describe
from .finish import launch_zero
from .forward import forward_kernel


def _check_alignment(*tensors: torch.Tensor | None) -> None:
    given = [x for x in tensors if x is not None]
    assert fits_tma(*given), "expected tensors whose address and strides, but the last, are multiples of 16 bytes"


def launch_forward(
    config: ForwardConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    out_acc: torch.Tensor | None,
    out: torch.Tensor | None,
    mask: BlockMask,
    softmax_scale: float,
    softcap: float | None,
    carry: bool,
    keep: bool,
) -> None:
    def plan() -> Plan:
        batch, seqlen_q, nheads, headdim = q.shape
        parts, seqlen_k, nheads_kv = key_sizes(k)
        keys, dim, heads_total = config.keys, padded(headdim), batch * nheads
        rows = [1, 1, 64, dim]
        results = rows if dim <= 128 else [1, 1, 64, 64]
        boxes = {0: rows, 1: [1, 1, 1, keys, dim], 2: [1, 1, 1, keys, dim], 4: results, 5: results}
        if not (carry or keep):
            del boxes[4]
        if out is None:
            del boxes[5]
        _check_alignment(q, k, v, out_acc, out)
        tiles = cdiv(seqlen_q, 64 * config.consumers) * heads_total
        return Plan(
            min(tiles, multiprocessors(q.device)),
            (
                *lse.stride()[:2], seqlen_q, seqlen_k, parts, nheads, nheads // nheads_kv, heads_total,
                heads_at_once(mask.kind is MaskKind.FULL, heads_total, 2 * seqlen_k * headdim * k.element_size()),
            ),
            {
                "KIND": KIND_NUMBER[mask.kind], "EVEN": seqlen_k % keys == 0, "CARRY": carry, "KEEP": keep,
                "SOFTCAP": softcap is not None, "KEYS": keys, "DIM": dim, "STAGES": config.stages,
                "CONSUMERS": config.consumers, "PINGPONG": config.pingpong, "BEYOND": beyond(headdim),
                "REGISTERS": config.registers, "PRODUCER_REGISTERS": config.producer_registers,
            },
            config.tile,
            boxes,
            describe=describe,
        )  # fmt: skip

    keep = keep and out_acc is not None
    if not (carry or keep):
        out_acc = None
    arrays = (q, k, v, lse, out_acc, out, mask.key_lo, mask.key_hi)
    variables = (mask.offset, *score_scales(softmax_scale, softcap))
    launch(forward_kernel, (config, mask.kind, softcap is None, carry, keep), arrays, variables, plan)


def launch_backward(
    config: BackwardConfig | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    mask: BlockMask,
    softmax_scale: float,
    softcap: float | None,
    carry_dq: bool,
    carry_dkv: bool,
) -> None:
    """``config``: None for more than 128 columns."""

    def plan() -> Plan:
        batch, seqlen_q, nheads, headdim = q.shape
        parts, seqlen_k, nheads_kv = key_sizes(k)
        dim, heads_total = padded(headdim), batch * nheads_kv
        key_tiles = cdiv(seqlen_k, BACKWARD_KEYS if config else BACKWARD_WIDE_KEYS) * parts
        rows = dout_rows = [1, 1, config.queries if config else 64, dim]
        keys = gradient = [1, 1, 1, 64, dim]
        constants: dict[str, Any] = {
            "KIND": KIND_NUMBER[mask.kind], "SOFTCAP": softcap is not None, "CARRY": carry_dkv, "ROUND": rounded,
            "PERMUTED": permuted(headdim), "SHIFT": shift(q.dtype),
        }  # fmt: skip
        if config:
            constants |= {
                "QUERIES": config.queries, "DIM": dim, "Q_STAGES": config.q_stages,
                "REGISTERS": config.registers, "PRODUCER_REGISTERS": config.producer_registers,
            }  # fmt: skip
        else:
            dout_rows = [1, 1, 64, 128]
            constants["BEYOND"] = beyond(headdim)
        if not (config and rounded):
            gradient = [1, 1, 1, 64, 64]
        full = mask.kind is MaskKind.FULL
        _check_alignment(q, k, v, dout, dq, dk, dv)
        assert nheads // nheads_kv < 1 << 12 and seqlen_q < 1 << 25, "query tiles and heads share 31 bits"
        return Plan(
            key_tiles * heads_total,
            (
                *lse.stride()[:2], *delta.stride()[:2], seqlen_q, seqlen_k, parts, nheads_kv, nheads // nheads_kv,
                heads_total, 1 if full else heads_together(heads_total, key_tiles, config is None),
                0 if full else multiprocessors(q.device),
            ),
            constants,
            config.tile if config else BACKWARD_WIDE_TILE,
            {0: rows, 1: keys, 2: keys, 3: dout_rows, 6: [1, 1, 64, 64], 7: gradient, 8: gradient},
            describe=describe,
        )  # fmt: skip

    if not carry_dq:
        launch_zero(dq)
    rounded = dk.dtype == q.dtype
    arrays = (q, k, v, dout, lse, delta, dq, dk, dv, mask.query_lo, mask.query_hi)
    pre_scale, post_scale = score_scales(softmax_scale, softcap)
    lse_factor = 1.0 / post_scale if softcap is None else 1.0
    variables = (mask.offset, pre_scale, post_scale, lse_factor, softmax_scale)
    kernel = backward_kernel if config else backward_wide_kernel
    launch(kernel, (config, mask.kind, softcap is None, carry_dkv, rounded), arrays, variables, plan)
