"""How csrc is compiled: which nvcc, which architectures, how many jobs, which files, and by cmake as by nvcc alone."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_cases import ROOT, checkout

from seqpar_attn.kernels.cuda import building

needs_cmake = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja")


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def nvcc_of(path: Path, release: str) -> str:
    return script(path, f"echo 'Cuda compilation tools, release {release}, V{release}.1'")


@pytest.fixture
def bare(monkeypatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def test_nvcc_is_where_its_environment_says_and_nowhere_else(bare, monkeypatch, tmp_path) -> None:
    on_path = nvcc_of(tmp_path / "path" / "nvcc", "12.4")
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert building.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "second"))
    second = nvcc_of(tmp_path / "second" / "bin" / "nvcc", "12.9")
    assert building.find_nvcc() == second
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "first"))
    assert building.find_nvcc() == second  # CUDA_HOME has none
    first = nvcc_of(tmp_path / "first" / "bin" / "nvcc", "13.0")
    assert building.find_nvcc() == first and building.nvcc_missing() is None
    monkeypatch.setenv("CUDA_PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert building.find_nvcc() is None
    assert (
        building.nvcc_missing() == f"expected nvcc of CUDA 12.4 or later, found none in CUDA_HOME={tmp_path / 'none'}"
    )


@pytest.mark.parametrize(("release", "usable"), [("11.8", False), ("12.3", False), ("12.4", True), ("13.0", True)])
def test_oldest_toolkit(bare, monkeypatch, tmp_path, release, usable) -> None:
    nvcc = nvcc_of(tmp_path / "bin" / "nvcc", release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if usable:
        assert building.nvcc_missing() is None and building.usable_nvcc() == nvcc
        return
    with pytest.raises(building.BuildError) as error:
        building.usable_nvcc()
    assert str(error.value) == f"expected nvcc of CUDA 12.4 or later, got {release} ({nvcc})"


def test_nvcc_that_does_not_run(tmp_path) -> None:
    with pytest.raises(building.BuildError, match="to name a release, got 'broken'"):
        building.nvcc_version(script(tmp_path / "nvcc", "echo broken; exit 1"))


@pytest.mark.parametrize(
    ("text", "ours", "refused"),
    [
        ("8.0;9.0a", ("80", "90a"), ()),
        ("9.0+PTX", ("90a",), ()),
        ("9.0 8.0, 8.6", ("80", "90a"), ()),
        ("8.9", ("80",), ()),
        ("7.5 8.0 10.0 12.0+PTX", ("80",), ("7.5", "10.0", "12.0+PTX")),
        ("10.0a", (), ("10.0a",)),
        ("8.0a;9.0f", (), ("8.0a", "9.0f")),
        ("", (), ()),
    ],
)
def test_architecture_list(text, ours, refused) -> None:
    assert building.parse_arch_list(text) == (ours, refused)


@pytest.mark.parametrize("text", ["Hopper", "8.0;Ampere", "90a", "9", "8.0+ptx"])
def test_architecture_list_that_is_none(text) -> None:
    with pytest.raises(ValueError, match=r"expected TORCH_CUDA_ARCH_LIST to hold numbers such as 8\.0;9\.0a, got '"):
        building.parse_arch_list(text)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((9, 0), "90a"), ((8, 0), "80"), ((8, 9), "80"), ((7, 5), None), ((10, 0), None), ((12, 0), None)],
)
def test_architecture_of_a_gpu(capability, arch) -> None:
    assert building.arch_of(*capability) == arch


def test_default_architectures(bare, monkeypatch, tmp_path) -> None:
    """The list, else this machine's GPUs, else all."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.default_architectures() == (("80", "90a"), "all, as there is no GPU here")
    script(tmp_path / "nvidia-smi", "echo 9.0; echo 9.0; echo 8.6")
    assert building.default_architectures() == (("80", "90a"), "for this machine's GPUs (8.6, 9.0)")
    script(tmp_path / "nvidia-smi", "echo 12.0")
    assert building.default_architectures()[0] == ()
    script(tmp_path / "nvidia-smi", "echo 8.0; exit 9")  # it fails so where the driver does not run
    assert building.default_architectures()[0] == ("80", "90a")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 10.0")
    assert building.default_architectures() == (
        ("90a",),
        "from TORCH_CUDA_ARCH_LIST=9.0 10.0 (no kernels for 10.0)",
    )


def test_jobs(bare, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(building, "_free_memory", lambda: 1000.0)
    assert building.job_count() == 8
    monkeypatch.setattr(building, "_free_memory", lambda: 4.6)
    assert building.job_count() == 3
    monkeypatch.setattr(building, "_free_memory", lambda: 0.1)
    assert building.job_count() == 1
    monkeypatch.setenv("MAX_JOBS", "5")
    assert building.job_count() == 5


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_jobs_that_are_none(monkeypatch, value) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(ValueError, match=f"expected MAX_JOBS to be a positive integer, got '{value}'"):
        building.job_count()


def test_after_a_failure_nothing_is_started(tmp_path) -> None:
    """One job at a time, so the third command is certainly not under way."""
    commands = [
        (
            [
                sys.executable,
                "-c",
                f"import sys; open({str(tmp_path / name)!r}, 'w'); print('told'); sys.exit({status})",
            ],
            name,
        )
        for name, status in (("first", 0), ("second", 3), ("third", 0))
    ]
    with pytest.raises(building.BuildError, match=r"(?s)second failed \(status 3\):.*told"):
        building.run_all(commands, jobs=1)
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]


def test_what_a_command_costs() -> None:
    code = "import time; x = bytearray(200 << 20); t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    done = building.run([sys.executable, "-c", code], "a loop")
    assert 0.3 <= done.cpu_seconds < 10 and done.seconds >= 0.3
    assert 200 / 1024 < done.peak_gib < 1


def test_this_machines_memory_is_known() -> None:
    if Path("/proc/meminfo").exists():
        assert 0 < building._free_memory() < 1e5


def normal(command: list[str]) -> list[str]:
    """An nvcc command's arguments that decide what is compiled."""
    dropped = {"-c": 0, "-MD": 0, "-forward-unknown-to-host-compiler": 0, "-MT": 1, "-MF": 1, "-x": 1, "-o": 1}
    kept, arguments = [], iter(command[1:])
    for argument in arguments:
        if argument in dropped:
            for _ in range(dropped[argument]):
                next(arguments)
        elif argument == "-include":
            kept.append(f"-include {Path(next(arguments)).name}")
        else:
            kept.append(argument)
    return sorted(kept)


@pytest.mark.build
@needs_cmake
@pytest.mark.parametrize("archs", [("80",), ("90a",), ("80", "90a")], ids="+".join)
def test_cmake_and_nvcc_alone_compile_the_same_files_with_the_same_flags(monkeypatch, tmp_path, archs) -> None:
    monkeypatch.delenv("CUDAHOSTCXX", raising=False)
    nvcc = building.usable_nvcc()
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    command += [f"-DSEQPAR_ATTN_ARCHS={';'.join(archs)}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += ["-DSEQPAR_ATTN_WERROR=ON", "-DSEQPAR_ATTN_PTXAS_VERBOSE=ON"]
    subprocess.run(command, check=True, capture_output=True)
    by_cmake = {
        x["file"]: normal(shlex.split(x["command"]))
        for x in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    ours = tmp_path / "ours.h"
    extra = (*building.WERROR, "-Xptxas=-v")
    assert by_cmake == {
        str(unit.source): normal(building.compile_command(nvcc, ROOT, unit, tmp_path / "configuration.h", extra))
        for unit in building.units(ROOT, archs)
    }
    building.write_configuration(ours, archs)
    assert (tmp_path / "configuration.h").read_text().split() == ours.read_text().split()


@pytest.mark.build
@needs_cmake
@pytest.mark.parametrize(
    ("archs", "message"),
    [("80;75", "expected SEQPAR_ATTN_ARCHS to be a list of 80;90a, got 75"), ("", "at least one of 80;90a, got none")],
)
def test_cmake_refuses_other_architectures(tmp_path, archs, message) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DSEQPAR_ATTN_ARCHS={archs}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and message in " ".join(done.stderr.split())


def exported(path: Path) -> set[str]:
    table = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in table.splitlines()}


@pytest.mark.build
@pytest.mark.parametrize("cmake", [pytest.param(True, marks=needs_cmake), False], ids=["cmake", "nvcc alone"])
def test_the_library(monkeypatch, tmp_path, cmake) -> None:
    """It exports the C interface and nothing else, not even the CUDA runtime inside it; and needs no driver to load."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "cmake" and not cmake else which(name))
    path = building.compile_library(checkout(tmp_path / "checkout"), ["80"], tmp_path / "objects")
    assert path.parent.name == ("cmake" if cmake else "direct")
    header = (ROOT / "csrc" / "seqpar_attn.h").read_text()
    declared = {
        line.split("(")[0].split()[-1] for line in header.splitlines() if line.startswith("SEQPAR_ATTN_EXPORT ")
    }
    assert exported(path) == {name.lstrip("*") for name in declared}
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "libcuda" not in needed and "torch" not in needed
    library = ctypes.CDLL(str(path))
    library.seqpar_attn_architectures.restype = ctypes.c_char_p
    assert library.seqpar_attn_architectures() == b"80"
