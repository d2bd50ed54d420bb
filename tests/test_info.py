"""``python -m seqpar_attn info`` in a process of its own: here, without triton, and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar_attn import info, kernels
from seqpar_attn.kernels.cuda import building

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "seqpar_attn", *arguments] if code is None else [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)


def test_json_without_a_gpu() -> None:
    done = run("info", "--json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] and report["versions"]["python"].startswith("3.")
    assert report["gpus"] == [] and report["no_gpu"]
    assert set(report["backends"]) == set(kernels.names())
    assert report["backends"]["reference"] is None and report["backends"]["aten"] is None
    assert report["backends"]["cudnn"]
    chosen = {(row["device"], row["dtype"]): row["causal"] for row in report["auto"]}
    assert chosen[("cpu", "bfloat16")] == chosen[("cpu", "float64")] == "reference"
    assert report["triton_kernels"] == []  # of no GPU
    assert report["nvcc"] == building.find_nvcc()
    assert report["transports"]["loopback"] is None
    assert report["transports"]["gloo"] is None
    assert report["transports"]["nccl"]
    assert report["auto_transport"] == [["on CPUs", "p2p"]] and report["arena_limit"] == "a sixth of the GPU's"


def test_a_limit_that_is_none_is_said(monkeypatch) -> None:
    monkeypatch.setenv("SEQPAR_ATTN_ARENA_LIMIT", "much")
    assert "got 'much'" in info._arena_limit()


def test_no_library(tmp_path) -> None:
    """An explicit path is never replaced by another library, so this is the same on every machine."""
    missing = tmp_path / "libnothing.so"
    done = run("info", "--json", SEQPAR_ATTN_LIBRARY=str(missing))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["library"]
    assert report["path"] is None and report["architectures"] == [] and str(missing) in report["why"]
    text = run("info", SEQPAR_ATTN_LIBRARY=str(missing)).stdout
    assert f"  library          none: {report['why']}" in text.splitlines()


def test_text_without_triton(tmp_path) -> None:
    """A sitecustomize makes ``import triton`` fail as if it was not installed: the command says so and works."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    done = run("info", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    section = done.stdout[done.stdout.index("backends") :]
    triton = next(line for line in section.splitlines() if line.strip().startswith("triton"))
    assert "no: " in triton and "triton" in triton.split("no: ")[1], triton
    assert "loopback" in lines and "available" in lines["loopback"]


def test_transformers_is_not_imported() -> None:
    code = (
        "import sys\nfrom seqpar_attn.__main__ import main\nassert main(['info']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--xml"]], ids=str)
def test_wrong_usage(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "usage: python -m seqpar_attn" in done.stderr


def test_render_a_machine_with_gpus() -> None:
    report = {
        "versions": {"torch": "2.11.0", "triton": None},
        "torch_cuda": "13.0",
        "nvcc": None,
        "library": {"path": "/lib/libseqpar_attn.so", "abi": 7, "architectures": ["80", "90a"], "why": None},
        "gpus": [{"index": 0, "name": "H100", "memory_gib": 79.2, "capability": "9.0", "multiprocessors": 132}],
        "no_gpu": None,
        "backends": {"reference": None, "cudnn": "torch sees no CUDA GPU"},
        "auto": [{"device": "cuda:0", "dtype": "bfloat16", "causal": "triton", "interval": None}],
        "triton_kernels": [
            {"device": "cuda:0", "dtype": "bfloat16", "deterministic": False, "kernels": "hopper", "why": None},
            {"device": "cuda:0", "dtype": "float32", "deterministic": False, "kernels": "portable", "why": "too wide"},
        ],
        "transports": {"loopback": None},
        "auto_transport": info._auto_transport(2, "GPU 0 has no peer access to GPU 1"),
        "arena_limit": "4096 bytes",
    }
    text = info.render(report).splitlines()
    assert "  cuda:0  bfloat16  hopper" in text
    assert "  cuda:0  float32   portable  too wide" in text
    assert "  triton  not installed" in text
    assert "  nvcc             none" in text
    assert "  library          /lib/libseqpar_attn.so (ABI 7, for 80, 90a)" in text
    assert "  cuda:0  H100  79.2 GiB  sm 9.0" in text
    assert "  on CPUs                        p2p" in text
    shared = "symmetric, if there is peer access among theirs (GPU 0 has no peer access to GPU 1)"
    assert f"  a GPU of this machine each     {shared}" in text
    assert "  limit of memory for symmetric  4096 bytes" in text
    assert "  cudnn      no: torch sees no CUDA GPU" in text
    assert "  cuda:0  bfloat16  triton        none" in text
