"""Finding, checking, loading and compiling the CUDA library. Libraries made in C stand in where no kernel is needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from build_cases import NO_NVCC, checkout, environment, fake_library

from seqpar_attn.kernels.cuda import building, library, structs

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch, tmp_path) -> None:
    """No library anywhere, until a test puts one somewhere."""
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_PACKAGED", tmp_path / "package" / building.LIBRARY)
    monkeypatch.setenv("SEQPAR_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQPAR_ATTN_LIBRARY", raising=False)


def packaged(**options) -> Path:
    library._PACKAGED.parent.mkdir(exist_ok=True)
    return fake_library(library._PACKAGED, **options)


def cached(kind: str, **options) -> Path:
    root = building.source_root()
    assert root is not None
    folder = library.cache_dir() / library._key(root) / kind
    folder.mkdir(parents=True)
    return fake_library(folder / building.LIBRARY, **options)


def test_none() -> None:
    with pytest.raises(library.LibraryError, match=r"found none: install with nvcc of CUDA 12\.4 or later"):
        library.load()
    why = library.unavailable()
    assert why is not None and "found none" in why
    assert library.describe() == {"path": None, "abi": None, "architectures": [], "why": why}


def test_none_and_no_compiler(monkeypatch) -> None:
    for name, value in NO_NVCC.items():
        monkeypatch.setenv(name, value)
    why = library.unavailable(build=True, arch="90a")
    assert why is not None and f"found none in CUDA_HOME={NO_NVCC['CUDA_HOME']}" in why
    with pytest.raises(building.BuildError, match=r"expected nvcc of CUDA .* or later, found none"):
        library.load(build=True, arch="90a")


@needs_cc
def test_packaged_before_cached_and_loaded_once() -> None:
    cached("80-cuda13.0", architectures="80")
    path = packaged()
    loaded = library.load()
    assert library.path_of(loaded) == str(path) and library.load() is loaded
    assert library.architectures(loaded) == ("80", "90a")
    assert library.describe() == {"path": str(path), "abi": structs.ABI, "architectures": ["80", "90a"], "why": None}
    delta = structs.Delta()
    assert loaded.seqpar_attn_delta(ctypes.byref(delta), 0) == 0
    assert loaded.seqpar_attn_delta(ctypes.addressof(delta), None) == 0
    assert loaded.seqpar_attn_error(-1) == b"fake"


@needs_cc
def test_the_one_with_the_architecture() -> None:
    packaged(architectures="80")
    with pytest.raises(library.LibraryError, match=r"expected a library with kernels for 90a, got .* with 80"):
        library.load(arch="90a")
    path = cached("90a-cuda13.0", architectures="90a")
    assert library.path_of(library.load()) == str(library._PACKAGED)
    assert library.path_of(library.load(arch="90a")) == str(path)
    assert library.path_of(library.load()) == str(path)  # it has been said which GPU this is
    assert library.architectures() == ("90a",)
    assert library.path_of(library.load(arch="80")) == str(library._PACKAGED)


@needs_cc
def test_a_library_of_other_sources_is_not_taken(monkeypatch, tmp_path) -> None:
    cached("90a-cuda13.0")
    assert library.unavailable(arch="90a") is None
    copy = checkout(tmp_path / "checkout")
    monkeypatch.setattr(building, "source_root", lambda: copy)
    monkeypatch.setattr(library, "_loaded", {})
    assert library.unavailable(arch="90a") is None  # a copy, the same sources
    with (copy / "csrc" / "common" / "errors.h").open("a") as file:
        file.write("// edited\n")
    monkeypatch.setattr(library, "_loaded", {})
    assert "found none" in str(library.unavailable(arch="90a"))


@needs_cc
def test_threads_load_one(monkeypatch) -> None:
    packaged()
    opened, original = [], library._open
    monkeypatch.setattr(library, "_open", lambda path: opened.append(path) or original(path))
    threads = [threading.Thread(target=library.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [library._PACKAGED]


@needs_cc
def test_explicit_path_and_nothing_else(monkeypatch, tmp_path) -> None:
    packaged()
    monkeypatch.setenv("SEQPAR_ATTN_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(library.LibraryError, match=r"missing\.so, found no such file: correct or unset SEQPAR_ATTN_L"):
        library.load(build=True, arch="90a")
    path = fake_library(tmp_path / "other.so", architectures="80")
    monkeypatch.setenv("SEQPAR_ATTN_LIBRARY", str(path))
    assert library.path_of(library.load()) == str(path)
    monkeypatch.setattr(library, "build_on_demand", lambda *archs: pytest.fail("compiled"))
    with pytest.raises(library.LibraryError, match="expected a library with kernels for 90a"):
        library.load(build=True, arch="90a")
    assert library.unavailable(build=True, arch="90a") is not None


@needs_cc
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"abi": structs.ABI + 1},
            rf"expected a library with ABI {structs.ABI}, got ABI {structs.ABI + 1} .*: install",
        ),
        ({"sizes": "8, 8, 8, 8, 8, 8, 8, 8"}, r"expected Forward of \d+ bytes, got 8 .*: install seqpar_attn again"),
        ({"without": "abi"}, r"expected libseqpar_attn.so, got .*, which lacks seqpar_attn_abi: install"),
        ({"without": "Forward"}, r"expected libseqpar_attn.so, got .*, which lacks seqpar_attn_forward: install"),
    ],
)
def test_a_library_that_does_not_fit(options, message) -> None:
    packaged(**options)
    with pytest.raises(library.LibraryError, match=message):
        library.load()
    assert library.unavailable(build=True, arch="90a")  # a broken one is not hidden by another


@needs_cc
def test_cut_off_anywhere() -> None:
    """In this process: loading such a file unchecked ends it with SIGBUS."""
    whole = packaged().read_bytes()
    for size in (0, 10, 64, 4096, len(whole) // 2, len(whole) - 1):
        library._PACKAGED.write_bytes(whole[:size])
        with pytest.raises(library.LibraryError, match="install seqpar_attn again"):
            library.load()
    library._PACKAGED.write_bytes(whole)
    library.load()


@needs_cc
def test_not_a_library(monkeypatch, tmp_path) -> None:
    library._PACKAGED.parent.mkdir()
    library._PACKAGED.write_bytes(b"garbage " * 1000)
    with pytest.raises(library.LibraryError, match="expected a 64-bit ELF library, got"):
        library.load()
    damaged = bytearray(fake_library(tmp_path / "damaged.so").read_bytes())
    damaged[18:20] = b"\xff\xff"  # for a machine that does not exist
    (tmp_path / "damaged.so").write_bytes(damaged)
    monkeypatch.setenv("SEQPAR_ATTN_LIBRARY", str(tmp_path / "damaged.so"))
    with pytest.raises(library.LibraryError, match=r"expected a library that can be loaded, got .*damaged\.so"):
        library.load()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected an architecture such as '90a' to build for, got None"):
        library.load(build=True)
    with pytest.raises(ValueError, match="expected architectures among 80, 90a, got 75"):
        library.build_on_demand("75")


@pytest.mark.build
def test_two_processes_build_once(tmp_path) -> None:
    """The nvcc they find writes down every call. Both start before either can have finished."""
    root, calls = checkout(tmp_path / "checkout"), tmp_path / "calls"
    fake = tmp_path / "toolkit" / "bin" / "nvcc"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {building.usable_nvcc()} "$@"\n')
    fake.chmod(0o755)
    cache = tmp_path / "cache"
    changes = {"CUDA_HOME": str(tmp_path / "toolkit"), "SEQPAR_ATTN_CACHE": str(cache), "PYTHONPATH": str(root)}
    code = (
        "from seqpar_attn.kernels.cuda import library\n"
        "print('ready', flush=True); input()\n"
        "print(library.path_of(library.load(build=True, arch='80')))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(**changes),
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["ready\n", "ready\n"]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    (path,) = {out.strip() for out, _ in said}
    assert Path(path).is_relative_to(cache) and Path(path).exists()
    assert sum("compiling libseqpar_attn.so for 80, once" in err for _, err in said) == 1
    sources = [unit.source.name for unit in building.units(root, ["80"])]
    compiled = calls.read_text().splitlines()
    assert {name: sum(f"/{name}.o" in call or f"-{name}.o" in call for call in compiled) for name in sources} == (
        dict.fromkeys(sources, 1)
    )
    assert os.listdir(Path(path).parent) == [building.LIBRARY]  # nothing half-made is left


@pytest.mark.build
def test_an_edit_with_an_old_time_is_compiled(monkeypatch, tmp_path) -> None:
    """As after unpacking an archive over a checkout."""
    copy = checkout(tmp_path / "checkout")
    monkeypatch.setattr(building, "source_root", lambda: copy)
    first = library.load(build=True, arch="80")
    assert not hasattr(first, "added")
    path = copy / "csrc" / "library.cu"
    path.write_text(path.read_text() + 'extern "C" SEQPAR_ATTN_EXPORT int added() { return 7; }\n')
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(library, "_loaded", {})
    second = library.load(build=True, arch="80")
    assert second.added() == 7
    assert library.path_of(second) != library.path_of(first)


@pytest.mark.build
def test_what_the_compiler_says_reaches_the_user(monkeypatch, tmp_path) -> None:
    copy = checkout(tmp_path / "checkout")
    with (copy / "csrc" / "library.cu").open("a") as file:
        file.write('#error "a mistake"\n')
    monkeypatch.setattr(building, "source_root", lambda: copy)
    with pytest.raises(building.BuildError, match="a mistake"):
        library.load(build=True, arch="80")
    assert "found none" in str(library.unavailable(arch="80"))
