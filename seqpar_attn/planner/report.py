"""Plans as text, JSON and a picture. Everything printed here is predicted, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .plan import Plan
from .policy import Policy

GIB = 2**30


def amount(tokens: int) -> str:
    """ "700K" for 716800, "1M" for 1048576; other numbers as they are."""
    for suffix, unit in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def parse_amount(text: str) -> int:
    """ "700k" is 700 * 1024, "1m" is 1024 * 1024; ValueError for anything else that is not a number."""
    units = {"k": 1 << 10, "m": 1 << 20}
    unit = units.get(text[-1:].lower(), 1)
    try:
        tokens = int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except ValueError:
        raise ValueError(f"expected a number of tokens such as 65536, 700k or 1m, got {text!r}") from None
    if tokens < 1:
        raise ValueError(f"expected a positive number of tokens, got {text!r}")
    return tokens


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, of which all but the first are numbers."""
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def links(plan: Plan) -> str:
    cluster = plan.cluster
    between = f", {cluster.between.name} between {cluster.nodes} nodes" if cluster.nodes > 1 < cluster.per_node else ""
    return f"{cluster.link.name}{between}"


def heading(plan: Plan) -> str:
    model = plan.model
    return (
        f"{model.name} ({model.parameters / 1e9:.2f} B parameters), {amount(plan.context)} tokens on "
        f"{plan.cluster.gpus} x {plan.gpu.name}, {links(plan)}"
    )


def render(plan: Plan, longest: int, longest_of_all: tuple[int, Policy] | None) -> str:
    """``longest``: context under the plan's policy; the other one over all policies that were open."""
    total, step = plan.memory.total, plan.step.total
    lines = [heading(plan), f"policy: {plan.policy}", "PREDICTED, not measured; see docs/planner.md", ""]
    rows = [(name, f"{size / GIB:.2f}", f"{100 * size / total:.0f}%") for name, size in plan.memory.parts]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows.append(("all", f"{total / GIB:.2f}", f"of {plan.capacity / GIB:.1f}: {verdict}"))
    lines += [f"memory per GPU at the worst moment, {plan.memory.moment}", table(("", "GiB", ""), rows), ""]
    if plan.memory.host:
        host = plan.memory.host / GIB
        lines += [f"page-locked host memory: {host:.1f} GiB per GPU, {host * plan.cluster.gpus:.1f} in all", ""]
    rows = [(name, f"{seconds:.2f}", f"{100 * seconds / step:.1f}%") for name, seconds in plan.step.parts]
    lines += ["time of a step", table(("", "s", ""), [*rows, ("all", f"{step:.2f}", "")]), ""]
    summary = [
        ("tokens/s, predicted", f"{plan.tokens_per_second:.0f}"),
        (f"MFU of {plan.gpu.peak_tflops:g} TFLOP/s, predicted", f"{100 * plan.mfu:.1f}%"),
        ("communication that is hidden, predicted", f"{100 * plan.step.hidden_share:.1f}%"),
        ("longest context with this policy, predicted", amount(longest)),
    ]
    lines += [f"{name}: {value}" for name, value in summary]
    if longest_of_all is not None and longest_of_all[0] > longest:
        lines.append(f"longest context of all policies, predicted: {amount(longest_of_all[0])} ({longest_of_all[1]})")
    lines.append(
        "note: memory is that of tensors; torch's allocator may hold more of it, less so with "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )
    if plan.model.window is not None:
        lines.append(f"note: the model's sliding window of {plan.model.window} tokens is planned as full causal")
    if plan.model.headdim not in plan.gpu.attention:
        other = plan.gpu.attention_of(plan.model.headdim)[1]
        lines.append(f"note: no rates for head dimension {plan.model.headdim}; those of {other} are used")
    lines += ["", "rates", *(f"  {name}: {source}" for name, source in plan.gpu.sources.items())]
    lines += [f"  link {link.name}: {link.gbps:g} GB/s, {link.source}" for link in _used(plan)]
    return "\n".join(lines)


def _used(plan: Plan) -> list[Any]:
    cluster = plan.cluster
    return [cluster.link] if cluster.nodes == 1 or cluster.per_node == 1 else [cluster.link, cluster.between]


def as_dict(plan: Plan, longest: int) -> dict[str, Any]:
    """JSON-compatible; bytes and seconds."""
    policy = plan.policy
    return {
        "predicted": True,
        "model": plan.model.name,
        "gpu": plan.gpu.name,
        "gpus": plan.cluster.gpus,
        "context": plan.context,
        "tokens_per_gpu": plan.tokens,
        "policy": {name: getattr(policy, name) for name in policy.__dataclass_fields__},
        "memory": dict(plan.memory.parts),
        "memory_total": plan.memory.total,
        "memory_moment": plan.memory.moment,
        "capacity": plan.capacity,
        "fits": plan.fits,
        "host_memory": plan.memory.host,
        "step": dict(plan.step.parts),
        "step_total": plan.step.total,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "hidden_share": plan.step.hidden_share,
        "longest": longest,
        "sources": dict(plan.gpu.sources),
    }


def render_sweep(plans: Sequence[tuple[int, Plan | str]]) -> str:
    """One row per context: the best plan, or why there is none."""
    header = ("context", "GiB", "host GiB", "step s", "tokens/s", "MFU", "hidden", "policy")
    rows: list[tuple[str, ...]] = []
    for context, plan in plans:
        if isinstance(plan, str):
            rows.append((amount(context), "", "", "", "", "", "", plan))
            continue
        cells = (plan.memory.total / GIB, plan.memory.host / GIB, plan.step.total)
        rates = (f"{plan.tokens_per_second:.0f}", f"{100 * plan.mfu:.1f}%", f"{100 * plan.step.hidden_share:.0f}%")
        rows.append((amount(context), *(f"{x:.1f}" for x in cells), *rates, str(plan.policy)))
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(c.rjust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in (header, *rows)
    )


def plot_sweep(plans: Sequence[tuple[int, Plan | str]], path: str) -> bool:
    """Tokens/s and memory against context, as PNG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(context, plan) for context, plan in plans if not isinstance(plan, str)]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    x = [context for context, _ in found]
    speed.plot(x, [plan.tokens_per_second for _, plan in found], marker="o")
    speed.set(xlabel="context (tokens)", ylabel="tokens/s of all GPUs, predicted", xscale="log", yscale="log")
    memory.plot(x, [plan.memory.total / GIB for _, plan in found], marker="o", label="predicted peak")
    memory.axhline(found[0][1].capacity / GIB, color="black", linestyle="--", label="what fits")
    memory.set(xlabel="context (tokens)", ylabel="GiB per GPU, predicted", xscale="log", ylim=(0, None))
    memory.legend()
    for axes in (speed, memory):
        axes.set_xticks(x, [amount(n) for n in x])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(heading(found[0][1]).replace(f"{amount(found[0][0])} tokens ", ""))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
