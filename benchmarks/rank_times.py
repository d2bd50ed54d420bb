"""One rank's part in ``ranks.py``: check every contender, then time all of them in rounds."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import many
import torch
import torch.distributed as dist
from rank_contenders import PUSHED, REFERENCE, Contender, Data, Problem, errors, ours, peers, results
from rank_waits import Log, Waits

import seqpar_attn
from seqpar_attn import autograd, kernels
from seqpar_attn.testing.still import Idle, Still

HEAD_START_CYCLES = 10_000_000  # about 5 ms, in which the host runs ahead as it does in a model
BATCH_MS = 10.0
"""Short calls are timed several at a time: a start that is off by microseconds must not count."""
LIMIT = 2e-2
"""Of a relative difference between bfloat16 results; what is wrong is off by far more."""
SINGLE = "one GPU"
WATCHED = "watched alone"
"""A whole call that says how long its computation stands still for transfers."""
MEASURED_APART = (REFERENCE, f"{REFERENCE}, {PUSHED}", "dist_flash", f"dist_flash, {PUSHED}")
"""Whose transfers overlap with computation; Ulysses' exchanges stand before and after it."""
LONGEST_APART = 65536
"""Tokens per GPU beyond which that takes seconds per call, and transfers are a hundredth of it."""


@dataclass(frozen=True)
class Options:
    rounds: int
    seconds: float
    """About how long the rounds of a length may take; there are never fewer than three."""
    longest_single: int
    dry: bool


OURS = (*MEASURED_APART, "ulysses", "usp")


_IDLE = Idle()


@contextlib.contextmanager
def _communicators(made_of: Callable[[Any, torch.device], Any]) -> Iterator[None]:
    """Others than the real ones, made of these."""
    real = autograd.communicator
    autograd.communicator = lambda name, device: made_of(real(name, device), device)  # type: ignore[assignment]
    try:
        yield
    finally:
        autograd.communicator = real


@contextlib.contextmanager
def still() -> Iterator[None]:
    """What is left is a rank's computation, on what the buffers hold."""
    with _communicators(lambda real, _: Still(real.world_size, real.local_ranks)):
        yield


@contextlib.contextmanager
def watched() -> Iterator[Log]:
    """The waits of all passes that are played inside, in their order."""
    log: Log = []
    with _communicators(lambda real, device: Waits(real, log, device)):
        yield log


@contextlib.contextmanager
def idle() -> Iterator[None]:
    real = kernels.resolve
    kernels.resolve = lambda *args, **kwargs: _IDLE  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        kernels.resolve = real


class Clock:
    """Milliseconds between a moment that all ranks share and the end of this rank's work, and those that the host takes
    to ask for it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.signal = torch.zeros(1, device=device)

    def __call__(self, work: Callable[[], Any]) -> tuple[float, float]:
        if not self.cuda:
            dist.barrier()
            start = time.perf_counter()
            work()
            ms = (time.perf_counter() - start) * 1e3
            return ms, ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(HEAD_START_CYCLES)
        dist.all_reduce(self.signal)  # on the devices, so that they start within microseconds of each other
        begin.record()
        start = time.perf_counter()
        work()
        host = (time.perf_counter() - start) * 1e3
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), host


def _once(
    clock: Clock, contender: Contender, tensors: tuple[torch.Tensor, ...], calls: int, log: Log | None = None
) -> dict[str, float]:
    """Forwards that follow each other, then their backwards; per call. ``log``: of waits, which count apart, too."""
    q, k, v, dout = tensors
    outs: list[torch.Tensor] = []

    def forward() -> None:
        for _ in range(calls):
            outs.append(contender.attend(q, k, v))

    def backward() -> None:
        for out in outs:
            torch.autograd.grad(out, (q, k, v), dout)

    with contender.scope():
        there, host = clock(forward)
        first = len(log or ())
        back, host_back = clock(backward)
    found = {
        "forward": there / calls, "backward": back / calls,
        "host forward": host / calls, "host backward": host_back / calls,
    }  # fmt: skip
    if log is not None:
        waited = sum(x() for x in log[:first]), sum(x() for x in log[first:])
        found |= {"waited forward": waited[0] / calls, "waited backward": waited[1] / calls}
    return found


def _agreed(value: float, device: torch.device) -> float:
    """The largest of all ranks: what follows from it must be the same everywhere."""
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checked(data: Data, found: dict[str, Contender], absent: dict[str, str]) -> tuple[dict[str, Any], list[Any]]:
    """Fill in the peers, and compare everybody with our zigzag: relative differences of out, dq, dk, dv."""
    reference = results(found[REFERENCE], data)
    checks: dict[str, Any] = {}
    tries = {name: [lambda one=one: one] for name, one in found.items() if name != REFERENCE}
    tries |= peers(data.problem, data.ranks, data.device)  # type: ignore[arg-type]
    for name, ways in tries.items():
        reasons = []
        for way in ways:
            contender, worst, why = None, float("nan"), ""
            try:
                contender = way()
                differences = errors(contender, data, reference)
                worst = max(differences) if all(x == x for x in differences) else float("nan")
                why = "" if worst <= LIMIT else f"differs by {differences}"
            except torch.OutOfMemoryError as error:
                why = f"out of memory ({str(error).splitlines()[0][:100]})"
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
            _free()
            if _agreed(bool(why), data.device):
                reasons.append(why or "failed on another rank")
                continue
            assert contender is not None
            found[name], checks[name] = contender, differences
            break
        else:
            found.pop(name, None)
            absent[name] = "; ".join(dict.fromkeys(reasons))
            if name in OURS:
                raise AssertionError(f"{name} of this package: {absent[name]}")
    return checks, reference


def run(rank: int, ranks: int, problem: Problem, options: Options) -> dict[str, Any]:
    """This rank's milliseconds, ``times[name][direction]``, one value per round."""
    os.environ.update(many.NO_MULTICAST)
    device = many.device(options.dry)
    data, clock = Data(problem, rank, ranks, device), Clock(device)
    found, absent = ours(problem, ranks, device)
    checks, reference = _checked(data, found, absent)

    seqlen, chunk = problem.tokens * ranks, problem.tokens // 2
    single_tokens = min(seqlen, max(options.longest_single // chunk, 1) * chunk)
    alone = seqpar_attn.LoopbackGroup(1)
    single = Contender("", lambda q, k, v: seqpar_attn.ring_attention(q, k, v, group=alone, backend=problem.backend))
    whole = problem.make(torch.arange(single_tokens), device)
    if single_tokens == seqlen:
        out = single.attend(*whole[:3])
        own = data.positions("zigzag").to(device)
        pairs = zip((out.detach(), *torch.autograd.grad(out, whole[:3], whole[3])), reference)
        checks[SINGLE] = [((a[:, own].float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
        if _agreed(not max(checks[SINGLE]) <= LIMIT, device):
            raise AssertionError(f"our zigzag differs from one GPU by {checks[SINGLE]} on rank {rank}")
        del out, pairs, own
    del reference
    _free()

    turns: dict[str, tuple[Contender, tuple[torch.Tensor, ...], Callable[[], Any]]] = {
        SINGLE: (single, whole, contextlib.nullcontext)
    }
    for name, contender in found.items():
        turns[name] = (contender, data.of(contender), contextlib.nullcontext)
    for name in MEASURED_APART if problem.tokens <= LONGEST_APART else ():
        for what, patch in (("computation alone", still), ("transfers alone", idle), (WATCHED, watched)):
            turns[f"{name}, {what}"] = (found[name], data.of(found[name]), patch)

    def turn(name: str, calls: int) -> dict[str, float]:
        contender, tensors, patch = turns[name]
        with patch() as log:
            return _once(clock, contender, tensors, calls, log)

    calls: dict[str, int] = {}
    total = 0.0
    for name in turns:
        ms = _agreed(sum(turn(name, 1).values()), device)
        if ms < 1e3:  # else what was compiled and allocated does not count
            once = turn(name, 1)
            ms = _agreed(once["forward"] + once["backward"], device)
        calls[name] = 1 if options.dry else int(min(8, max(1, BATCH_MS // max(ms, 1e-3))))
        total += ms * calls[name] + 12.0  # and the two head starts
    rounds = int(min(options.rounds, max(3, 1e3 * options.seconds // total)))
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in turns}
    order = list(turns)
    shuffle = random.Random(0).shuffle  # the same on every rank
    for _ in range(rounds):
        shuffle(order)  # nobody always follows the one GPU's long call, which leaves the GPUs hot and their clocks low
        for name in order:
            for direction, ms in turn(name, calls[name]).items():
                times[name][direction].append(ms)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    notes = {name: contender.note for name, contender in found.items() if contender.note}
    turns.clear()
    del whole, data
    _free()
    return {
        "times": {name: dict(x) for name, x in times.items()},
        "checks": checks, "absent": absent, "notes": notes, "single_tokens": single_tokens,
        "calls": calls, "peak_bytes": peak,
    }  # fmt: skip
