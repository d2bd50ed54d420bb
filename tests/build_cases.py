"""Small checkouts, pip without the network, and libraries made in C: what the tests of the build share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from seqpar_attn.kernels.cuda import structs

ROOT = Path(__file__).resolve().parent.parent
NO_NVCC = {"CUDA_HOME": str(ROOT / "no-such-toolkit"), "CUDA_PATH": ""}
"""An environment in which no nvcc is found."""
_OURS = ("SEQPAR_ATTN_CUDA", "SEQPAR_ATTN_LIBRARY", "SEQPAR_ATTN_CACHE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


def snake(name: str) -> str:
    """FinishDq -> finish_dq: a struct's name and its function's."""
    return re.sub("(?<!^)(?=[A-Z])", "_", name).lower()


def checkout(target: Path) -> Path:
    """A copy of what a build reads, so that tests leave nothing here and do not meet each other."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        target.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "*.whl")
    for folder in ("csrc", "seqpar_attn"):
        shutil.copytree(ROOT / folder, target / folder, ignore=compiled)
    return target


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what would steer the build, for sm_80 alone: Hopper's kernels take minutes."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**kept, "TORCH_CUDA_ARCH_LIST": "8.0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def run(*command: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """``python *command``, both streams in stdout."""
    return subprocess.run(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        cwd=cwd,
        env=environment(**changes),
    )


def pip_wheel(source: Path, target: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    options = ("-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target))
    return run("-m", "pip", "wheel", *options, str(source), cwd=target.parent, **changes)


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def fake_library(
    target: Path, abi: int = structs.ABI, architectures: str = "80;90a", sizes: str = "", without: str = ""
) -> Path:
    """A shared library with the header's functions, made by the host's C compiler; none of them computes."""
    names = [struct.__name__ for struct in structs.STRUCTS]
    sizes = sizes or ", ".join(f"sizeof(Seqpar{name})" for name in names)
    functions = {
        "abi": f"int32_t seqpar_attn_abi(void) {{ return {abi}; }}",
        "struct_size": f"size_t seqpar_attn_struct_size(int32_t i) {{ size_t s[] = {{{sizes}}}; return s[i]; }}",
        "architectures": f'const char* seqpar_attn_architectures(void) {{ return "{architectures}"; }}',
        "error": 'const char* seqpar_attn_error(int32_t code) { return "fake"; }',
        "counters": "int64_t seqpar_attn_forward_counters(const SeqparForward* a) { return 0; }\n"
        "int64_t seqpar_attn_backward_counters(const SeqparBackward* a) { return 0; }",
    }
    for name in names:
        functions[name] = f"int32_t seqpar_attn_{snake(name)}(const Seqpar{name}* a, void* s) {{ return 0; }}"
    functions.pop(without, None)
    code = '#include "seqpar_attn.h"\n' + "\n".join(functions.values())
    command = ["cc", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input=code, text=True, check=True)
    return target
