"""Compiles csrc with warnings as errors and holds what ptxas says of every kernel against limits.json.

    python csrc/check_build.py [--arch 80 --arch 90a] [--root CHECKOUT]

Per kernel: registers; bytes spilled (stores and loads); bytes of stack; how often ptxas noted that it serialised wgmma,
and that it injected a warpgroup.arrive or wait (C7510 to C7520, which are "info" and no warnings, so -Werror does not
catch them). Of the whole build: processor time (3 minutes on 2 cores), memory, and the library's size. A kernel may
exceed a folder's limits only by an entry in "exceptions": {"folder": "sm90", "kernel": REGEX, "reason": WHY,
"registers": 200}; one that no kernel needs is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRICS = ("registers", "spills", "stack", "serialised", "injected")
BUILD_METRICS = ("cpu_seconds", "memory_gib", "library_mib")
SKIPPED = 77


def _building() -> Any:
    """The package's own build by its path: importing the package would need torch."""
    path = Path(__file__).resolve().parent.parent / "seqpar_attn" / "kernels" / "cuda" / "building.py"
    spec = importlib.util.spec_from_file_location("building", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernel(NamedTuple):
    """What ptxas says of a function compiled for one architecture."""

    mangled: str
    arch: str
    found: dict[str, int]
    """By METRICS."""
    notes: tuple[str, ...]


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_CUMULATIVE = re.compile(r"(\d+) bytes cumulative stack size")
_NOTE = re.compile(r"\((C75(?:1\d|20))\)\s*(.*)")
_NAMED = re.compile(r"function '(\S+?)'")


def parse(output: str) -> list[Kernel]:
    """The kernels in nvcc's output under ``-Xptxas -v``. ValueError: a part of one is missing, or a note fits none."""
    entries: list[dict[str, Any]] = []
    notes: list[tuple[str, str]] = []
    for line in output.splitlines():
        if entry := _ENTRY.search(line):
            entries.append({"mangled": entry[1], "arch": entry[2], "found": dict.fromkeys(METRICS, 0), "seen": set()})
        elif note := _NOTE.search(line):
            named = _NAMED.search(line)
            text = re.sub(r"\s*in (the )?function '\S+?'", "", note[2])
            notes.append((named[1] if named else "", f"{note[1]} {text}"))
        elif entries and (stack := _STACK.search(line)):
            # That of the kernel, or of a function it calls that was not inlined: the kernel answers for both.
            found = entries[-1]["found"]
            found["stack"] += int(stack[1])
            found["spills"] += int(stack[2]) + int(stack[3])
            entries[-1]["seen"].add("stack")
        elif entries and (registers := _REGISTERS.search(line)):
            found = entries[-1]["found"]
            found["registers"] = int(registers[1])
            if cumulative := _CUMULATIVE.search(line):
                found["stack"] = max(found["stack"], int(cumulative[1]))
            entries[-1]["seen"].add("registers")
    kernels = []
    for one in entries:
        if missing := {"stack", "registers"} - one["seen"]:
            raise ValueError(f"expected {', '.join(sorted(missing))} of {one['mangled']}, found none in ptxas' output")
        own = tuple(text for name, text in notes if name == one["mangled"] and one["arch"] == "90a")
        injected = sum("injected" in text for text in own)
        # A note of a kind that is not known counts as the worse.
        found = {**one["found"], "serialised": len(own) - injected, "injected": injected}
        kernels.append(Kernel(one["mangled"], one["arch"], found, own))
    known = {kernel.mangled for kernel in kernels if kernel.arch == "90a"}
    if strays := [text for name, text in notes if name not in known]:
        raise ValueError(f"expected every note to name a kernel, got {strays[0]!r}")
    return kernels


def short_name(demangled: str) -> str:
    """Without namespaces, return type and arguments: ``forward_kernel<Config<128>>``."""
    text = re.sub(r"\(anonymous namespace\)::|\b[A-Za-z_]\w*::|^void ", "", demangled)
    depth = 0
    for index, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return text[:index]
    return text


def demangle(names: Sequence[str]) -> list[str]:
    """By c++filt of the host's binutils, without which nothing could be linked."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short_name(line) for line in done.stdout.splitlines()]


class Finding(NamedTuple):
    kernel: str
    metric: str
    found: float
    limit: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kernel}: {self.metric} {self.found:g}, limit {self.limit:g}" + (self.note and f" ({self.note})")


def check_limits(limits: dict[str, Any]) -> None:
    """ValueError: limits.json is not as the beginning of this file says."""
    for folder, values in limits["folders"].items():
        if set(values) != set(METRICS):
            raise ValueError(f"expected limits {', '.join(METRICS)} of {folder}, got {', '.join(values)}")
    for entry in limits["exceptions"]:
        values = set(entry) - {"folder", "kernel", "reason"}
        if not {"folder", "kernel", "reason"} < set(entry) or values - set(METRICS) or not entry["reason"].strip():
            raise ValueError(f"expected an exception with folder, kernel, reason and a limit, got {entry}")
    if set(limits["build"]) != set(BUILD_METRICS):
        raise ValueError(f"expected limits {', '.join(BUILD_METRICS)} of the build, got {', '.join(limits['build'])}")


def judge(kernels: Sequence[tuple[str, str, Kernel]], limits: dict[str, Any]) -> list[Finding]:
    """What (folder, name, kernel) exceed; and the exceptions that nothing needs."""
    findings = []
    needed = [False] * len(limits["exceptions"])
    for folder, name, kernel in kernels:
        for metric in METRICS:
            default = limit = limits["folders"][folder][metric]
            found = kernel.found[metric]
            for index, entry in enumerate(limits["exceptions"]):
                if entry["folder"] == folder and metric in entry and re.search(entry["kernel"], name):
                    limit = max(limit, entry[metric])
                    needed[index] |= found > default
            if found > limit:
                notes = [text for text in kernel.notes if ("injected" in text) == (metric == "injected")]
                note = notes[0] if notes and metric in ("serialised", "injected") else ""
                findings.append(Finding(f"{name} for {kernel.arch}", metric, found, limit, note))
    for entry, used in zip(limits["exceptions"], needed):
        if not used:
            findings.append(Finding(f"exception {entry['kernel']!r}", "kernels that need it", 0, 1))
    return findings


def _peak(jobs: Sequence[tuple[float, float, float]]) -> float:
    """The most memory at once of (begin, end, GiB): every job has its peak, that of its largest process, throughout."""
    return max(sum(gib for begin, end, gib in jobs if begin <= at < end) for at, _, _ in jobs)


def _table(kernels: Sequence[tuple[str, str, Kernel]], limits: dict[str, Any]) -> str:
    def excess(row: tuple[str, str, Kernel]) -> tuple[float, ...]:
        folder, _, kernel = row
        over = [kernel.found[m] - limits["folders"][folder][m] for m in ("serialised", "spills", "stack")]
        return (*over, kernel.found["registers"] / limits["folders"][folder]["registers"])

    rows: list[tuple[str, ...]] = [("kernel", "arch", *METRICS)]
    for _, name, kernel in sorted(kernels, key=excess, reverse=True):
        rows.append((name, kernel.arch, *(str(kernel.found[metric]) for metric in METRICS)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def check(root: Path, archs: Sequence[str], limits: dict[str, Any]) -> list[Finding]:
    """Compiles everything below ``root``, prints the table, and returns what exceeds the limits."""
    building = _building()
    nvcc, jobs = building.usable_nvcc(), building.job_count()
    units = building.units(root, archs)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        configuration = building.write_configuration(Path(folder) / "configuration.h", archs)
        extra = (*building.WERROR, "-Xptxas=-v")
        objects = [Path(folder) / f"{index}.o" for index in range(len(units))]
        commands = [
            (
                [*building.compile_command(nvcc, root, unit, configuration, extra), "-o", str(target)],
                f"compiling {unit.source.relative_to(root)}",
            )
            for unit, target in zip(units, objects)
        ]
        compiled = building.run_all(commands, jobs)
        library = Path(folder) / building.LIBRARY
        linked = building.run(building.link_command(nvcc, objects, library), "linking")
        size = library.stat().st_size
    seconds = time.perf_counter() - started

    parsed = [(unit.folder, kernel) for unit, done in zip(units, compiled) for kernel in parse(done.output)]
    if not parsed:
        raise ValueError("expected ptxas to report kernels, found none in its output")
    names = demangle([kernel.mangled for _, kernel in parsed])
    kernels = [(folder, name, kernel) for (folder, kernel), name in zip(parsed, names)]
    print(_table(kernels, limits))
    build = {
        "cpu_seconds": sum(done.cpu_seconds for done in [*compiled, linked]),
        "memory_gib": _peak([(done.started, done.started + done.seconds, done.peak_gib) for done in compiled]),
        "library_mib": size / 2**20,
    }
    print(
        f"{len(units)} files, {len(kernels)} kernels for {', '.join(archs)}: {seconds:.1f} s, {jobs} at a time, "
        f"{build['cpu_seconds']:.1f} s of processor time, about {build['memory_gib']:.2f} GiB of memory, "
        f"library {build['library_mib']:.2f} MiB"
    )
    over = [Finding("the build", metric, build[metric], limits["build"][metric]) for metric in BUILD_METRICS]
    return [*judge(kernels, limits), *(finding for finding in over if finding.found > finding.limit)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="80 or 90a, may be repeated; default: both")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    parser.add_argument("--limits", type=Path, default=Path(__file__).resolve().parent / "limits.json")
    arguments = parser.parse_args(argv)
    building = _building()
    if (reason := building.nvcc_missing()) is not None:
        print(f"csrc is not checked: {reason}")
        return SKIPPED
    limits = json.loads(arguments.limits.read_text())
    check_limits(limits)
    try:
        findings = check(arguments.root.resolve(), arguments.arch or building.ARCHITECTURES, limits)
    except RuntimeError as error:  # building.BuildError, of a module that is loaded by its path
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    for finding in findings:
        print(f"FAILED {finding}", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
