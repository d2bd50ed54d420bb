"""Finds libseqpar_attn.so, checks that it fits this package, loads it, and compiles it if that was asked for.

It is looked for in this order: the path in SEQPAR_ATTN_LIBRARY, inside the package (put there by ``pip install``), and
in the cache of libraries compiled on demand, SEQPAR_ATTN_CACHE or ~/.cache/seqpar_attn. Those are kept by a hash of
their sources, so after an edit or an update a stale one is never found.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import building
from .structs import ABI, STRUCTS

_PACKAGED = Path(__file__).resolve().parents[2] / "lib" / building.LIBRARY
_lock = threading.Lock()
_loaded: dict[str | None, ctypes.CDLL] = {}

_HOW = (
    "install with nvcc of CUDA 12.4 or later (see README, Building), or ask for the backend by name, which compiles it"
)


class LibraryError(RuntimeError):
    """There is no library that can be used; says why and what to do."""


# The cache of compiled libraries


def cache_dir() -> Path:
    given = os.environ.get("SEQPAR_ATTN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "seqpar_attn"


def _key(root: Path) -> str:
    """One name for these sources: their contents, how they are compiled, and the ABI."""
    digest = hashlib.sha256(f"abi {ABI}\0".encode())
    for path in [*(root / p for p in building.build_inputs(root)), Path(building.__file__)]:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _cached() -> Iterator[Path]:
    """Libraries of exactly these sources, the newest first."""
    root = building.source_root()
    if root is not None:
        found = (cache_dir() / _key(root)).glob(f"*/{building.LIBRARY}")
        yield from sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy_sources(root: Path, target: Path) -> None:
    """Makes ``target`` a copy, writing only what differs: ninja goes by times, which a checkout's need not tell."""
    wanted = building.build_inputs(root)
    for path in wanted:
        content, copy = (root / path).read_bytes(), target / path
        if not copy.exists() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    for path in set(building.build_inputs(target)) - set(wanted):
        (target / path).unlink()


def build_on_demand(*archs: str) -> Path:
    """Compiles the library for ``archs`` ("90a") unless the cache has it, and returns its path.

    Of many processes that ask at once one compiles and the others wait for it. BuildError: it cannot be compiled.
    """
    building.check_architectures(archs)
    root = building.source_root()
    if root is None:
        raise building.BuildError(
            "expected csrc inside the package or beside it, found none: install seqpar_attn again"
        )
    nvcc = building.usable_nvcc()
    toolkit = "cuda{}.{}".format(*building.nvcc_version(nvcc))
    kind = f"{'-'.join(sorted(archs))}-{toolkit}"
    key = _key(root)
    target = cache_dir() / key / kind / building.LIBRARY
    with _locked(cache_dir() / "lock"):
        if target.exists():
            return target
        print(f"seqpar_attn: compiling {building.LIBRARY} for {', '.join(archs)}, once", file=sys.stderr, flush=True)
        # Kept, so that after an edit of one file cmake compiles that one. Another checkout has another folder.
        place = hashlib.sha256(f"{root}\0{nvcc}".encode()).hexdigest()[:8]
        folder = cache_dir() / "objects" / f"{kind}-{place}"
        _copy_sources(root, folder / "source")
        if _key(folder / "source") != key:
            raise building.BuildError(f"expected {root / 'csrc'} to stay as it was, but it has just changed: try again")
        built = building.compile_library(folder / "source", archs, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
            copy = Path(unfinished) / building.LIBRARY
            shutil.copyfile(built, copy)
            copy.rename(target)  # in one step: who looks without the lock sees all of it or nothing
    return target


# Loading


def _check_complete(path: Path) -> None:
    """Loading an ELF file that was cut off can kill the process, so its end is compared with what its header says."""
    head = path.open("rb").read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        raise LibraryError(f"expected a 64-bit ELF library, got {path}, which is none: {_again(path)}")
    sections = int.from_bytes(head[40:48], "little")
    end = sections + int.from_bytes(head[58:60], "little") * int.from_bytes(head[60:62], "little")
    size = path.stat().st_size
    if size < end:
        raise LibraryError(
            f"expected {path} to have at least {end} bytes, got {size}, so it was cut off: {_again(path)}"
        )


def _again(path: Path) -> str:
    """How to get a good library in the place of a bad one."""
    if os.environ.get("SEQPAR_ATTN_LIBRARY"):
        return "correct or unset SEQPAR_ATTN_LIBRARY"
    return "install seqpar_attn again" if path == _PACKAGED else f"delete {path.parent}"


def _open(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions declared. LibraryError: it does not fit this package."""
    if not path.is_file():
        raise LibraryError(f"expected a library at {path}, found no such file: {_again(path)}")
    _check_complete(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"expected a library that can be loaded, got {path} ({error}): {_again(path)}") from error
    _expect_functions(library, ("abi",), path)
    abi = library.seqpar_attn_abi()
    if abi != ABI:
        raise LibraryError(f"expected a library with ABI {ABI}, got ABI {abi} ({path}): {_again(path)}")
    _expect_functions(library, (*_OTHERS, *map(_function, STRUCTS)), path)
    _declare(library)
    for index, struct in enumerate(STRUCTS):
        size = library.seqpar_attn_struct_size(index)
        if size != ctypes.sizeof(struct):
            name, expected = struct.__name__, ctypes.sizeof(struct)
            raise LibraryError(f"expected {name} of {expected} bytes, got {size} ({path}): {_again(path)}")
    return library


_OTHERS = ("struct_size", "architectures", "error", "forward_counters", "backward_counters")


def _function(struct: type[ctypes.Structure]) -> str:
    """The function that takes ``struct``, without its prefix."""
    return re.sub("(?<!^)(?=[A-Z])", "_", struct.__name__).lower()


def _expect_functions(library: ctypes.CDLL, names: Iterable[str], path: Path) -> None:
    for name in names:
        if not hasattr(library, f"seqpar_attn_{name}"):
            raise LibraryError(
                f"expected {building.LIBRARY}, got {path}, which lacks seqpar_attn_{name}: {_again(path)}"
            )


def _declare(library: ctypes.CDLL) -> None:
    library.seqpar_attn_struct_size.argtypes = [ctypes.c_int32]
    library.seqpar_attn_struct_size.restype = ctypes.c_size_t
    library.seqpar_attn_architectures.restype = ctypes.c_char_p
    library.seqpar_attn_error.argtypes = [ctypes.c_int32]
    library.seqpar_attn_error.restype = ctypes.c_char_p
    for counters in (library.seqpar_attn_forward_counters, library.seqpar_attn_backward_counters):
        counters.argtypes = [ctypes.c_void_p]
        counters.restype = ctypes.c_int64
    for struct in STRUCTS:
        # A struct by ctypes.byref or by its address as an int, and a stream as an int.
        function = getattr(library, f"seqpar_attn_{_function(struct)}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        function.restype = ctypes.c_int32


def architectures(library: ctypes.CDLL | None = None) -> tuple[str, ...]:
    """What a loaded library, by default that of ``load()``, was compiled for."""
    text: bytes = (load() if library is None else library).seqpar_attn_architectures()
    return tuple(text.decode().split(";"))


def path_of(library: ctypes.CDLL) -> str:
    return library._name


def _find(arch: str | None) -> ctypes.CDLL:
    """The first library that serves ``arch``. A broken one is an error: it is never passed over for another."""
    explicit = os.environ.get("SEQPAR_ATTN_LIBRARY")
    candidates = [Path(explicit)] if explicit else [*([_PACKAGED] if _PACKAGED.exists() else []), *_cached()]
    others = []
    for path in candidates:
        library = _open(path)
        if arch is None or arch in architectures(library):
            return library
        others.append(f"{path} with {', '.join(architectures(library))}")
    if others:
        raise _NotBuilt(f"expected a library with kernels for {arch}, got {'; '.join(others)}: {_HOW}")
    raise _NotBuilt(f"expected {building.LIBRARY}, found none: {_HOW}")


class _NotBuilt(LibraryError):
    """Compiling would help."""


def load(build: bool = False, arch: str | None = None) -> ctypes.CDLL:
    """The library, loaded once per process and checked; with kernels for ``arch`` ("90a"; see building.arch_of).

    Without ``arch`` it is the one last loaded for some architecture, if any was, so that only one caller needs to know.
    Where there is none, ``build`` compiles it, for which ``arch`` is needed. LibraryError, BuildError: why it cannot
    be used. A library named by SEQPAR_ATTN_LIBRARY is never replaced by another.
    """
    if build and arch is None:
        raise ValueError("expected an architecture such as '90a' to build for, got None")
    with _lock:
        if arch is None and _loaded:
            return next(reversed(_loaded.values()))
        if arch not in _loaded:
            try:
                _loaded[arch] = _find(arch)
            except _NotBuilt:
                if arch is None or not build or os.environ.get("SEQPAR_ATTN_LIBRARY"):
                    raise
                _loaded[arch] = _open(build_on_demand(arch))
        return _loaded[arch]


def unavailable(build: bool = False, arch: str | None = None) -> str | None:
    """Why ``load(build, arch)`` cannot succeed, or None. Compiles nothing and does not touch CUDA."""
    try:
        load(arch=arch)
    except _NotBuilt as error:
        if not build or os.environ.get("SEQPAR_ATTN_LIBRARY"):
            return str(error)
        if building.source_root() is None:
            return "there is no csrc to compile it from: install seqpar_attn again"
        return building.nvcc_missing()
    except LibraryError as error:
        return str(error)
    return None


def describe() -> dict[str, Any]:
    """For ``python -m seqpar_attn info``: path, ABI and architectures, or why there is none."""
    why = unavailable()
    if why is not None:
        return {"path": None, "abi": None, "architectures": [], "why": why}
    library = load()
    return {"path": path_of(library), "abi": ABI, "architectures": list(architectures(library)), "why": None}
