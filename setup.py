"""How csrc joins the build; the metadata is all in pyproject.toml.

Where nvcc is found the library is compiled into the wheel, which then fits one platform, any Python and any torch;
elsewhere the wheel is pure Python and fits all. SEQPAR_ATTN_CUDA=0 never compiles, =1 fails if it cannot.
pip shows what was decided only with -v; ``python -m seqpar_attn info`` says it afterwards.

cmake and ninja are used if they are on the path and are no build requirements: without them nvcc is called directly,
with the same flags, so nobody downloads 30 MB to compile nothing, and an isolated build needs only setuptools.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "seqpar_attn"


def _module(name: str) -> ModuleType:
    """A file of kernels/cuda by its path: importing the package would need torch."""
    path = ROOT / PACKAGE / "kernels" / "cuda" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building: Any = _module("building")


def say(text: str) -> None:
    print(f"{PACKAGE}: {text}", file=sys.stderr, flush=True)


@functools.cache
def architectures() -> tuple[str, ...]:
    """What to compile for; () if the wheel is to be pure Python. Decided and said once."""
    wish = os.environ.get("SEQPAR_ATTN_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise SystemExit(f"expected SEQPAR_ATTN_CUDA to be 0 or 1, got {wish!r}")
    if wish == "0":
        say("pure Python, without the CUDA library: SEQPAR_ATTN_CUDA=0")
        return ()
    archs: tuple[str, ...] = ()
    try:
        reason = building.nvcc_missing() if sys.platform == "linux" else f"expected Linux, got {sys.platform}"
        if reason is None:
            archs, why = building.default_architectures()
            if archs:
                say(f"compiling the CUDA library for {', '.join(archs)}: {why}")
                return archs
            reason = f"expected an architecture among {', '.join(building.ARCHITECTURES)}, got none: {why}"
    except (building.BuildError, ValueError) as error:
        raise SystemExit(f"{PACKAGE}: {error}") from error
    if wish == "1":
        raise SystemExit(f"{PACKAGE}: SEQPAR_ATTN_CUDA=1, but the CUDA library cannot be compiled: {reason}")
    say(f"pure Python, without the CUDA library: {reason}")
    return ()


class BuildPy(build_py):
    """Adds the library and its sources, from which one for another GPU can be compiled on demand."""

    def _additions(self) -> dict[str, Path]:
        """Path inside the package -> file of the checkout, of the sources."""
        return {f"source/{path}": ROOT / path for path in building.build_inputs(ROOT)}

    def run(self) -> None:
        if self.editable_mode:
            self._build_editable()
            super().run()
            return
        package = Path(self.build_lib) / PACKAGE
        shutil.rmtree(package, ignore_errors=True)  # else a wheel would hold what an earlier one left there
        super().run()
        for name, path in self._additions().items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, package / name)
        if architectures():
            library = self._compile(lambda: building.compile_library(ROOT, architectures(), self._objects()))
            (package / "lib").mkdir()
            shutil.copyfile(library, package / "lib" / building.LIBRARY)

    def _build_editable(self) -> None:
        """A checkout's sources change, so its library goes where it is kept by their hash."""
        if architectures():
            # library.py has relative imports, for which a package without torch is enough.
            name = "seqpar_attn_cuda"
            spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
            assert spec is not None
            parent = sys.modules[name] = importlib.util.module_from_spec(spec)
            parent.__path__ = [str(ROOT / PACKAGE / "kernels" / "cuda")]
            library: Any = importlib.import_module(f"{name}.library")
            say(f"the library is {self._compile(lambda: library.build_on_demand(*architectures()))}")

    def _objects(self) -> Path:
        return Path(self.get_finalized_command("build").build_temp).resolve() / "csrc"

    @staticmethod
    def _compile(compilation: Any) -> Path:
        try:
            return compilation()
        except (RuntimeError, ValueError) as error:
            hint = "SEQPAR_ATTN_CUDA=0 installs without the CUDA library"
            raise SystemExit(f"{PACKAGE}: {error}\n{PACKAGE}: {hint}") from error

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        names = [*self._additions(), *([f"lib/{building.LIBRARY}"] if architectures() else [])]
        added = [] if self.editable_mode else [str(Path(self.build_lib) / PACKAGE / name) for name in names]
        return [*super().get_outputs(include_bytecode), *added]


class BdistWheel(bdist_wheel):
    """Tags the wheel by what is in it: the library knows nothing of Python."""

    def finalize_options(self) -> None:
        if architectures():
            # Files then go to the folder for what depends on the platform, as those of an extension module would.
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
