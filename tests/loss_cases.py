"""What the loss tests share: an independent float64 loss by autograd, the same in the inputs' dtype, the error rule."""

from __future__ import annotations

import dataclasses

import torch

import seqpar_attn
from seqpar_attn.testing import assert_error_rule


@dataclasses.dataclass(frozen=True)
class Case:
    """``live``: share of the tokens that count. Labels of the others are ``ignore_index``."""

    tokens: int = 37
    vocab: int = 101
    hidden: int = 24
    live: float = 0.8
    bias: bool = False
    scale: float = 3.0
    """Spread of the logits."""
    shift: float = 0.0
    """Added to all logits (cross_entropy only)."""
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    @property
    def options(self) -> dict:
        names = ("ignore_index", "label_smoothing", "z_loss", "softcap")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default]
        return "-".join(changed) or "plain"


def cases(vocab: int = 101, tokens: int = 37) -> list[Case]:
    every = dict(label_smoothing=0.1, z_loss=1e-3, softcap=5.0)
    base = Case(tokens=tokens, vocab=vocab)
    return [
        base,
        dataclasses.replace(base, bias=True),
        *[dataclasses.replace(base, **{name: value}) for name, value in every.items()],
        dataclasses.replace(base, label_smoothing=0.2, z_loss=1e-2),
        dataclasses.replace(base, label_smoothing=0.2, softcap=8.0),
        dataclasses.replace(base, z_loss=1e-2, softcap=8.0),
        dataclasses.replace(base, **every, bias=True),
        dataclasses.replace(base, live=0.05, ignore_index=3),
    ]


def make_labels(case: Case, device: str = "cpu") -> torch.Tensor:
    labels = torch.randint(case.vocab, (case.tokens,))
    if case.tokens:  # both ends of the vocabulary
        labels[0], labels[-1] = 0, case.vocab - 1
    labels = torch.where(torch.rand(case.tokens) < case.live, labels, case.ignore_index)
    return labels.to(device)


def make_logits(case: Case, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return (torch.randn(case.tokens, case.vocab, device=device) * case.scale + case.shift).to(dtype)


def make_linear(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """``hidden, weight`` and, if the case has one, ``bias``."""
    inputs = {
        "hidden": torch.randn(case.tokens, case.hidden, device=device),
        "weight": torch.randn(case.vocab, case.hidden, device=device) * case.scale / case.hidden**0.5,
    }
    if case.bias:
        inputs["bias"] = torch.randn(case.vocab, device=device)
    return {name: x.to(dtype) for name, x in inputs.items()}


def token_losses(logits: torch.Tensor, labels: torch.Tensor, case: Case) -> torch.Tensor:
    """Per token, as the definition says it, in at least float32; differentiable."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    live = labels != case.ignore_index
    logp = torch.log_softmax(z, -1)
    chosen = logp.gather(-1, torch.where(live, labels, 0)[..., None])[..., 0]
    eps = case.label_smoothing
    loss = -(1 - eps) * chosen - eps * logp.mean(-1) + case.z_loss * torch.logsumexp(z, -1) ** 2
    return torch.where(live, loss, 0.0)


def plain(inputs: dict[str, torch.Tensor], labels: torch.Tensor, case: Case, dtype=None, upstream=None) -> dict:
    """Loss and gradients by autograd in ``dtype`` (the inputs' own by default). ``upstream``: per-token gradients; by
    default those of the mean over tokens that count (the sum, 0, if there are none)."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    logits = leaves.get("logits")
    if logits is None:
        logits = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    per_token = token_losses(logits, labels, case)
    if upstream is None:
        loss = per_token.sum() / (labels != case.ignore_index).sum().clamp(min=1)
    else:
        loss = (per_token * upstream.to(per_token.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), "tokens": per_token.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def ours(
    inputs: dict[str, torch.Tensor], labels: torch.Tensor, case: Case, upstream=None, factor: float = 1.0, **arguments
) -> dict:
    """The same from this package. ``upstream`` asks for per-token losses; ``factor`` multiplies the loss after it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    arguments |= case.options | ({"reduction": "none"} if upstream is not None else {})
    if "logits" in leaves:
        # Not a leaf, as in a model, and so that inplace=True cannot change what the tests compare with.
        loss = seqpar_attn.cross_entropy(leaves["logits"] * 1, labels, **arguments)
    else:
        loss = seqpar_attn.linear_cross_entropy(
            leaves["hidden"], leaves["weight"], labels, leaves.get("bias"), **arguments
        )
    result = {"loss" if upstream is None else "tokens": loss.detach()}
    total = loss * factor if upstream is None else (loss * upstream.to(loss.dtype)).sum() * factor
    grads = torch.autograd.grad(total, list(leaves.values()))
    for name, g, leaf in zip(leaves, grads, leaves.values()):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape, name
    return result | {f"d{n}": g for n, g in zip(leaves, grads)}


def check(got: dict, truth: dict, rival: dict, factor: float = 1.1, slack: float = 2e-7) -> None:
    """The error rule for every number in ``got``; ``slack`` relative: roundings of the result itself, which a rival of
    a lucky kind need not have. A mean is one number, whose error is chance: 4 standard errors of the rival's."""
    for name, x in got.items():
        # Compared as a caller gets it. The worst element scatters more than the norm.
        y, z = truth[name], rival[name].to(x.dtype)
        chance = 0.0
        if name == "loss" and y.item():
            errors = rival["tokens"].double() - truth["tokens"]
            chance = 4 * errors.norm().item() / max(int(truth["tokens"].count_nonzero()), 1) / abs(y.item())
        assert_error_rule(x, y, z, factor, slack + chance, name, worst_factor=2 * factor)


def check_call(
    kind: str, case: Case, dtype: torch.dtype, device: str = "cpu", times: int = 1, slack: float = 2e-7, **arguments
) -> None:
    """``kind``: "logits" or "linear". Mean and per-token losses, and all their gradients, against float64."""
    for _ in range(times):
        labels = make_labels(case, device)
        inputs = {"logits": make_logits(case, dtype, device)} if kind == "logits" else make_linear(case, dtype, device)
        upstream = torch.randn(case.tokens).to(device)
        for given in (None, upstream):
            truth = plain(inputs, labels, case, torch.float64, given)
            check(
                ours(inputs, labels, case, given, **arguments),
                truth,
                plain(inputs, labels, case, None, given),
                slack=slack,
            )
