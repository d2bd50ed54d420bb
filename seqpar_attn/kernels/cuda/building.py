"""Compiles csrc into libseqpar_attn.so: which nvcc, which architectures, how many jobs, and the compilation itself.

Only the standard library, and no relative imports: setup.py and csrc/check_build.py load this file by its path, where
torch, and hence the package, cannot be imported.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libseqpar_attn.so"
ARCHITECTURES = ("80", "90a")
"""All that csrc has kernels for."""
OLDEST_CUDA = (12, 4)
GIB = 2**30
_GIB_PER_JOB = 1.5
"""A file with Hopper kernels takes about that much memory to compile."""


class BuildError(RuntimeError):
    """The library cannot be compiled; says why."""


# The compiler


def find_nvcc() -> str | None:
    """nvcc's path. CUDA_HOME or CUDA_PATH, where set, is the only place looked in: what was asked for, or nothing."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    if not homes and (found := shutil.which("nvcc")):
        return found
    candidates = (os.path.join(home, "bin", "nvcc") for home in homes or ["/usr/local/cuda"])
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """Such as (13, 0)."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if done.returncode or not found:
        raise BuildError(f"expected {nvcc} --version to name a release, got {(done.stdout + done.stderr).strip()!r}")
    return int(found[1]), int(found[2])


def nvcc_missing() -> str | None:
    """Why there is no nvcc that can compile the library, or None."""
    nvcc = find_nvcc()
    oldest = "{}.{}".format(*OLDEST_CUDA)
    if nvcc is None:
        named = [f"{name}={os.environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        where = " or ".join(named) or "PATH or /usr/local/cuda"
        return f"expected nvcc of CUDA {oldest} or later, found none in {where}"
    version = nvcc_version(nvcc)
    if version < OLDEST_CUDA:
        return f"expected nvcc of CUDA {oldest} or later, got {version[0]}.{version[1]} ({nvcc})"
    return None


def usable_nvcc() -> str:
    """nvcc's path; BuildError if it is missing or too old."""
    reason = nvcc_missing()
    if reason is not None:
        raise BuildError(reason)
    nvcc = find_nvcc()
    assert nvcc is not None
    return nvcc


# Architectures


def arch_of(major: int, minor: int) -> str | None:
    """The one of ARCHITECTURES that a GPU of this compute capability runs, or None."""
    if (major, minor) == (9, 0):
        return "90a"
    return "80" if major == 8 else None  # code for sm_80 runs on every 8.x


def parse_arch_list(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The value of TORCH_CUDA_ARCH_LIST -> (ours, refused ones).

    ``"8.0;9.0a"``, ``"8.6 9.0+PTX"``. PTX is not added: the library chooses kernels by the exact architecture, so code
    that a later GPU translates would never be reached. Lists that name other architectures as well are usual.
    """
    ours, refused = [], []
    for item in filter(None, re.split(r"[;,\s]+", text)):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not found:
            raise ValueError(f"expected TORCH_CUDA_ARCH_LIST to hold numbers such as 8.0;9.0a, got {item!r}")
        major, minor, variant = int(found[1]), int(found[2]), found[3]
        arch = arch_of(major, minor)
        if arch is None or (variant and variant != arch[-1]):
            refused.append(item)
        elif arch not in ours:
            ours.append(arch)
    return tuple(sorted(ours)), tuple(refused)


def machine_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of this machine's GPUs, each once; [] where there are none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = set(re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE)) if done.returncode == 0 else set()
    return sorted((int(major), int(minor)) for major, minor in found)


def default_architectures() -> tuple[tuple[str, ...], str]:
    """What to compile for, and in words why: TORCH_CUDA_ARCH_LIST's, else this machine's GPUs', else all."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed:
        ours, refused = parse_arch_list(listed)
        skipped = f" (no kernels for {' '.join(refused)})" if refused else ""
        return ours, f"from TORCH_CUDA_ARCH_LIST={listed}{skipped}"
    capabilities = machine_capabilities()
    if not capabilities:
        return ARCHITECTURES, "all, as there is no GPU here"
    names = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    return tuple(sorted({arch for c in capabilities if (arch := arch_of(*c))})), f"for this machine's GPUs ({names})"


def check_architectures(archs: Sequence[str]) -> None:
    if not archs or any(arch not in ARCHITECTURES for arch in archs):
        raise ValueError(f"expected architectures among {', '.join(ARCHITECTURES)}, got {', '.join(archs) or 'none'}")


# Jobs


def _free_memory() -> float:
    """GiB that can still be used, by /proc and by the control group's limit."""
    free = float("inf")
    meminfo, limit, used = (
        Path(p) for p in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(found[1]) / 2**20
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, (int(most) - int(used.read_text())) / GIB)
    return free


def job_count() -> int:
    """Compilations at once: MAX_JOBS, else one per core, as memory allows."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"expected MAX_JOBS to be a positive integer, got {given!r}")
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(cores, _free_memory() / _GIB_PER_JOB)))


# Sources


def source_root() -> Path | None:
    """The folder with CMakeLists.txt and csrc: inside an installed package, or the checkout; None if missing."""
    package = Path(__file__).resolve().parents[2]
    return next(
        (root for root in (package / "source", package.parent) if (root / "csrc" / "library.cu").exists()), None
    )


def build_inputs(root: Path) -> list[Path]:
    """All files that the library depends on, relative to ``root``, sorted."""
    files = [p for p in (root / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    relative = (p.relative_to(root) for p in files)
    return [Path("CMakeLists.txt"), *sorted(p for p in relative if p.parts[1] != "tests")]


class Unit(NamedTuple):
    """A file to compile and what for."""

    source: Path
    folder: str
    """common or sm90, as CMake's object libraries."""
    archs: tuple[str, ...]


def units(root: Path, archs: Sequence[str]) -> list[Unit]:
    """The same files as in CMakeLists.txt."""
    check_architectures(archs)
    csrc = root / "csrc"
    common = sorted([*csrc.glob("*.cu"), *csrc.glob("small/*.cu")])
    found = [Unit(source, "common", tuple(archs)) for source in common]
    if "90a" in archs:
        found += [Unit(source, "sm90", ("90a",)) for source in sorted(csrc.rglob("sm90/**/*.cu"))]
    return found


# Compilation

_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden")
WERROR = ("-Werror=all-warnings", "-Xptxas=-Werror", "-Xcompiler=-Wall,-Werror")


def write_configuration(target: Path, archs: Sequence[str]) -> Path:
    """The header in which library.cu reads what it was built for, as CMake writes it."""
    target.write_text(
        f'#define SEQPAR_ATTN_ARCHITECTURES "{";".join(archs)}"\n#define SEQPAR_ATTN_SM90 {int("90a" in archs)}\n'
    )
    return target


def compile_command(nvcc: str, root: Path, unit: Unit, configuration: Path, extra: Iterable[str] = ()) -> list[str]:
    """nvcc's arguments without the object's name."""
    command = [nvcc, *_FLAGS, f"-I{root / 'csrc'}", *extra]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in unit.archs]
    if unit.source.name == "library.cu":
        command += ["-include", str(configuration)]
    if host := os.environ.get("CUDAHOSTCXX"):  # CMake's name for it
        command += ["-ccbin", host]
    return [*command, "-c", str(unit.source)]


def link_command(nvcc: str, objects: Sequence[Path], target: Path) -> list[str]:
    # Without --exclude-libs the static CUDA runtime would be exported, and could be taken for torch's.
    options = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=--no-undefined"]
    if host := os.environ.get("CUDAHOSTCXX"):
        options += ["-ccbin", host]
    return [nvcc, *options, "-o", str(target), *map(str, objects)]


class Done(NamedTuple):
    """What a command cost and said."""

    output: str
    started: float
    """By time.perf_counter."""
    seconds: float
    cpu_seconds: float
    peak_gib: float
    """Of its largest process."""


def run(command: Sequence[str], what: str) -> Done:
    """Runs a command; BuildError with its output if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # for the usage of this child and its own, not of all others
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if process.returncode:
        said = "\n".join(output.strip().splitlines()[-60:])
        raise BuildError(f"{what} failed (status {process.returncode}):\n{shlex.join(command)}\n{said}")
    cpu = usage.ru_utime + usage.ru_stime
    return Done(output, started, time.perf_counter() - started, cpu, usage.ru_maxrss * 1024 / GIB)


def run_all(commands: Sequence[tuple[list[str], str]], jobs: int) -> list[Done]:
    """Runs them ``jobs`` at a time; after the first failure no more are started."""
    stop = threading.Event()

    def one(command: list[str], what: str) -> Done | None:
        if stop.is_set():
            return None
        try:
            return run(command, what)
        except BaseException:
            stop.set()  # here, before this thread takes the next one
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, *command) for command in commands]
    return [done for future in futures if (done := future.result()) is not None]  # raises the failure


def compile_directly(nvcc: str, root: Path, archs: Sequence[str], folder: Path, jobs: int) -> Path:
    """By nvcc alone, everything anew."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = write_configuration(folder / "configuration.h", archs)
    commands, objects = [], []
    for unit in units(root, archs):
        name = str(unit.source.relative_to(root))
        objects.append(folder / (name.replace(os.sep, "-") + ".o"))
        command = [*compile_command(nvcc, root, unit, configuration), "-o", str(objects[-1])]
        commands.append((command, f"compiling {name}"))
    run_all(commands, jobs)
    run(link_command(nvcc, objects, folder / LIBRARY), "linking")
    return folder / LIBRARY


def compile_with_cmake(nvcc: str, root: Path, archs: Sequence[str], folder: Path, jobs: int) -> Path:
    """By cmake and ninja: only what has changed since the last time in this folder."""
    check_architectures(archs)
    configure = ["cmake", "-S", str(root), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    run([*configure, f"-DSEQPAR_ATTN_ARCHS={';'.join(archs)}"], "configuring")
    run(["cmake", "--build", str(folder), "--target", "seqpar_attn", "--parallel", str(jobs)], "compiling")
    return folder / LIBRARY


def compile_library(root: Path, archs: Sequence[str], folder: Path) -> Path:
    """Compiles the library below ``folder`` and returns its path. BuildError: why not."""
    nvcc, jobs = usable_nvcc(), job_count()
    if shutil.which("cmake") and shutil.which("ninja"):
        return compile_with_cmake(nvcc, root, archs, folder / "cmake", jobs)
    return compile_directly(nvcc, root, archs, folder / "direct", jobs)
