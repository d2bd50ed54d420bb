"""``python -m seqpar_attn plan``: memory, time and the best policy of a training run, predicted."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from . import calibration
from .hardware import GPUS, LINKS, find_gpu, find_link
from .models import MODELS, find_model
from .plan import DoesNotFitError, Plan, best_plan, longest, make_cluster, make_plan, policies
from .policy import ACTIVATIONS, ATTENTION, METHODS, Policy
from .report import as_dict, parse_amount, plot_sweep, render, render_sweep

CONTEXTS = ("64k", "128k", "256k", "512k", "700k", "1m", "2m", "4m")


def _tiles(text: str) -> int | str | None:
    if text in ("best", "none"):
        return "best" if text == "best" else None
    return parse_amount(text)


def add_command(commands: Any) -> None:
    """Adds ``plan`` to the subcommands of ``python -m seqpar_attn``."""
    parser: argparse.ArgumentParser = commands.add_parser("plan", help=__doc__, description=__doc__)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a config.json or its folder")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default h100-80g")
    parser.add_argument("--link", default="nvlink4", help=", ".join(LINKS))
    parser.add_argument("--between", help="link between nodes; default ib400")
    parser.add_argument("--context", help="tokens; k is 1024, m 1024 k")
    parser.add_argument("--method", default="best", help=f"best, {', '.join(METHODS)}")
    parser.add_argument("--ulysses", type=int, help="ranks that exchange heads, for usp")
    parser.add_argument("--attention", default="best", help=f"best, {', '.join(ATTENTION)}")
    parser.add_argument("--activations", default="best", help=f"best, {', '.join(ACTIVATIONS)}")
    parser.add_argument("--tile-mlp", default="best", help="best, none or tokens")
    parser.add_argument("--calibration", help="rates of a GPU, written by benchmarks/calibrate.py")
    parser.add_argument("--sweep", nargs="*", metavar="CONTEXT", help=f"a table; default {' '.join(CONTEXTS)}")
    parser.add_argument("--plot", metavar="PNG", help="of the sweep")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _sweep(arguments: argparse.Namespace, *where: Any) -> int:
    model, gpu, cluster, choices = where
    rows: list[tuple[int, Plan | str]] = []
    for text in arguments.sweep or CONTEXTS:
        context = parse_amount(text)
        try:
            rows.append((context, best_plan(model, gpu, cluster, context, choices)))
        except DoesNotFitError:
            rows.append((context, "does not fit"))
    found = [plan for _, plan in rows if isinstance(plan, Plan)]
    if arguments.json:
        dicts = [
            {"predicted": True, "context": context, "fits": False}
            if isinstance(p, str)
            else as_dict(p, longest(model, gpu, cluster, p.policy))
            for context, p in rows
        ]
        print(json.dumps(dicts, indent=1))
    else:
        print(f"{model.name} on {cluster.gpus} x {gpu.name}; PREDICTED, not measured\n{render_sweep(rows)}")
    if arguments.plot:
        if not found:
            raise ValueError("expected a context that fits for a plot, got none")
        if not plot_sweep(rows, arguments.plot):
            raise ValueError("expected matplotlib for --plot, got none: pip install matplotlib")
    return 0 if found else 1


def _plan(arguments: argparse.Namespace) -> int:
    model = find_model(arguments.model)
    if arguments.calibration and arguments.gpu:
        raise ValueError(f"expected --gpu or --calibration, got both: {arguments.gpu!r}")
    gpu = calibration.read(arguments.calibration) if arguments.calibration else find_gpu(arguments.gpu or "h100-80g")
    between = None if arguments.between is None else find_link(arguments.between)
    cluster = make_cluster(arguments.gpus, find_link(arguments.link), between)
    choices = policies(
        model,
        arguments.gpus,
        arguments.method,
        arguments.attention,
        arguments.activations,
        _tiles(arguments.tile_mlp),
        arguments.ulysses,
    )
    if arguments.sweep is not None:
        return _sweep(arguments, model, gpu, cluster, choices)
    if arguments.plot:
        raise ValueError("expected --sweep with --plot, got --plot alone")
    if arguments.context is None:
        raise ValueError("expected --context TOKENS or --sweep, got neither")
    context = parse_amount(arguments.context)
    if len(choices) == 1:  # nothing is left to choose: show it even if it does not fit
        plan = make_plan(model, gpu, cluster, context, choices[0])
    else:
        plan = best_plan(model, gpu, cluster, context, choices)
    most = longest(model, gpu, cluster, plan.policy)
    if arguments.json:
        print(json.dumps(as_dict(plan, most), indent=1))
    else:
        print(render(plan, most, _longest_of(model, gpu, cluster, choices)))
    return 0 if plan.fits else 1


def _longest_of(model: Any, gpu: Any, cluster: Any, choices: list[Policy]) -> tuple[int, Policy] | None:
    if len(choices) == 1:
        return None
    return max(((longest(model, gpu, cluster, p), p) for p in choices), key=lambda found: found[0])


def _run(arguments: argparse.Namespace) -> int:
    try:
        return _plan(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
