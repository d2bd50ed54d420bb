"""All benchmarks on one GPU, part by part: tables here, JSON lines and pictures in --out.

    python3 benchmarks/run.py --list
    python3 benchmarks/run.py --quick --out out/bench          # all parts at reduced sizes, under 8 minutes on an H100
    python3 benchmarks/run.py --out out/bench                  # all parts in full; run it again for the rest

Every part is a process of its own script, with a limit of time. A part that --out has from the same commit, with the
same arguments and of today's schema is left out, unless --again; with uncommitted changes nothing is left out. OUT/PART
has the part's files and log, OUT/rows.jsonl every row of all parts with how it is known (measured, simulated, computed,
predicted or published), OUT/PART.png a picture, OUT/report.md the tables. Exit status: 1 if a part failed, 3 if one had
no time, else 0. Benchmarks on several GPUs: multi_gpu.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import describe, machine, markdown  # first: finds the checkout

# isort: split
import torch
from files import SCHEMAS, read
from rows import KINDS, Row, lines, missing, rows_of, table

HERE = Path(__file__).resolve().parent
MODES = ("quick", "full", "dry")
SCHEMA = 1
"""Of run.json."""


@dataclass(frozen=True)
class Part:
    """``arguments`` by mode: those of each process, None where the part cannot run; ``seconds``: guesses for one H100,
    quick and full."""

    name: str
    script: str
    what: str
    kinds: str
    seconds: tuple[int, int]
    arguments: dict[str, tuple[str, ...] | None]
    gpu: bool = True

    def commands(self, mode: str, out: Path) -> list[list[str]] | None:
        found = self.arguments[mode]
        if found is None:
            return None
        target = out / self.name / "calibrate.json" if self.script == "calibrate" else out / self.name
        start = [sys.executable, str(HERE / f"{self.script}.py"), "--out", str(target)]
        return [[*start, *line.split()] for line in found]


def _memory(*more: str) -> tuple[str, ...]:
    return tuple(f"--no-time --contexts {line}" for line in more)


PARTS = (
    Part(
        "attention", "attention", "one block: our kernels beside FA4, cuDNN, FlexAttention, FA2", "measured",
        (110, 300),
        {"quick": ("--quick",), "full": ("",), "dry": ("--dry-run",)},
    ),
    Part(
        "ring", "ring", "one rank of W: zigzag and DistFlashAttn against one GPU's time / W", "measured, simulated",
        (25, 240), {"quick": ("--quick",), "full": ("",), "dry": None},
    ),
    Part(
        "loss", "loss", "cross-entropy beside torch, Liger, cut-cross-entropy: time, memory, error", "measured",
        (40, 120), {"quick": ("--quick",), "full": ("",), "dry": ("--dry-run",)},
    ),
    Part(
        "one_rank", "throughput", "EasyContext's table: one rank of 8 measured, other GPUs predicted",
        "computed, predicted, published", (70, 400),
        {
            "quick": ("--one-rank --rows 64K 128K --deadline 150",),
            "full": ("--one-rank",),
            "dry": ("--one-rank --dry-run --rows 64K",),
        },
    ),
    Part(
        "memory", "memory", "peak memory of a training step of one rank of 8", "measured", (30, 240),
        {
            "quick": _memory("128k"),
            "full": _memory("512k 700k", "700k 1m --attention offload", "1m --model llama-3-8b"),
            "dry": _memory("4096 --model tiny --gpus 4 --tile-mlp 256"),
        },
    ),
    Part(
        "calibrate", "calibrate", "the rates of this GPU that plans are made from", "measured", (30, 70),
        {"quick": ("--quick",), "full": ("",), "dry": ("--dry-run --headdims 16",)},
    ),
    Part(
        "grouped", "grouped", "packed documents and grouped heads against the same work without", "measured", (20, 40),
        {"quick": ("--quick",), "full": ("",), "dry": None},
    ),
    Part(
        "scale", "scale", "MFU of 8 to 1024 GPUs on paper", "predicted", (10, 60),
        {"quick": ("--quick",), "full": ("", "--model llama-2-7b --contexts 1m 4m 16m"), "dry": ("--quick",)}, False,
    ),
    Part(
        "soak", "soak", "random calls on 4 virtual ranks: memory and errors stay flat", "measured", (50, 900),
        {
            "quick": ("--loopback 4 --quick",),
            "full": ("--loopback 4",),
            "dry": ("--cpu --loopback 2 --calls 24 --every 3 --tokens 64",),
        },
    ),
)  # fmt: skip


def listing() -> str:
    header = ["part", "what", "rows are", "quick, s", "full, s", "needs"]
    cells = [
        [x.name, x.what, x.kinds, *(f"about {s}" for s in x.seconds), "a GPU" if x.gpu else "nothing"] for x in PARTS
    ]
    kinds = [f"{name}: {what}" for name, what in KINDS.items()]
    return "\n".join([markdown(header, cells), "", *kinds])


def results(part: Part, out: Path) -> list[Path]:
    return sorted((out / part.name).glob("*.json"))


def finished(part: Part, out: Path, state: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an earlier run of ``wanted`` left results that can be read today."""
    if state.get(part.name, {}) != wanted | {"status": 0, "seconds": state.get(part.name, {}).get("seconds")}:
        return False
    try:
        found = [read(path, part.name) for path in results(part, out)]
    except ValueError:
        return False
    return bool(found)


def play(command: list[str], log: Path, limit: float) -> int:
    """Exit status of one process; 124 if it was ended because of the limit, with all that it had started."""
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return 124
        except BaseException:  # interrupted: leave nothing behind
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def rows_in(part: Part, out: Path) -> tuple[list[Row], list[str], list[str]]:
    """A part's rows, the same as JSON lines, and what there is none of: peers that are not installed, and files that
    could not be read."""
    found: list[Row] = []
    as_lines: list[str] = []
    absent: list[str] = []
    for path in results(part, out):
        try:
            payload = read(path, part.name)
            found += rows_of(payload)
            absent += missing(payload)
            as_lines += lines(path, part.name)
        except ValueError as error:
            absent.append(str(error))
    return found, as_lines, absent


def draw(part: Part, rows: list[Row], out: Path) -> str | None:
    """Why there is no picture, or None."""
    try:
        import drawing
    except ImportError as error:
        return f"no picture: {error}"
    drawn = drawing.bars(rows, out / f"{part.name}.png", part.what, results(part, out))
    return None if drawn else "no picture: no two rows of one quantity"


def report(out: Path, head: str, said: dict[str, str]) -> None:
    """rows.jsonl and report.md, from what all parts have left until now."""
    everything: list[str] = []
    text = [head, "", *(f"{name}: {what}" for name, what in KINDS.items())]
    for part in PARTS:
        rows, as_lines, absent = rows_in(part, out)
        everything += as_lines
        if rows or part.name in said:
            text += ["", f"## {part.name}: {part.what}", "", said.get(part.name, "of an earlier run"), *absent, ""]
        if rows:
            text += ["```", table(rows), "```"]
    (out / "rows.jsonl").write_text("".join(f"{line}\n" for line in everything))
    (out / "report.md").write_text("\n".join(text) + "\n")


def known_state(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"expected {path} to have schema {SCHEMA}, got {found.get('schema')!r}: choose another --out")
    state: dict[str, Any] = found["parts"]
    return state


def prepare() -> str:
    from seqpar_attn import kernels

    kernel = kernels.get("cuda")
    try:
        kernel.prepare()
    except Exception as error:  # the other backends are measured all the same
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return kernel.unavailable() or "ready"


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="default: out/bench")
    parser.add_argument("--list", action="store_true", help="the parts")
    parser.add_argument("--quick", action="store_true", help="reduced sizes")
    parser.add_argument("--parts", nargs="+", choices=[x.name for x in PARTS], help="default: all")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--total", type=float, help="seconds for all; default: 470 with --quick, else no limit")
    parser.add_argument("--prepare", action="store_true", help="compile the CUDA library before; not counted")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU: does everything run?")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.dry_run:
        parser.error("expected --quick or --dry-run, got both")
    return arguments


def main(argv: list[str] | None = None) -> int:
    a = arguments_of(argv)
    if a.list:
        print(listing())
        return 0
    if a.commit:
        os.environ["SEQPAR_ATTN_COMMIT"] = a.commit  # for every process
    mode = "dry" if a.dry_run else "quick" if a.quick else "full"
    if a.prepare:
        print(f"csrc: {prepare()}", flush=True)
    header = machine()
    head = f"{'REHEARSAL: these figures mean nothing. ' if a.dry_run else ''}{describe(header)}"
    print(head, flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    try:
        state = known_state(a.out / "run.json")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + (a.total if a.total is not None else 470.0 if mode == "quick" else float("inf"))
    limit = 2.0 if mode == "quick" else 3.0
    """Times what a part should take; then it is ended, so that one does not cost the others."""
    certain = header["commit"] != "unknown" and not header["dirty"]
    said: dict[str, str] = {}
    failed = late = False
    for part in PARTS:
        if a.parts and part.name not in a.parts:
            continue
        commands = part.commands(mode, a.out)
        guess = 60 if mode == "dry" else part.seconds[mode == "full"]
        spare = deadline - time.monotonic()
        wanted = {"commit": header["commit"], "mode": mode, "schema": SCHEMAS[part.name].version}
        wanted["commands"] = [command[2:] for command in commands or []]
        if commands is None or (part.gpu and mode != "dry" and not torch.cuda.is_available()):
            said[part.name] = "not run: needs an NVIDIA GPU"
        elif certain and not a.again and finished(part, a.out, state, wanted):
            said[part.name] = f"there already, of commit {header['commit'][:12]}"
        elif spare < 0.7 * guess:
            said[part.name], late = f"not started: {spare:.0f} s are left, it takes about {guess} s; run again", True
        else:
            print(f"== {part.name}: about {guess} s", flush=True)
            folder = a.out / part.name
            folder.mkdir(exist_ok=True)
            before = {key: value for key, value in state.get(part.name, {}).items() if key in wanted}
            if before != wanted or not certain or a.again:  # else the part may go on where it was stopped
                for path in (*results(part, a.out), *folder.glob("*.md"), folder / "log.txt"):
                    path.unlink(missing_ok=True)
            begin, status = time.monotonic(), 0
            for command in commands:
                left = min(deadline, begin + limit * guess) - time.monotonic()
                status = status or play(command, folder / "log.txt", max(1.0, left))
            seconds = time.monotonic() - begin
            state[part.name] = wanted | {"status": status, "seconds": seconds}
            (a.out / "run.json").write_text(json.dumps({"schema": SCHEMA, "parts": state}, indent=1) + "\n")
            said[part.name] = f"{seconds:.0f} s"
            if status in (3, 124):
                late, said[part.name] = True, f"stopped after {seconds:.0f} s; rows are those it had"
            elif status:
                failed, said[part.name] = True, f"FAILED with status {status} after {seconds:.0f} s"
                print("\n".join((folder / "log.txt").read_text().splitlines()[-15:]), file=sys.stderr, flush=True)
            rows, _, absent = rows_in(part, a.out)
            if rows:
                print("\n".join([table(rows), *absent]))
                note = draw(part, rows, a.out)
                said[part.name] += f"; {note}" if note else ""
        print(f"== {part.name}: {said[part.name]}", flush=True)
        report(a.out, head, said)
    print(f"tables: {a.out / 'report.md'}; rows: {a.out / 'rows.jsonl'}", flush=True)
    return 1 if failed else 3 if late else 0


if __name__ == "__main__":
    sys.exit(main())
