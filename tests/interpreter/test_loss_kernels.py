"""Run by ``tests/test_triton_interpret.py`` in a process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1 (see test_triton_interpret.py)", allow_module_level=True)

from loss_cases import Case, cases, check_call, make_labels, make_linear, make_logits, ours, plain
from split_cases import check_split, check_weight_sum

from seqpar_attn import cross_entropy
from seqpar_attn.loss.options import Options
from seqpar_attn.loss.reference import ReferenceRows
from seqpar_attn.loss.triton import TritonRows, refuses
from seqpar_attn.loss.triton import rows as kernels

SMALL = kernels.Block(lanes=8, vector=4, num_warps=4)
"""32 columns at a time: three whole blocks and a rest of 5 in a vocabulary of 101."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda columns, itemsize: SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases(101, 14), ids=str)
@pytest.mark.parametrize("kind", ["logits", "inplace", "linear"])
def test_loss(kind: str, case: Case, dtype: torch.dtype) -> None:
    # Rows of so few tokens scatter more than the rule allows: three roundings of the largest number.
    slack = 3 * torch.finfo(dtype).eps
    arguments = {"inplace": {"inplace": True}, "linear": {"logits_bytes": 5 * 112 * dtype.itemsize}}.get(kind, {})
    kind = "logits" if kind == "inplace" else kind
    check_call(kind, case, dtype, backend="triton", slack=slack, **arguments)


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 64, 96])
def test_edges_of_blocks(vocab: int) -> None:
    case = Case(tokens=7, vocab=vocab, live=1.0, label_smoothing=0.1, softcap=5.0, z_loss=1e-3)
    for kind in ("logits", "linear"):
        check_call(kind, case, torch.float32, backend="triton", slack=1e-6)


def test_the_real_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for vocab in (5000, 33333):
        block = kernels.choose(vocab, 4)
        assert block.lanes * block.vector < vocab or vocab == 5000
        check_call("logits", Case(tokens=2, vocab=vocab, live=1.0), torch.float32, backend="triton", slack=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_statistics_are_the_reference_s(smoothing: float) -> None:
    """Slices of a row too, where the label may be elsewhere; a label that is not there is never read."""
    options = Options(101, label_smoothing=smoothing, softcap=6.0)
    logits = torch.randn(9, 101)[:, 3:80] * 4
    weight = torch.tensor([1.0, 0.0, float("nan"), 1, 1, 1, 1, 1, 1])
    target = torch.tensor([-1, 5, 76, 0, -1, -1, 3, 7, 31], dtype=torch.int32)
    got = TritonRows().statistics(logits, target, weight, options)
    expected = ReferenceRows().statistics(logits, target, weight, options)
    assert (got - expected).abs().max() < 1e-4 and (got[0] - expected[0]).abs().max() < 1e-6
    grads = [torch.full_like(logits, 7.0) for _ in "ab"]
    for rows, grad in zip((TritonRows(), ReferenceRows()), grads):
        rows.gradient(logits, target, weight, expected, options, grad)
    assert grads[0][2].isnan().all() and not grads[0][1].any()
    assert (grads[0] - grads[1]).nan_to_num(0.0).abs().max() < 1e-6


def test_masked_words_and_large_logits() -> None:
    case = Case(tokens=6, vocab=150, live=1.0)
    logits, labels = make_logits(case, torch.float32), torch.arange(6) + 140
    logits[:, :130] = float("-inf")  # four whole blocks
    got = ours({"logits": logits}, labels, case, backend="triton")
    truth = plain({"logits": logits[:, 130:]}, labels - 130, dataclasses.replace(case, vocab=20), torch.float64)
    assert (got["loss"] - truth["loss"]).abs() < 1e-5
    assert (got["dlogits"][:, 130:] - truth["dlogits"]).abs().max() < 1e-6 and not got["dlogits"][:, :130].any()
    check_call("logits", Case(tokens=6, shift=1e4, label_smoothing=0.1), torch.float32, backend="triton", slack=1e-6)


def test_ignored_rows_and_columns_beyond() -> None:
    """NaN in ignored rows is not looked at, and what lies behind a row's end is neither read nor written."""
    whole = torch.full((5, 120), float("nan"))
    logits = whole[:, :101]
    logits[1:] = torch.randn(4, 101)
    logits.requires_grad_()
    labels = torch.tensor([-100, 1, 2, 3, 100])
    loss = cross_entropy(logits * 1, labels, backend="triton", inplace=True)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and not dlogits[0].any() and dlogits[1:].isfinite().all()
    out = torch.full((5, 120), 7.0)
    statistics = torch.ones(4, 5)
    weight = torch.tensor([0.0, 1, 1, 1, 1])
    TritonRows().gradient(logits.detach(), labels.int(), weight, statistics, Options(101), out[:, :101])
    assert (out[:, 101:] == 7).all() and not out[0, :101].any()


def test_labels_out_of_range() -> None:
    case = Case(tokens=6)
    inputs, labels = make_linear(case, torch.float32), make_labels(case)
    labels[3] = 101
    with pytest.raises(ValueError, match="got 101"):
        ours(inputs, labels, case, backend="triton")
    labels[3] = 2**31
    assert ours(inputs, labels, case, backend="triton", check_labels=False)["loss"].isnan()


@pytest.mark.parametrize("programs", [2048, 4])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scale(factor: float, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqpar_attn.loss.triton.rows.SCALE_PROGRAMS", programs)  # 6 tiles
    whole = torch.randn(3, 5000)
    x = whole[:, 1:4999]
    expected = whole.clone()
    expected[:, 1:4999] *= factor
    TritonRows().scale(x, torch.tensor(factor))
    assert torch.equal(whole, expected)


def test_split() -> None:
    check_split("cpu")


@pytest.mark.parametrize("low_bits", [8, 16])
def test_weight_sum(low_bits: int) -> None:
    check_weight_sum("cpu", low_bits, chunks=30)


def test_refusals() -> None:
    assert refuses(torch.device("cpu"), torch.float32) is None
    assert "rounds to bfloat16 wrongly" in refuses(torch.device("cpu"), torch.bfloat16)
    assert "got torch.float64" in refuses(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_is_noticed_by_others(reduction: str) -> None:
    """tanh has saved the logits; kernels write them behind autograd's back, so the loss has to tell it."""
    leaf = torch.randn(6, 9, requires_grad=True)
    loss = cross_entropy(leaf.tanh(), torch.arange(6), inplace=True, reduction=reduction, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
