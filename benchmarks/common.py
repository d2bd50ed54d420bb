"""What the benchmarks share: who measured, interleaved timing, tables."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a checkout that is not installed measures itself
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def clocks() -> dict[str, str] | None:
    """Clocks, power and temperature as nvidia-smi finds them; nothing is ever set."""
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    line = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return dict(zip(names, (x.strip() for x in line.splitlines()[0].split(",")))) if line else None


def machine(commit: str | None = None) -> dict[str, Any]:
    """The header of every result: a number without it cannot be compared with anything."""
    told = commit or os.environ.get("SEQPAR_ATTN_COMMIT")  # where the checkout's git does not know
    commit = told or _output("git", "rev-parse", "HEAD")
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "dirty": not told and bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none").split()[0],
        "clocks": clocks() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        **{name: _version(name) for name in ("triton", "flash-attn-4", "flash-attn")},
    }


@dataclass
class Contender:
    """One thing to be timed: ``call(i)`` works on input set i; ``scope`` is entered around a whole batch of calls."""

    call: Callable[[int], Any]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Timing:
    milliseconds: list[float] = field(default_factory=list)
    """Per call, one value per round."""

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def faster_than(self, other: Timing) -> float:
        """By which factor: the median over rounds of the ratio within a round, which slow changes of the clock leave
        alone."""
        return statistics.median(b / a for a, b in zip(self.milliseconds, other.milliseconds))

    def as_dict(self, flops: float | None = None) -> dict[str, Any]:
        ms = {"median": self.median, "min": min(self.milliseconds), "max": max(self.milliseconds)}
        result: dict[str, Any] = {"ms": ms, "rounds": len(self.milliseconds)}
        if flops is not None:
            result["tflops"] = {"median": flops / ms["median"] / 1e9}
            result["tflops"] |= {"min": flops / ms["max"] / 1e9, "max": flops / ms["min"] / 1e9}
        return result


def _measure(call: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Milliseconds per call of ``calls`` calls back to back, so the host runs ahead of the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        return (time.perf_counter() - start) * 1e3 / calls
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for i in range(calls):
        call(i)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / calls


def interleaved(
    contenders: dict[str, Contender], device: torch.device, *, rounds: int = 21, round_ms: float = 10.0
) -> dict[str, Timing]:
    """Time all contenders in turns, so that heat, clocks and neighbours hit them alike.

    Every round starts with the next contender; each batch of calls takes about ``round_ms``. The first call of each
    (compilation, allocation) and the estimate of its speed are not counted.
    """
    calls: dict[str, int] = {}
    for name, contender in contenders.items():
        with contender.scope():
            _measure(contender.call, 2, device)
            calls[name] = max(1, int(round_ms / max(_measure(contender.call, 3, device), 1e-3)))
    timings = {name: Timing() for name in contenders}
    order = list(contenders)
    for n in range(rounds):
        start = n % len(order)
        for name in order[start:] + order[:start]:
            with contenders[name].scope():
                timings[name].milliseconds.append(_measure(contenders[name].call, calls[name], device))
    return timings


def peak_memory(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that ``step`` takes above what is there before; None where nothing counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark on one GPU has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="folder for the JSON and the table")
    found.add_argument("--quick", action="store_true", help="fewer and smaller cases, fewer rounds")
    found.add_argument("--commit", help="what is measured, where git cannot tell")
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def describe(header: dict[str, Any]) -> str:
    """The header as one line for people."""
    found = header.get("clocks") or {}
    sm = f", SM {found['clocks.sm']} of {found['clocks.max.sm']}" if found else ""
    dirty = " + changes" if header["dirty"] else ""
    return (
        f"{header['gpu'] or 'no GPU'} (driver {header['driver']}{sm}), torch {header['torch']}, "
        f"triton {header['triton']}, cuDNN {header['cudnn']}, commit {header['commit'][:12]}{dirty}, {header['date']}"
    )
