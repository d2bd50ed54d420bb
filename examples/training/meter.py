"""What a run reports: a progress bar, a line of JSON per step, TensorBoard or wandb, and where a step's time goes."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PEAKS = {"H200": 989, "H100": 989, "H800": 989, "GH200": 989, "B200": 2250, "A100": 312, "A800": 312, "L40S": 362}
"""TFLOP/s of dense bfloat16 products, by the names of devices (SXM cards)."""


class Clock:
    """Where the seconds of a step go. With ``exact``, the device is waited for at every border: then parts are those of
    a step in which nothing overlaps, an upper bound of what they cost otherwise."""

    def __init__(self, device: torch.device, exact: bool) -> None:
        self._wait = torch.cuda.synchronize if exact and device.type == "cuda" else lambda: None
        self.parts: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []

    def start(self) -> None:
        self._wait()
        self._last = time.perf_counter()
        self.parts = defaultdict(float)

    def lap(self, name: str) -> None:
        """What has passed since the last border belongs to ``name``."""
        self._wait()
        now = time.perf_counter()
        self.parts[name] += now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def stop(self) -> None:
        self._steps.append(dict(self.parts))

    def summary(self) -> str:
        """Means over all steps but the first, which compiles and allocates."""
        steps = self._steps[1:] or self._steps
        if not steps:
            return "no steps"
        mean = {name: sum(x.get(name, 0.0) for x in steps) / len(steps) for name in steps[0]}
        total = sum(mean.values())
        parts = ", ".join(f"{name} {1e3 * x:.2f} ms" for name, x in mean.items())
        return (
            f"outside the model: {100 * (1 - mean.get('model', 0.0) / total):.3f}% of a step of {total:.4f} s "
            f"({parts}; mean of {len(steps)} steps)"
        )


class Meter:
    """Reports of the first rank; on others it does nothing. ValueError for a tracker that is not installed."""

    def __init__(self, folder: Path, steps: int, done: int, report_to: str, name: str | None, show: bool) -> None:
        self.tracker: Any = None
        self._show = show
        self._bar = tqdm(total=steps, initial=done, disable=not show, unit="step", mininterval=0.5)
        if not show:
            return
        self._lines = open(folder / "log.jsonl", "a")  # noqa: SIM115 (open as long as the run)
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tracker = SummaryWriter(str(folder / "tensorboard"))
        elif report_to == "wandb":
            import wandb

            self.tracker = wandb.init(project=name, dir=str(folder))

    def step(
        self, number: int, loss: float, tokens: int, seconds: float, mfu: float | None, norm: float, lr: float
    ) -> None:
        """Step ``number`` (from 1) is done."""
        if not self._show:
            return
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "tokens_per_second": tokens / seconds,
            "gigabytes": memory(),
            "gradient_norm": norm,
            "learning_rate": lr,
        } | ({} if mfu is None else {"mfu": mfu})
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, ppl {values['perplexity']:.2f}, {tokens / seconds:.0f} tokens/s, "
            f"{'' if mfu is None else f'MFU {100 * mfu:.1f}%, '}{values['gigabytes']:.1f} GB",
            refresh=False,
        )
        self._bar.update()
        self._lines.write(json.dumps({"step": number, **values}) + "\n")
        if hasattr(self.tracker, "add_scalar"):
            for name, value in values.items():
                self.tracker.add_scalar(name, value, number)
        elif self.tracker is not None:
            self.tracker.log(values, step=number)

    def close(self) -> None:
        self._bar.close()
        if self._show:
            self._lines.close()
        if self.tracker is not None:
            getattr(self.tracker, "close", getattr(self.tracker, "finish", None))()


def check_tracker(report_to: str) -> None:
    """ValueError unless it is installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"expected {report_to} to be installed for --report-to, got no such package")


def memory() -> float:
    """Most GB that this process has held: on its GPU, or of host memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_flops(device: torch.device, given: float | None) -> float | None:
    """FLOP/s of one device for MFU; None without ``given`` (TFLOP/s) on a device that is not known."""
    if given is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        given = next((peak for key, peak in PEAKS.items() if key in name), None)
    return None if given is None else given * 1e12
