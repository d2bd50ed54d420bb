"""The losses on one rank, in plain torch, against float64 autograd of the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from loss_cases import Case, cases, check, check_call, make_labels, make_linear, make_logits, ours, plain, token_losses

import seqpar_attn
from seqpar_attn import LoopbackGroup, cross_entropy, linear_cross_entropy
from seqpar_attn.loss import linear
from seqpar_attn.loss.products import WeightSum, product

KINDS = ["logits", "linear"]
EVERYTHING = Case(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, bias=True)
# One token of a vocabulary of 101 takes 112 * 8 bytes in float64: 5 tokens, and so 8 chunks of 37.
FEW = 5 * 112 * 8


def exact(got: dict, truth: dict, tolerance: float = 1e-12) -> None:
    for name, x in got.items():
        assert x.dtype == torch.float64 and x.shape == truth[name].shape, name
        assert (x - truth[name]).abs().max() <= tolerance * max(1.0, truth[name].abs().max()), name


@pytest.mark.parametrize("upstream", [False, True], ids=["mean", "none"])
@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("kind", ["logits", "inplace", "linear", "chunks"])
def test_float64_is_exact(kind: str, case: Case, upstream: bool) -> None:
    labels = make_labels(case)
    weights = torch.randn(case.tokens, dtype=torch.float64) if upstream else None
    logits = kind in ("logits", "inplace")
    inputs = {"logits": make_logits(case, torch.float64)} if logits else make_linear(case, torch.float64)
    arguments = {"inplace": {"inplace": True}, "chunks": {"logits_bytes": FEW}}.get(kind, {})
    exact(ours(inputs, labels, case, weights, **arguments), plain(inputs, labels, case, None, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases(211, 150)[::2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_rule(kind: str, case: Case, dtype: torch.dtype) -> None:
    check_call(kind, case, dtype)
    check_call(kind, case, dtype, **({"inplace": True} if kind == "logits" else {"logits_bytes": 9 * 224 * 4}))


def test_the_definition_is_torch() -> None:
    """The truth of these tests beside torch's own loss."""
    case = Case(label_smoothing=0.3)
    logits, labels = make_logits(case, torch.float64), make_labels(case)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.3, reduction="none")
    assert torch.allclose(token_losses(logits, labels, case), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vocab", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_small_vocabularies(kind: str, vocab: int) -> None:
    case = dataclasses.replace(EVERYTHING, vocab=vocab, tokens=5, live=1.0)
    labels = make_labels(case)
    inputs = {"logits": make_logits(case, torch.float64)} if kind == "logits" else make_linear(case, torch.float64)
    exact(ours(inputs, labels, case), plain(inputs, labels, case))


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 10, 11, 127, 128, 129, 300])
def test_chunks_of_any_length(tokens: int) -> None:
    case = dataclasses.replace(EVERYTHING, tokens=tokens, live=0.9)
    labels, inputs = make_labels(case), make_linear(case, torch.float64)
    truth = plain(inputs, labels, case)
    for logits_bytes in (1, FEW, 130 * 112 * 8, 1 << 30):
        exact(ours(inputs, labels, case, logits_bytes=logits_bytes), truth)


def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(linear._Chunks):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append((self.buffer.untyped_storage().nbytes(), self.length))

    monkeypatch.setattr(linear, "_Chunks", Watched)
    case = Case(tokens=1000, vocab=33, hidden=8)
    labels, inputs = make_labels(case), make_linear(case, torch.float32)
    for limit in (48 * 4, 48 * 4 * 7, 48 * 4 * 200, 48 * 4 * 1000, 1 << 30):
        seen.clear()
        ours(inputs, labels, case, logits_bytes=limit)
        ((size, length),) = seen
        assert size <= limit and size <= 48 * 4 * 1024
        assert -(-1000 // length) <= max(1, -(-1000 * 48 * 4 // limit)) + 1, "more chunks than the limit asks for"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str, reduction: str) -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    hidden, weight = torch.randn(2, 0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    if kind == "logits":
        loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long), reduction=reduction)
    else:
        loss = linear_cross_entropy(hidden, weight, torch.zeros(2, 0, dtype=torch.long), reduction=reduction)
    if reduction == "none":
        assert loss.shape == ((0,) if kind == "logits" else (2, 0))
    else:
        assert loss.item() == 0
    loss.sum().backward()
    if kind == "linear":
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape
        assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ignored_tokens_cannot_matter(kind: str, inplace: bool, reduction: str) -> None:
    """Not even with logits that are not finite."""
    leaf = torch.randn(4, 7, requires_grad=True)
    weight = torch.randn(7, 7, requires_grad=True)
    labels = torch.full((4,), -100)
    bad = torch.full_like(leaf, float("nan"))
    if kind == "logits":
        loss = cross_entropy(leaf + bad, labels, reduction=reduction, inplace=inplace)
    else:
        loss = linear_cross_entropy(leaf + bad, weight, labels, reduction=reduction)
    assert not loss.detach().any()
    (loss * float("inf")).nan_to_num(0.0).sum().backward()
    loss = cross_entropy(leaf * 1, labels, reduction="sum")
    (dleaf,) = torch.autograd.grad(loss, leaf)
    assert not dleaf.any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_ignored_is_zero(kind: str) -> None:
    case = Case(live=0.0)
    labels = torch.full((37,), -100)
    inputs = {"logits": make_logits(case, torch.float32)} if kind == "logits" else make_linear(case, torch.float32)
    for name, x in ours(inputs, labels, case).items():
        assert not x.any(), name


def test_large_logits() -> None:
    """PEAK and TOTAL apart: at 1e4, log-sum-exp in float32 is good to 1e-3 only."""
    case = Case(shift=1e4, label_smoothing=0.1)
    check_call("logits", case, torch.float32)
    logits, labels = make_logits(case, torch.float32), make_labels(case)
    error = (
        ours({"logits": logits}, labels, case)["loss"] - plain({"logits": logits}, labels, case, torch.float64)["loss"]
    )
    assert error.abs() < 1e-5


@pytest.mark.parametrize("kind", ["logits", "inplace"])
def test_masked_words(kind: str) -> None:
    """Logits of -inf are words that cannot come; a whole block of them too."""
    case = Case(tokens=9, vocab=300, live=1.0)
    logits, labels = make_logits(case, torch.float64), torch.arange(9) + 280
    logits[:, :270] = float("-inf")
    got = ours({"logits": logits}, labels, case, inplace=kind == "inplace")
    expected = plain({"logits": logits[:, 270:]}, labels - 270, dataclasses.replace(case, vocab=30))
    assert (got["loss"] - expected["loss"]).abs() < 1e-12 and not got["dlogits"][:, :270].any()
    assert (got["dlogits"][:, 270:] - expected["dlogits"]).abs().max() < 1e-12


def test_float16_gradients_of_a_mean_do_not_vanish() -> None:
    """p / tokens is below float16's smallest number; with the caller's loss scale it is not."""
    case = Case(tokens=4000, vocab=500, live=1.0, scale=0.1, hidden=8)
    for kind in ("logits", "inplace", "linear"):
        labels = make_labels(case)
        half = torch.float16
        inputs = make_linear(case, half) if kind == "linear" else {"logits": make_logits(case, half)}
        arguments = {"inplace": True} if kind == "inplace" else {}
        got = ours(inputs, labels, case, factor=2.0**14, **arguments)
        truth = plain(inputs, labels, case, torch.float64)
        for name in truth.keys() - {"loss", "tokens"}:
            x, y = got[name].double() / 2**14, truth[name]
            assert (x - y).norm() < 2e-3 * y.norm(), name


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["logits", "inplace", "linear"])
def test_upstream_factor(kind: str, factor: float) -> None:
    case = EVERYTHING
    labels = make_labels(case)
    inputs = make_linear(case, torch.float64) if kind == "linear" else {"logits": make_logits(case, torch.float64)}
    got = ours(inputs, labels, case, factor=factor, **({"inplace": True} if kind == "inplace" else {}))
    truth = plain(inputs, labels, case)
    exact(got, {n: x if n == "loss" else factor * x for n, x in truth.items()})


def test_bfloat16_factor_costs_no_second_rounding() -> None:
    """Of the linear loss: its gradients wait for the factor in float32."""
    case = Case(tokens=200, vocab=211)
    labels, inputs = make_labels(case), make_linear(case, torch.bfloat16)
    got = ours(inputs, labels, case, factor=0.3)
    upstream = torch.full((200,), 0.3) / (labels != -100).sum()
    truth = plain(inputs, labels, case, torch.float64, upstream)
    check({n: x for n, x in got.items() if n != "loss"}, truth, plain(inputs, labels, case, None, upstream))


def test_sums_over_chunks_are_float32() -> None:
    """A weight's gradient that is summed in bfloat16 over 100 chunks is far off."""
    tokens, vocab, width = 800, 40, 16
    g, h = (torch.rand(tokens, n).bfloat16() for n in (vocab, width))
    weight = torch.empty(vocab, width, dtype=torch.bfloat16)
    total = WeightSum(weight, split=False)
    for start in range(0, tokens, 8):
        total.add(g[start : start + 8], h[start : start + 8])
    truth = g.double().t() @ h.double()
    got = total.finish(torch.tensor(0.5)).double() * 2
    assert torch.equal(got.bfloat16(), truth.bfloat16()) or (got - truth).norm() < 2.0**-9 * truth.norm()
    assert product(g.t(), h, torch.empty(vocab, width)).sub(truth).norm() < 1e-6 * truth.norm()


# Shapes, strides, what needs gradients -------------------------------------------------------------------------------


def test_leading_dimensions_and_strides() -> None:
    case = Case(tokens=30, softcap=5.0)
    labels, inputs = make_labels(case), make_linear(case, torch.float64)
    logits = inputs["hidden"] @ inputs["weight"].t()
    truth = plain(inputs, labels, case)
    wide = torch.stack([inputs["hidden"], inputs["hidden"]], -1)[..., 0].view(2, 15, 24)
    backwards = labels.view(2, 15).t().contiguous().t()
    assert not wide.is_contiguous() and not backwards.is_contiguous()
    loss = linear_cross_entropy(wide, inputs["weight"], backwards, softcap=5.0)
    assert (loss - truth["loss"]).abs() < 1e-12
    per_token = linear_cross_entropy(wide, inputs["weight"], backwards, softcap=5.0, reduction="none")
    assert per_token.shape == (2, 15) and (per_token.flatten() - truth["tokens"]).abs().max() < 1e-12
    for inplace in (False, True):
        for layout in (
            lambda x: x.t().contiguous().t().view(2, 15, 101),
            lambda x: F.pad(x, (0, 9))[:, :101].view(2, 15, 101),
            lambda x: x[:1].expand(30, 101).view(2, 15, 101),
            lambda x: x.view(15, 2, 101).transpose(0, 1),
            lambda x: (x * 1).view(2, 15, 101)[:, :, :50],
        ):
            leaf = logits.clone().requires_grad_()
            given = layout(leaf)
            small = backwards.clamp(max=given.shape[-1] - 1)
            expected = token_losses(layout(leaf), small, case).sum() / (small != -100).sum()
            (dleaf,) = torch.autograd.grad(expected, leaf)
            loss = cross_entropy(given, small, softcap=5.0, inplace=inplace)
            (got,) = torch.autograd.grad(loss, leaf)
            assert (loss - expected).abs() < 1e-12
            assert (got - dleaf).abs().max() < 1e-12


def test_one_token_without_dimensions() -> None:
    logits = torch.randn(5, dtype=torch.float64)
    loss = cross_entropy(logits, torch.tensor(2))
    assert loss.shape == () and (loss - F.cross_entropy(logits, torch.tensor(2))).abs() < 1e-12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
def test_label_dtypes(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 2, 7, 1])
    assert torch.equal(cross_entropy(logits, labels.to(dtype)), cross_entropy(logits, labels))


def test_inplace_reuses_the_memory() -> None:
    for dtype, reduction in ((torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "mean")):
        leaf = torch.randn(6, 9, dtype=dtype, requires_grad=True)
        logits = leaf * 1
        loss = cross_entropy(logits, torch.arange(6), inplace=True, reduction=reduction)
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
        assert dlogits.data_ptr() == logits.data_ptr()
    logits = leaf.detach() * 1
    before = logits.clone()
    cross_entropy(logits, torch.arange(6), inplace=True)
    assert torch.equal(logits, before), "nobody needs a gradient, so nothing is overwritten"


def test_inplace_is_noticed_by_others() -> None:
    """tanh has saved the logits for its own backward: silence would be wrong gradients."""
    for reduction in ("mean", "none"):
        leaf = torch.randn(6, 9, requires_grad=True)
        loss = cross_entropy(leaf.tanh(), torch.arange(6), inplace=True, reduction=reduction)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_without_inplace_logits_stay() -> None:
    logits = torch.randn(6, 9, requires_grad=True)
    before = logits.detach().clone()
    loss = cross_entropy(logits, torch.arange(6))
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0]) and torch.equal(logits.detach(), before)


def test_second_backward_says_why_not() -> None:
    logits, labels = torch.randn(6, 9, requires_grad=True), torch.arange(6)
    weight = torch.randn(9, 9, requires_grad=True)
    for loss, words in (
        (cross_entropy(logits * 1, labels, inplace=True), "overwritten by their gradient"),
        (linear_cross_entropy(logits, weight, labels), "computed in forward"),
    ):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=f"expected one backward pass.*{words}"):
            loss.backward()
    loss = linear_cross_entropy(logits, weight, labels, reduction="none").sum()
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_refused(kind: str) -> None:
    x, weight = torch.randn(6, 9, requires_grad=True), torch.randn(9, 9)
    loss = cross_entropy(x, torch.arange(6)) if kind == "logits" else linear_cross_entropy(x, weight, torch.arange(6))
    with pytest.raises(RuntimeError, match=r"create_graph=False: .*cross_entropy can be differentiated once only"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_nobody_needs_cost_nothing(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are counted: one for the logits (two with per-token losses), one for each gradient."""
    case = Case(tokens=6, bias=True)
    inputs, labels = make_linear(case, torch.float32), torch.arange(6)
    whole = plain(inputs, labels, case, upstream=torch.ones(6) if reduction == "none" else None)
    made = []
    for module, name in ((linear, "product"), (WeightSum, "add")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: (made.append(n), f(*a))[1])
    for needed in ((), ("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")):
        made.clear()
        leaves = {n: x.clone().requires_grad_(n in needed) for n, x in inputs.items()}
        loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, leaves["bias"], reduction=reduction)
        assert loss.requires_grad == bool(needed)
        if needed:
            loss.sum().backward()
        assert sorted(made) == sorted({"hidden": "product", "weight": "add"}[n] for n in needed if n != "bias")
        for name, x in leaves.items():
            assert (x.grad is not None) == (name in needed)
            if x.grad is not None:
                assert torch.allclose(x.grad, whole[f"d{name}"], atol=1e-5)
    made.clear()
    with torch.no_grad():
        leaves = {n: x.requires_grad_() for n, x in leaves.items()}
        linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, leaves["bias"], reduction=reduction)
    assert not made


def test_autocast_is_ignored() -> None:
    case = Case(bias=True)
    labels, inputs = make_labels(case), make_linear(case, torch.float32)
    plainly = ours(inputs, labels, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(inputs, labels, case)
        per_token = ours(inputs, labels, case, torch.ones(case.tokens))
    assert all(torch.equal(plainly[name], inside[name]) for name in plainly)
    expected = ours(inputs, labels, case, torch.ones(case.tokens))
    assert all(torch.equal(expected[name], per_token[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile(kind: str) -> None:
    case = Case(softcap=5.0)
    labels, inputs = make_labels(case), make_linear(case, torch.float64)
    truth = plain(inputs, labels, case)

    def step(hidden, weight):
        hidden = hidden * 2
        if kind == "logits":
            return cross_entropy(hidden @ weight.t() / 2, labels, softcap=5.0) * 3
        return linear_cross_entropy(hidden / 2, weight, labels, softcap=5.0) * 3

    torch._dynamo.reset()
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    loss = torch.compile(step, backend="eager")(hidden, weight)
    loss.backward()
    assert (loss / 3 - truth["loss"]).abs() < 1e-12
    assert (hidden.grad / 3 - truth["dhidden"]).abs().max() < 1e-12
    assert (weight.grad / 3 - truth["dweight"]).abs().max() < 1e-12


# What is wrong is said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 9, 10**12, -(2**40)])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range(kind: str, label: int) -> None:
    logits, weight, labels = torch.randn(6, 9, requires_grad=True), torch.randn(9, 9), torch.arange(6)
    labels[4] = label

    def call(**arguments):
        if kind == "logits":
            return cross_entropy(logits, labels, **arguments)
        return linear_cross_entropy(logits, weight, labels, **arguments)

    with pytest.raises(ValueError, match=rf"expected labels in \[0, 9\) or ignore_index -100, got {label} \(1 such"):
        call()
    # Nobody checks: never silently a number.
    loss = call(check_labels=False)
    assert loss.isnan()
    loss.backward()
    assert logits.grad is not None and logits.grad[4].isnan().all()
    assert call(ignore_index=label).isfinite()


X, W, Y = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, dtype=torch.long)
BAD = {
    "lengths": ((X, W, Y[:3]), {}, "labels of the shape of hidden"),
    "float labels": ((X, W, Y.float()), {}, "labels of an integer dtype"),
    "bool labels": ((X, W, Y.bool()), {}, "labels of an integer dtype"),
    "labels elsewhere": ((X, W, Y.to("meta")), {}, "labels on the device"),
    "weight transposed": ((X, torch.zeros(6, 9).t(), Y), {}, "contiguous weight"),
    "weight width": ((X, torch.zeros(9, 5), Y), {}, "weight of shape"),
    "weight dimensions": ((X, torch.zeros(6), Y), {}, "weight of shape"),
    "no words": ((X, torch.zeros(0, 6), Y), {}, "weight of shape"),
    "weight dtype": ((X, W.bfloat16(), Y), {}, "weight in the dtype of hidden"),
    "weight elsewhere": ((X, W.to("meta"), Y), {}, "weight on the device"),
    "integers": ((X.long(), W.long(), Y), {}, "bfloat16"),
    "bias shape": ((X, W, Y, torch.zeros(8)), {}, "bias of shape"),
    "bias dtype": ((X, W, Y, torch.zeros(9).half()), {}, "bias as hidden"),
    "reduction": ((X, W, Y), {"reduction": "average"}, "reduction"),
    "grad_reduction": ((X, W, Y), {"grad_reduction": "max"}, "grad_reduction"),
    "grad_reduction of a sum": ((X, W, Y), {"grad_reduction": "mean", "reduction": "sum"}, "only with reduction"),
    "group of a sum": ((X, W, Y), {"group": LoopbackGroup(1), "reduction": "sum"}, "group only with"),
    "tp_group alone": ((X, W, Y), {"tp_group": LoopbackGroup(1)}, "group with tp_group"),
    "virtual tp": ((X, W, Y), {"tp_group": LoopbackGroup(2), "reduction": "sum"}, "group of processes"),
    "vocab_size": ((X, W, Y), {"vocab_size": 10}, "10 words"),
    "smoothing": ((X, W, Y), {"label_smoothing": 1.0}, "label_smoothing"),
    "z_loss": ((X, W, Y), {"z_loss": -1.0}, "z_loss"),
    "softcap": ((X, W, Y), {"softcap": 0.0}, "softcap"),
    "softcap inf": ((X, W, Y), {"softcap": float("inf")}, "softcap"),
    "ignore_index": ((X, W, Y), {"ignore_index": 1.5}, "ignore_index"),
    "logits_bytes": ((X, W, Y), {"logits_bytes": 0}, "logits_bytes"),
    "backend": ((X, W, Y), {"backend": "fastest"}, "auto, triton, reference"),
    "triton": ((X, W, Y), {"backend": "triton"}, "triton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    tensors, arguments, words = BAD[name]
    with pytest.raises(ValueError, match=f"expected.*{words}") as error:
        linear_cross_entropy(*tensors, **arguments)
    assert "got" in str(error.value)
    if "logits_bytes" not in arguments and len(tensors) == 3 and tensors[1] is W:
        # Of cross_entropy the same, where it has the same argument; "10 words" is a matter of logits of 9.
        with pytest.raises(ValueError, match=f"expected.*{words.replace('hidden', 'logits')}"):
            cross_entropy(torch.zeros(4, 9), *tensors[2:], **arguments)


def test_no_words() -> None:
    with pytest.raises(ValueError, match="expected logits of at least one word, got"):
        cross_entropy(torch.zeros(4, 0), Y)
    with pytest.raises(ValueError, match="at least 1 dimension"):
        cross_entropy(torch.tensor(1.0), torch.tensor(1))


def test_exported() -> None:
    assert {"cross_entropy", "linear_cross_entropy"} <= set(seqpar_attn.__all__)
