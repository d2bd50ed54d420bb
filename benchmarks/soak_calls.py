"""What the ranks of soak.py do: calls drawn at random, every some compared with float64, and memory after them."""

from __future__ import annotations

import gc
import os
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch

import seqpar_attn
from seqpar_attn.layout import get_layout
from seqpar_attn.mask import Mask
from seqpar_attn.testing.errors import assert_error_rule, chance, error_report
from seqpar_attn.testing.steps import ring_steps
from seqpar_attn.testing.truth import attention64

NAMES = ("out", "dq", "dk", "dv")
RING_LAYOUTS = ("zigzag", "contiguous", "striped")
MASKS = ("full", "causal", "window", "packed", "packed full", "packed window")


@dataclass(frozen=True)
class Options:
    calls: int
    every: int
    """How many calls lie between two samples, and between two checks."""
    seed: int
    tokens: int
    """Of the longest sequence."""
    loopback: bool
    cuda: bool
    distinct: int | None = None
    """Problems, which then come again and again; None: every call may have another one."""


@dataclass(frozen=True)
class Problem:
    """One call, drawn alike by every rank."""

    method: str
    layout: str
    owners: int
    """How many ranks' keys a step attends: shards as short as these would all be attended in one."""
    mask: str
    dtype: torch.dtype
    batch: int
    seqlen: int
    nheads: int
    nheads_kv: int
    headdim: int
    arguments: dict[str, Any]
    transfer: dict[str, str]

    @property
    def kinds(self) -> list[str]:
        """What is counted."""
        return [f"{self.method} {self.layout}", self.mask, *(["softcap"] if "softcap" in self.arguments else [])]

    def __str__(self) -> str:
        kind = f"{self.method} {self.layout}, {self.mask}{', softcap' if 'softcap' in self.arguments else ''}"
        shape = f"{self.batch} x {self.seqlen} x {self.nheads}/{self.nheads_kv} x {self.headdim}"
        return f"{kind}, {shape}, {str(self.dtype).removeprefix('torch.')}"


def draw(options: Options, ranks: int, call: int) -> Problem:
    """The problem of a call: the same on every rank, whatever was drawn before it.

    Two of five calls are one of a few that come again and again, some with another batch: as in training, where what
    was worked out for a call is used many times.
    """
    if options.distinct is not None:
        call %= options.distinct
    own = random.Random(f"{options.seed}/{call}")
    if own.random() < 0.6:
        return _draw(options, ranks, own)
    usual = _draw(options, ranks, random.Random(f"{options.seed}/usual {own.randrange(6)}"))
    return replace(usual, batch=own.choice([usual.batch, usual.batch, 1, 2, 3, 4]))


def _draw(options: Options, ranks: int, chance_of: random.Random) -> Problem:
    pick = chance_of.choice
    method = pick(["ring"] * 3 + ["dist_flash", "ulysses"])
    layout = "contiguous" if method == "dist_flash" else pick(RING_LAYOUTS)
    mask = pick(MASKS)
    multiple = get_layout(layout, ranks).multiple
    seqlen = multiple * chance_of.randint(1, max(1, options.tokens // multiple))
    nheads = pick([n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n <= 8 or n == ranks])
    if method == "ulysses":
        nheads = ranks * pick([1, 2])
    nheads_kv = pick([n for n in range(1, nheads + 1) if nheads % n == 0])
    arguments: dict[str, Any] = {"causal": "full" not in mask}
    if "window" in mask:
        arguments["window_size"] = chance_of.randint(1, seqlen)
    if "packed" in mask:
        arguments["cu_seqlens"] = [0, *sorted(chance_of.randint(0, seqlen) for _ in range(pick([1, 3, 8]))), seqlen]
    if chance_of.random() < 0.2:
        arguments["softcap"] = pick([2.0, chance_of.uniform(1, 50)])
    transfer = {} if method == "ulysses" else {"transfer": pick(["pull", "ring"])}
    if method == "ring" and chance_of.random() < 0.2:
        transfer = {"transfer": "all_gather"}
    dtypes = [torch.bfloat16, torch.float16] if options.cuda else [torch.float32, torch.bfloat16]
    headdim = pick([64, 96, 128] if options.cuda else [8, 16, 24, 32])
    owners, batch = pick([1, 2, ranks]), pick([1, 1, 2])
    shape = (batch, seqlen, nheads, nheads_kv, headdim)
    return Problem(method, layout, owners, mask, pick(dtypes), *shape, arguments, transfer)


def whole(problem: Problem, options: Options, call: int) -> list[torch.Tensor]:
    """``q, k, v, dout`` of all tokens, made on the CPU so that every rank has the same."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + call)
    heads = (problem.nheads, problem.nheads_kv, problem.nheads_kv, problem.nheads)
    shapes = [(problem.batch, problem.seqlen, n, problem.headdim) for n in heads]
    return [torch.randn(shape, generator=generator).to(problem.dtype) for shape in shapes]


def attend(problem: Problem, group: Any, given: list[torch.Tensor], **layout: str) -> list[torch.Tensor]:
    """``out, dq, dk, dv`` of this process's shards ``q, k, v, dout``."""
    function = getattr(seqpar_attn, f"{problem.method}_attention")
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    out = function(q, k, v, group=group, **problem.arguments, **problem.transfer, **layout)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def compared(problem: Problem, results: list[torch.Tensor], given: list[torch.Tensor], device: torch.device) -> dict:
    """Per result the package's error rule: at most 1.1 x the error of one call on one device."""
    single = attend(problem, seqpar_attn.LoopbackGroup(1), [x.to(device) for x in given])
    a = problem.arguments
    mask = Mask(
        problem.seqlen, a["causal"], a.get("window_size"), tuple(a["cu_seqlens"]) if "cu_seqlens" in a else None
    )
    truth = attention64(*given[:3], mask, given[3], softcap=a.get("softcap"))
    found = {}
    for name, got, alone in zip(NAMES, results, single):
        got, alone, broken = got.cpu(), alone.cpu(), None
        try:
            slack = 2e-7 + chance(got, truth[name], alone)
            report = assert_error_rule(got, truth[name], alone, 1.1, slack, name, 3.0)
        except AssertionError as error:
            report, broken = error_report(got, truth[name], alone, name), str(error)
        assert report.baseline is not None
        found[name] = {
            "relative": report.relative,
            "single": report.baseline.relative,
            # Of the result's precision: what can be compared from call to call.
            "roundings": report.relative / torch.finfo(problem.dtype).eps,
            "max_abs": report.max_abs, "worst": list(report.worst),
            "actual": report.actual, "expected": report.expected, "broken": broken,
        }  # fmt: skip
    return found


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process, and how many blocks Python's own allocator has handed out: few objects that stay show
    there long before they do in the resident set."""
    gc.collect()
    with open("/proc/self/statm") as file:
        found = {"rss": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), "blocks": sys.getallocatedblocks()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return found


def play(rank: int, world_size: int, options: Options, ranks: int, calls: range) -> dict[str, Any]:
    """These calls. This process's memory after them and, from rank 0, the results of the last one."""
    device = torch.device("cuda", torch.cuda.current_device()) if options.cuda else torch.device("cpu")
    group = seqpar_attn.LoopbackGroup(ranks) if options.loopback else None
    if group is None:
        seqpar_attn.set_transport(None, "p2p")  # as the report says
    for call in calls:
        problem = draw(options, ranks, call)
        given, layout = whole(problem, options, call), get_layout(problem.layout, ranks)
        shards = [(layout.shard_all(x) if options.loopback else layout.shard(x, rank)).to(device) for x in given]
        with ring_steps(problem.owners * max(1, problem.seqlen // ranks)):
            results = attend(problem, group, shards, layout=problem.layout)
    together = [seqpar_attn.gather(x, problem.layout, group).cpu() for x in results]
    del given, shards, results
    return {"memory": memory(device), "results": together if rank == 0 else None}


def judge(rank: int, world_size: int, options: Options, ranks: int, call: int, results: list[torch.Tensor]) -> dict:
    """The comparison of a call's results. In a process of its own: float64 attention takes far more memory than what
    is measured."""
    problem = draw(options, ranks, call)
    device = torch.device("cuda" if options.cuda else "cpu")
    return compared(problem, results, whole(problem, options, call), device)
