"""Backends on CPU: the reference against naive float64 attention, the others against the reference's own error."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from kernel_cases import check_accumulate
from kernel_checks import (
    INF,
    NAN,
    REFERENCE,
    assert_close,
    assert_near,
    assert_no_worse,
    gradients,
    make_inputs,
    naive,
    play,
    split,
)

from seqpar_attn.kernels import FULL, BlockMask, flash_attn, get, interval_mask
from seqpar_attn.kernels.aten import AtenKernel, CudnnKernel
from seqpar_attn.kernels.flash_attn import FlashAttnKernel
from seqpar_attn.kernels.partial import pseudo_out
from seqpar_attn.mask import MaskKind

ATEN = AtenKernel()
WHOLE, CHUNKS = [0, 96], [0, 32, 64, 96]
HALVES = [0, 48, 96]


def naive_of(x, kind: str, rows: list[int], keys: list[int]):
    blocks, seen = split(kind, rows, keys, x.q.device.type)
    return blocks, naive(x, seen)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("nheads_kv", [4, 2, 1])
@pytest.mark.parametrize("rows, keys", [(WHOLE, WHOLE), (WHOLE, CHUNKS), (CHUNKS, [0, 96]), (HALVES, CHUNKS)])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1", "interval"])
def test_reference_equals_naive(kind, rows, keys, nheads_kv, softcap) -> None:
    x = make_inputs(96, 96, dtype=torch.float64, nheads_kv=nheads_kv, headdim=12, softcap=softcap)
    blocks, truth = naive_of(x, kind, rows, keys)
    if kind in ("causal-1", "interval"):
        assert torch.isneginf(truth.lse).any(), "the case should have rows without keys"
    assert_close(play(REFERENCE, x, blocks), truth, 1e-12)


@pytest.mark.parametrize("seqlens", [(40, 96), (96, 40)], ids=str)
@pytest.mark.parametrize("offset", [-40, -7, 0, 30, 56])
def test_reference_causal_offset(offset, seqlens) -> None:
    seqlen_q, seqlen_k = seqlens
    x = make_inputs(seqlen_q, seqlen_k, dtype=torch.float64, headdim=8)
    blocks, _ = split("full", [0, seqlen_q], [0, seqlen_k])
    blocks[0].mask = BlockMask(MaskKind.CAUSAL, offset)
    seen = torch.ones(seqlen_q, seqlen_k).tril(offset).bool()
    assert_close(play(REFERENCE, x, blocks), naive(x, seen), 1e-12)


def test_reference_error_does_not_grow_with_blocks() -> None:
    x = make_inputs(96, 96, dtype=torch.bfloat16)
    once, truth = naive_of(x, "causal", WHOLE, WHOLE)
    many, _ = split("causal", WHOLE, list(range(0, 97, 8)))
    assert len(many) == 12
    assert_no_worse(play(REFERENCE, x, many), truth, play(REFERENCE, x, once).to(torch.bfloat16))


def test_interval_mask_seen_from_keys() -> None:
    lo = torch.tensor([-3, 0, 1, 1, 4, 4, 9], dtype=torch.int32)
    hi = torch.tensor([-1, 1, 1, 6, 6, 8, 12], dtype=torch.int32)
    mask = interval_mask(lo, hi, 8)
    j, i = torch.arange(8), torch.arange(7)
    from_queries = (j[None] >= lo[:, None]) & (j[None] < hi[:, None])
    from_keys = (i[:, None] >= mask.query_lo[None]) & (i[:, None] < mask.query_hi[None])
    assert torch.equal(from_queries, from_keys)
    assert all(x.dtype == torch.int32 for x in (mask.key_lo, mask.key_hi, mask.query_lo, mask.query_hi))


# --- aten ---------------------------------------------------------------------------------------------------------

# What torch's CPU kernel costs of itself with 16 bit inputs: a short exp, and dk, dv rounded once per query tile.
HALF_LSE, HALF_DKV = 3e-4, 1.6


@pytest.mark.parametrize("headdim", [32, 20], ids=["d32", "d20-padded"])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_aten_one_block(dtype, kind, headdim) -> None:
    x = make_inputs(96, 96, dtype=dtype, headdim=headdim)
    blocks, truth = naive_of(x, kind, WHOLE, WHOLE)
    quirks = {} if dtype == torch.float32 else {"lse_slack": HALF_LSE, "factor_dkv": HALF_DKV}
    assert_no_worse(play(ATEN, x, blocks), truth, play(REFERENCE, x, blocks).to(dtype), **quirks)


@pytest.mark.parametrize("nheads_kv", [4, 2, 1])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_aten_chain(dtype, kind, nheads_kv) -> None:
    """Query and key chunks, so strided slices, carries and merges; grouped heads."""
    x = make_inputs(96, 96, dtype=dtype, nheads_kv=nheads_kv)
    blocks, truth = naive_of(x, kind, CHUNKS, CHUNKS)
    got = play(ATEN, x, blocks)
    if dtype == torch.float64:
        assert_close(got, truth, 1e-12)
        return
    # Every block's result is rounded to the input dtype, once per query head: 1.1 does not hold for a merge of those.
    lse_slack = 2e-6 if dtype == torch.float32 else HALF_LSE
    rival = play(REFERENCE, x, blocks).to(dtype)
    assert_no_worse(got, truth, rival, factor=1.6, lse_slack=lse_slack)


def test_aten_single_token_without_a_key() -> None:
    x = make_inputs(1, 1, dtype=torch.float32)
    blocks, truth = naive_of(x, "causal-1", [0, 1], [0, 1])
    got = play(ATEN, x, blocks)
    assert torch.isneginf(got.lse).all() and not got.out.any() and not got.dq.any() and not got.dk.any()
    assert_close(got, truth, 0.0)


def test_aten_continues_a_carry_it_does_not_add_to() -> None:
    """Offset -1 after another block: the first query keeps its carry, in out as well."""
    x = make_inputs(16, 16, dtype=torch.float32)
    out_acc, lse = torch.randn_like(x.q), torch.randn(2, 4, 16)
    want_acc, want_lse, out = out_acc.clone(), lse.clone(), torch.full_like(x.q, NAN)
    want_out = torch.full_like(x.q, NAN)
    options = {"softmax_scale": 0.2, "softcap": None, "carry": True}
    ATEN.forward(x.q, x.k, x.v, lse, out_acc, out, BlockMask(MaskKind.CAUSAL, -1), **options)
    REFERENCE.forward(x.q, x.k, x.v, want_lse, want_acc, want_out, BlockMask(MaskKind.CAUSAL, -1), **options)
    for name, got, want in (("acc", out_acc, want_acc), ("lse", lse, want_lse), ("out", out, want_out)):
        assert_near(got, want, 5e-6, name)


def test_aten_backward_uses_the_delta_it_is_given() -> None:
    """lse and delta are global: neither is this block's own, and delta may contain a gradient of lse."""
    x = make_inputs(24, 24, dtype=torch.float64)
    x.dout[:, 3] = 0
    lse = torch.randn(2, 4, 24, dtype=torch.float64) + 5
    delta = torch.randn(2, 4, 24, dtype=torch.float64) * 3
    delta[:, :, 3] = 0
    for name, got, want in zip(("dq", "dk", "dv"), gradients(ATEN, x, lse, delta), gradients(REFERENCE, x, lse, delta)):
        assert_near(got, want, 1e-11, name)


def test_aten_rows_without_any_key_contribute_nothing() -> None:
    x = make_inputs(24, 24, dtype=torch.float64, nheads_kv=2)
    _, truth = naive_of(x, "full", [0, 24], [0, 24])
    lse, delta = truth.lse.clone(), REFERENCE.delta(truth.out, x.dout)
    lse[:, :, :5] = -INF
    dq, dk, dv = gradients(ATEN, x, lse, delta)
    assert not dq[:, :5].any()
    rest = dataclasses.replace(x, q=x.q[:, 5:], dout=x.dout[:, 5:])
    for got, want in zip((dq[:, 5:], dk, dv), gradients(REFERENCE, rest, lse[:, :, 5:], delta[:, :, 5:])):
        assert_near(got, want, 1e-12)


def test_pseudo_out() -> None:
    dout, out = torch.randn(2, 2, 33, 4, 64, dtype=torch.float64).bfloat16()
    dout[:, 7] = 0
    delta = REFERENCE.delta(out, dout)
    fake = pseudo_out(dout, delta)
    assert fake.dtype == torch.bfloat16 and not fake[:, 7].any()
    assert (fake.float().norm(dim=-1) <= 1.01 * out.float().norm(dim=-1)).all()
    assert ((REFERENCE.delta(fake, dout) - delta).abs() <= 2**-8 * delta.abs()).all()


@pytest.mark.parametrize(
    "mask, seqlens, softcap, message",
    [
        (BlockMask(MaskKind.CAUSAL, 1), (8, 8), None, "expected a causal block.*offset 0 or -1, got .*offset=1"),
        (BlockMask(MaskKind.CAUSAL, 0), (8, 16), None, "expected a causal block.*got seqlen_q=8, seqlen_k=16"),
        (interval_mask(torch.zeros(8).int(), torch.ones(8).int(), 8), (8, 8), None, "expected a full or causal mask"),
        (FULL, (8, 8), 2.0, "expected no softcap, got 2.0"),
    ],
)
def test_aten_refuses_at_the_call(mask, seqlens, softcap, message) -> None:
    x = make_inputs(*seqlens, dtype=torch.float32, softcap=softcap)
    lse, delta = torch.zeros(2, 2, 4, seqlens[0])
    with pytest.raises(ValueError, match=message):
        ATEN.forward(x.q, x.k, x.v, lse, None, x.q, mask, softmax_scale=1.0, softcap=softcap, carry=False)
    with pytest.raises(ValueError, match=message):
        gradients(ATEN, x, lse, delta, mask)


@pytest.mark.parametrize("mask", [FULL, BlockMask(MaskKind.CAUSAL, -1)], ids=["full", "causal-1"])
@pytest.mark.parametrize("kernel", [ATEN, CudnnKernel()], ids=lambda kernel: kernel.name)
def test_calls_of_cuda_ops_fit_this_torch(kernel, mask) -> None:
    """Arguments and shapes only, on the meta device: these schemas have changed between torch versions."""
    x = make_inputs(64, 64, dtype=torch.bfloat16, nheads_kv=2, headdim=20, device="meta")
    lse, out_acc = torch.empty(2, 4, 64, device="meta"), torch.empty_like(x.q, dtype=torch.float32)
    kernel.forward(
        x.q, x.k, x.v, lse, out_acc, torch.empty_like(x.q), mask, softmax_scale=0.1, softcap=None, carry=True
    )
    grads = gradients(kernel, x, lse, torch.empty_like(lse), mask)
    assert [g.shape for g in grads] == [x.q.shape, x.k.shape, x.v.shape]


# --- merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "aten"])
def test_accumulate(name) -> None:
    check_accumulate(get(name), torch.float64, "cpu")


@pytest.mark.parametrize("name", ["reference", "aten"])
def test_merge(name) -> None:
    lse, lse_part = torch.randn(2, 2, 3, 16, dtype=torch.float64)
    out_acc, out_part = torch.randn(2, 2, 16, 3, 8, dtype=torch.float64)
    lse[..., 0] = lse_part[..., 0] = -INF
    lse[..., 1] = -INF
    lse_part[..., 2] = -INF
    lse[..., 3], lse_part[..., 3] = 5000.0, 4999.0
    lse[..., 4], lse_part[..., 4] = -5000.0, -5001.0
    out_acc[:, [0, 1]], out_part[:, [0, 2]] = 0.0, 0.0
    weights = torch.softmax(torch.stack([lse, lse_part]), 0).nan_to_num(0.0).transpose(2, 3).unsqueeze(-1)
    want, want_lse = weights[0] * out_acc + weights[1] * out_part, torch.logsumexp(torch.stack([lse, lse_part]), 0)
    out = torch.full((2, 16, 3, 8), NAN, dtype=torch.float32)
    get(name).merge(lse, out_acc, lse_part, out_part, out)
    for name, x, y, atol in (("lse", lse, want_lse, 1e-12), ("acc", out_acc, want, 1e-12), ("out", out, want, 1e-6)):
        assert_near(x, y, atol, name)
    assert not out_acc[:, 0].any() and torch.isneginf(lse[..., 0]).all()


# --- flash_attn, with stand-ins that have the packages' signatures -------------------------------------------------


def repeat(x, group):
    return x.repeat_interleave(group, dim=2)


def stand_in_forward(q, k, v, causal, softmax_scale, softcap):
    assert q.shape[-1] % 8 == 0 and (not causal or q.shape[1] == k.shape[1])
    group = q.shape[2] // k.shape[2]
    if not softcap:
        return ATEN._attend(
            q, repeat(k, group), repeat(v, group), causal=causal, softmax_scale=softmax_scale, softcap=None
        )
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    mask = BlockMask(MaskKind.CAUSAL) if causal else FULL
    REFERENCE.forward(q, k, v, lse, None, out, mask, softmax_scale=softmax_scale, softcap=softcap, carry=False)
    return out, lse


def stand_in_backward(dout, q, k, v, out, lse, causal, softmax_scale, softcap):
    assert lse.is_contiguous() and out.shape == dout.shape == q.shape
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    mask = BlockMask(MaskKind.CAUSAL) if causal else FULL
    REFERENCE.backward(
        q,
        k,
        v,
        dout,
        lse,
        REFERENCE.delta(out, dout),
        dq,
        dk,
        dv,
        mask,
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        carry_dq=False,
        carry_dkv=False,
        deterministic=True,
    )
    return [x.to(q.dtype) for x in (dq, dk, dv)]


def fa2_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    assert (dropout_p, window_size_left, window_size_right, alibi_slopes, return_softmax) == (0.0, -1, -1, None, False)
    out, lse = stand_in_forward(q, k, v, causal, softmax_scale, softcap)
    return out, lse, torch.empty(0), torch.empty(2)


def fa2_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, window_size_left, window_size_right, alibi_slopes) == (0.0, -1, -1, None)
    grads = stand_in_backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale, softcap)
    for target, grad in zip((dq, dk, dv), grads):
        target.copy_(grad)
    return torch.empty(0)


def fa4_forward(q, k, v, *, softmax_scale=None, causal=False, softcap=None, return_lse=False):
    assert return_lse
    return (*stand_in_forward(q, k, v, causal, softmax_scale, softcap), None, None, None)


def fa4_backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *, deterministic=False):
    return tuple(stand_in_backward(dout, q, k, v, out, lse, causal, softmax_scale, softcap))


@pytest.fixture
def install(monkeypatch):
    """Installs a fake ``flash_attn`` of the given version for one test."""

    def fake(version: str) -> FlashAttnKernel:
        root = types.ModuleType("flash_attn")
        root.__path__, root.__version__ = [], version
        interface = types.ModuleType("flash_attn.flash_attn_interface")
        interface._flash_attn_forward, interface._flash_attn_backward = fa2_forward, fa2_backward
        cute = types.ModuleType("flash_attn.cute.interface")
        cute._flash_attn_fwd, cute._flash_attn_bwd = fa4_forward, fa4_backward
        monkeypatch.setitem(sys.modules, "flash_attn", root)
        if version.startswith("4"):
            monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
            monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", cute)
            monkeypatch.setattr(FlashAttnKernel, "_choose", lambda self, device: (4, cute))
        else:
            monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
        flash_attn._load.cache_clear()
        return FlashAttnKernel()

    yield fake
    flash_attn._load.cache_clear()


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("nheads_kv", [4, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "causal-1"])
@pytest.mark.parametrize("version", ["2.8.3", "4.0.0"])
def test_flash_attn_chain(install, version, kind, nheads_kv, softcap) -> None:
    x = make_inputs(96, 96, dtype=torch.float32, nheads_kv=nheads_kv, headdim=20, softcap=softcap)
    blocks, truth = naive_of(x, kind, CHUNKS, CHUNKS)
    assert_close(play(install(version), x, blocks, deterministic=True), truth, 3e-5)


def test_flash_attn_says_what_is_missing(install, monkeypatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    flash_attn._load.cache_clear()
    reason = FlashAttnKernel().unavailable()
    assert "flash_attn.cute.interface" in reason and "flash_attn.flash_attn_interface" in reason
    with pytest.raises(ValueError, match="expected a package that serves cpu, got none: cannot import"):
        FlashAttnKernel()._choose(torch.device("cpu"))


def test_flash_attn_too_old(install, monkeypatch) -> None:
    reason = install("2.6.3").unavailable()
    assert "expected flash_attn >= 2.7, got 2.6.3" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert install("2.7.0").unavailable() == "torch sees no CUDA GPU"
