"""Errors of a result against float64, and the rule that tests go by.

A tolerance in absolute numbers says little: what a result may be wrong by depends on its dtype and on the data. So
the yardstick is a *baseline*, the same computation done plainly in the same dtype: a kernel passes when it is about
as close to the float64 truth as the baseline is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ErrorReport:
    """How far a tensor is from the float64 truth. ``str()`` is one line with the worst element."""

    name: str
    max_abs: float
    relative: float
    """Frobenius norm of the error over that of the truth."""
    worst: tuple[int, ...]
    """Index of the element with the largest absolute error; of the first that is not finite, if there is one."""
    actual: float
    expected: float
    finite: bool
    """Whether the tensor is finite wherever the truth is."""
    baseline: ErrorReport | None = None
    """The same of the same-dtype reference, if one was given."""

    def __str__(self) -> str:
        line = (
            f"{self.name}: max abs {self.max_abs:.3e}, relative {self.relative:.3e}, "
            f"worst at {list(self.worst)}: {self.actual:.8g}, truth {self.expected:.8g}"
        )
        if self.baseline is None:
            return line
        return f"{line} (baseline: max abs {self.baseline.max_abs:.3e}, relative {self.baseline.relative:.3e})"


def error_report(
    actual: torch.Tensor,
    expected64: torch.Tensor,
    same_dtype_reference: torch.Tensor | None = None,
    name: str = "result",
) -> ErrorReport:
    """Measure ``actual`` against the truth ``expected64`` (float64, same shape), and the reference too if given.

    Elements that are equal count as no error, so infinities that belong there (an lse of -inf) are right.
    """
    if actual.shape != expected64.shape:
        raise ValueError(f"expected {name} of shape {list(expected64.shape)} (the truth's), got {list(actual.shape)}")
    if expected64.dtype != torch.float64:
        raise ValueError(f"expected the truth of {name} in float64, got {expected64.dtype}")
    baseline = None
    if same_dtype_reference is not None:
        baseline = error_report(same_dtype_reference, expected64, name=f"baseline of {name}")
    if not actual.numel():
        return ErrorReport(name, 0.0, 0.0, (), 0.0, 0.0, True, baseline)
    got, truth = actual.detach().double().cpu(), expected64.detach().cpu()
    error = torch.where(got == truth, 0.0, (got - truth).abs())
    # NaN compares as the largest: what is not finite is the worst element.
    ranked = torch.where(error.isfinite(), error, float("inf"))
    flat = int(ranked.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    norm = truth[truth.isfinite()].norm().item()
    return ErrorReport(
        name=name,
        max_abs=ranked.max().item(),
        relative=ranked.norm().item() / norm if norm else ranked.norm().item(),
        worst=worst,
        actual=got.flatten()[flat].item(),
        expected=truth.flatten()[flat].item(),
        finite=bool(ranked.isfinite().all()),
        baseline=baseline,
    )


def assert_error_rule(
    actual: torch.Tensor,
    truth: torch.Tensor,
    baseline: torch.Tensor,
    factor: float = 1.1,
    slack: float = 1e-12,
    name: str = "result",
    worst_factor: float | None = None,
) -> ErrorReport:
    """Fail unless ``actual`` is as close to the float64 ``truth`` as ``baseline`` is, up to ``factor``.

    Both the relative Frobenius error and the largest absolute error must be at most ``factor`` times the baseline's,
    the latter ``worst_factor`` times if given (a maximum scatters more than a norm where two results round
    independently). ``slack`` is added to both bounds (relative to the truth's largest element for the latter), for
    baselines that are exact by luck. A NaN or an infinity where the truth has none fails. Returns the report.
    """
    report = error_report(actual, truth, baseline, name)
    assert report.baseline is not None
    if not report.baseline.finite:
        raise ValueError(f"expected a baseline that is finite where the truth is, got {report.baseline}")
    finite = truth.detach()[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    if not report.finite:
        raise AssertionError(f"not finite where the truth is: {report}")
    if report.relative > factor * report.baseline.relative + slack:
        raise AssertionError(f"relative error above {factor} x the baseline's: {report}")
    worst_factor = factor if worst_factor is None else worst_factor
    if report.max_abs > worst_factor * report.baseline.max_abs + slack * scale:
        raise AssertionError(f"largest error above {worst_factor} x the baseline's: {report}")
    return report


def chance(actual: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor, factor: float = 1.1) -> float:
    """What four standard errors of the mean square add to a relative error: slack for :func:`assert_error_rule` where
    a few elements with large roundings make up most of it."""
    truth = truth.double()
    seen = truth.isfinite()
    error, allowed = ((x.double() - truth)[seen] for x in (actual, baseline))
    limit = factor * allowed.norm()
    more = (limit**2 + 4 * (error**4 + allowed**4).sum().sqrt()).sqrt() - limit
    return (more / truth[seen].norm().clamp(min=1e-30)).nan_to_num().item() if truth.numel() else 0.0
