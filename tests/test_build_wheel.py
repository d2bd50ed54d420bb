"""Wheels and source distributions, by pip and without the network.

pip isolates nothing here, because for that it fetches setuptools. By hand: ``pip wheel -v --no-deps -w DIR .``
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from build_cases import NO_NVCC, checkout, environment, only_wheel, pip_wheel, run

from seqpar_attn.kernels.cuda import building, structs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip")
LIBRARY = "seqpar_attn/lib/libseqpar_attn.so"


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sources(root: Path) -> set[str]:
    return {f"seqpar_attn/source/{path}" for path in building.build_inputs(root)}


def clean_environment(folder: Path) -> str:
    """The Python of a new virtual environment without seqpar_attn, which borrows this one's torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files there, those of editable installs, are not read.
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return str(folder / "bin" / "python")


@pytest.mark.build
def test_with_nvcc(tmp_path) -> None:
    """Twice from one checkout: what the first build leaves there must not get into the second, pure wheel."""
    source = checkout(tmp_path / "checkout")
    built = pip_wheel(source, tmp_path / "wheels")
    assert built.returncode == 0, built.stdout
    assert "compiling the CUDA library for 80: from TORCH_CUDA_ARCH_LIST=8.0" in built.stdout
    wheel = only_wheel(tmp_path / "wheels")
    assert "-py3-none-linux_" in wheel.name
    names = contents(wheel)
    assert LIBRARY in names and sources(source) <= names
    assert not [name for name in names if name.endswith((".whl", ".o")) or "/tests/" in name]

    python = clean_environment(tmp_path / "clean")
    pip = run("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    assert pip.returncode == 0, pip.stdout
    command = [python, "-m", "seqpar_attn", "info", "--json"]
    cache = {"SEQPAR_ATTN_CACHE": str(tmp_path / "cache")}
    info = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(**cache))
    assert info.returncode == 0, info.stderr
    found = json.loads(info.stdout)["library"]
    assert Path(found.pop("path")).is_relative_to(tmp_path / "clean")
    assert found == {"abi": structs.ABI, "architectures": ["80"], "why": None}
    code = (
        "from seqpar_attn.kernels.cuda import building, library\n"
        "assert library.load(arch='80').seqpar_attn_abi() == library.ABI\n"
        "assert 'with 80' in library.unavailable(arch='90a')\n"
        "assert library.unavailable(build=True, arch='90a') is None\n"
        "print(building.source_root())\n"
    )
    used = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment(**cache))
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip().endswith("site-packages/seqpar_attn/source")

    pure = pip_wheel(source, tmp_path / "pure", SEQPAR_ATTN_CUDA="0")
    assert pure.returncode == 0, pure.stdout
    assert LIBRARY not in contents(only_wheel(tmp_path / "pure"))
    assert only_wheel(tmp_path / "pure").name.endswith("-py3-none-any.whl")


def test_without_nvcc(tmp_path) -> None:
    """Pure Python, with the sources, and it says so."""
    source = checkout(tmp_path / "checkout")
    built = pip_wheel(source, tmp_path / "wheels", **NO_NVCC)
    assert built.returncode == 0, built.stdout
    assert "pure Python, without the CUDA library: expected nvcc of CUDA 12.4 or later, found none in" in built.stdout
    wheel = only_wheel(tmp_path / "wheels")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in contents(wheel) and sources(source) <= contents(wheel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"SEQPAR_ATTN_CUDA": "1", **NO_NVCC},
            "SEQPAR_ATTN_CUDA=1, but the CUDA library cannot be compiled: expected nvcc",
        ),
        ({"SEQPAR_ATTN_CUDA": "yes"}, "expected SEQPAR_ATTN_CUDA to be 0 or 1, got 'yes'"),
        pytest.param(
            {"SEQPAR_ATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5"},
            "expected an architecture among 80, 90a, got none: from TORCH_CUDA_ARCH_LIST=7.5",
            marks=pytest.mark.build,
        ),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "Hopper"},
            "expected TORCH_CUDA_ARCH_LIST to hold numbers such as 8.0;9.0a, got 'Hopper'",
            marks=pytest.mark.build,
        ),
        pytest.param({"MAX_JOBS": "many"}, "expected MAX_JOBS to be a positive", marks=pytest.mark.build),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_refused(tmp_path, changes, message) -> None:
    built = pip_wheel(checkout(tmp_path / "checkout"), tmp_path / "wheels", **changes)
    assert built.returncode != 0 and message in built.stdout
    assert not list(tmp_path.glob("wheels/*.whl"))


@pytest.mark.build
def test_a_mistake_in_a_kernel_fails_the_installation(tmp_path) -> None:
    source = checkout(tmp_path / "checkout")
    (source / "csrc" / "small" / "broken.cu").write_text('#error "a mistake"\n')
    built = pip_wheel(source, tmp_path / "wheels")
    assert built.returncode != 0
    assert "a mistake" in built.stdout and "SEQPAR_ATTN_CUDA=0 installs without the CUDA library" in built.stdout


def test_source_distribution(tmp_path) -> None:
    """It has all that a build reads: a wheel made of it is made of the same files as the checkout's."""
    source = checkout(tmp_path / "checkout")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    made = run("-c", code, cwd=source, **NO_NVCC, SEQPAR_ATTN_CUDA="1")  # which a source distribution does not need
    assert made.returncode == 0, made.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {str(path) for path in building.build_inputs(source)}
    assert wanted | {"setup.py", "csrc/check_build.py", "csrc/limits.json"} <= names
    assert not [name for name in names if name.endswith((".whl", ".so"))]
    built = pip_wheel(archive, tmp_path / "wheels", **NO_NVCC)
    assert built.returncode == 0, built.stdout
    pip_wheel(source, tmp_path / "direct", **NO_NVCC)
    assert contents(only_wheel(tmp_path / "wheels")) == contents(only_wheel(tmp_path / "direct"))


@pytest.mark.build
def test_editable(tmp_path) -> None:
    """The library goes to the cache, by the hash of the sources, and the checkout's own files are imported."""
    source, cache = checkout(tmp_path / "checkout"), tmp_path / "cache"
    python = clean_environment(tmp_path / "clean")
    options = ("-v", "--no-deps", "--no-build-isolation", "--no-index")
    pip = run("-m", "pip", "--python", python, "install", *options, "-e", str(source), cwd=tmp_path,
              SEQPAR_ATTN_CACHE=str(cache))  # fmt: skip
    assert pip.returncode == 0, pip.stdout
    code = (
        "from seqpar_attn.kernels.cuda import library; print(library.path_of(library.load())); print(library.__file__)"
    )
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(SEQPAR_ATTN_CACHE=str(cache)),
    )
    assert done.returncode == 0, done.stderr
    path, module = done.stdout.split()
    assert Path(path).is_relative_to(cache) and Path(module).is_relative_to(source)
