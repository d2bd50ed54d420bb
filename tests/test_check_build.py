"""csrc/check_build.py: what ptxas says is read right, and every limit can fail."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from build_cases import NO_NVCC, ROOT, checkout, run


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_build", ROOT / "csrc" / "check_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_build: Any = _module()
LIMITS = json.loads((ROOT / "csrc" / "limits.json").read_text())
CHECK = str(ROOT / "csrc" / "check_build.py")

# As nvcc 13.0 prints it, for two architectures; the mangled names are shortened.
OUTPUT = """\
ptxas info    : (C7519) warpgroup.arrive is injected in around line 43 by compiler to allow use of registers in GMMA in function '_Z1bILi3EEvPf'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function '_Z1bILi3EEvPf'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPfi' for 'sm_80'
ptxas info    : Function properties for _Z1aPfi
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 256 bytes cumulative stack size, 380 bytes cmem[0]
ptxas info    : Compile time = 33.685 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1bILi3EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bILi3EEvPf
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
"""  # noqa: E501


def test_parse() -> None:
    a, b = check_build.parse(OUTPUT)
    assert (a.mangled, a.arch) == ("_Z1aPfi", "80")
    assert a.found == {"registers": 32, "spills": 0, "stack": 256, "serialised": 0, "injected": 0} and a.notes == ()
    assert (b.mangled, b.arch) == ("_Z1bILi3EEvPf", "90a")
    assert b.found == {"registers": 168, "spills": 20, "stack": 0, "serialised": 1, "injected": 1}
    assert b.notes[1].startswith("C7511 Potential Performance Loss: wgmma.mma_async instructions are serialized")
    assert b.notes[1].endswith("for the wgmma pipeline")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("registers", "expected registers of _Z1"),
        ("spill", "expected stack of _Z1"),
        ("Compiling", "every note to name"),
    ],
)
def test_output_that_is_not_understood(dropped, message) -> None:
    """A format that a later nvcc changes must not pass for "nothing spilled"."""
    lines = [line for line in OUTPUT.splitlines() if dropped not in line or "C75" in line]
    with pytest.raises(ValueError, match=message):
        check_build.parse("\n".join(lines))


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void seqpar::(anonymous namespace)::delta_kernel<__half2>(SeqparDelta)", "delta_kernel<__half2>"),
        ("seqpar::sm90::run<seqpar::sm90::Config<(int)128, true> >(a::B const*)", "run<Config<(int)128, true> >"),
        ("plain(int)", "plain"),
    ],
)
def test_short_name(demangled, short) -> None:
    assert check_build.short_name(demangled) == short


def kernel(**found: int) -> tuple[str, str, Any]:
    values = {**dict.fromkeys(check_build.METRICS, 0), **found}
    notes = ("C7519 arrive is injected",) * values["injected"] + ("C7510 it waits",) * values["serialised"]
    return "sm90", "forward<128>", check_build.Kernel("_Z", "90a", values, notes)


@pytest.mark.parametrize("metric", check_build.METRICS)
def test_every_limit_can_fail(metric) -> None:
    limit = LIMITS["folders"]["sm90"][metric]
    plain = {**LIMITS, "exceptions": []}
    assert check_build.judge([kernel(**{metric: limit})], plain) == []
    (finding,) = check_build.judge([kernel(**{metric: limit + 1})], plain)
    note = {"serialised": " (C7510 it waits)", "injected": " (C7519 arrive is injected)"}.get(metric, "")
    assert str(finding) == f"forward<128> for 90a: {metric} {limit + 1}, limit {limit}{note}"


def test_exceptions() -> None:
    entry = {"folder": "sm90", "kernel": "^forward<128>", "reason": "measured to be faster so", "spills": 8}
    limits = {**LIMITS, "exceptions": [entry]}
    assert check_build.judge([kernel(spills=8)], limits) == []
    assert [f.limit for f in check_build.judge([kernel(spills=9)], limits)] == [8]
    assert [f.metric for f in check_build.judge([kernel(spills=8, stack=8)], limits)] == ["stack"]
    (unneeded,) = check_build.judge([kernel()], limits)
    assert "exception '^forward<128>'" in str(unneeded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["folders"]["sm90"].pop("stack"), "expected limits .* of sm90"),
        (lambda x: x["build"].pop("memory_gib"), "expected limits .* of the build"),
        (
            lambda x: x["exceptions"].append({"folder": "sm90", "kernel": "x", "spills": 1}),
            "expected an exception with",
        ),
        (
            lambda x: x["exceptions"].append({"folder": "sm90", "kernel": "x", "reason": "y"}),
            "expected an exception with",
        ),
        (
            lambda x: x["exceptions"].append({"folder": "sm90", "kernel": "x", "reason": " ", "spills": 1}),
            "expected an exception with",
        ),
    ],
)
def test_limits_that_are_not_understood(change, message) -> None:
    check_build.check_limits(LIMITS)
    changed = copy.deepcopy(LIMITS)
    change(changed)
    with pytest.raises(ValueError, match=message):
        check_build.check_limits(changed)


def test_peak_memory_is_of_what_ran_together() -> None:
    assert check_build._peak([(0, 2, 1.0), (1, 3, 2.0), (2, 4, 0.5)]) == 3.0


def test_without_nvcc(tmp_path) -> None:
    done = run(CHECK, cwd=tmp_path, **NO_NVCC)
    assert done.returncode == check_build.SKIPPED
    assert done.stdout.startswith("csrc is not checked: expected nvcc of CUDA 12.4 or later, found none in")


BAD = """\
#include <cstdint>
namespace bad {
template <int N>
__global__ void serialised(float* out, uint64_t a, uint64_t b) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N; i++) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b));
    d[0] += 1.f;  // an accumulator is used while wgmma still writes it
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
template __global__ void serialised<3>(float*, uint64_t, uint64_t);
__global__ void stacked(float* out, int n) {
  float x[64];
  for (int i = 0; i < 64; i++) x[i] = out[i * n];
  for (int j = 0; j < n; j++) x[(j * n) % 64] += 1.f;
  for (int i = 0; i < 64; i++) out[i] = x[i];
}
__global__ void __launch_bounds__(1024, 2) spilled(float* out, const float* in, int n) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; i++) x[i] = in[i * n + threadIdx.x];
  for (int j = 0; j < n; j++) {
#pragma unroll
    for (int i = 0; i < 96; i++) x[i] = x[i] * x[(i + 7) % 96] + in[j];
  }
#pragma unroll
  for (int i = 0; i < 96; i++) out[i * n + threadIdx.x] = x[i];
}
__global__ void fine(float* out) { out[threadIdx.x] = 0.f; }
}  // namespace bad
"""


def tiny(target: Path) -> Path:
    """A checkout with no kernels but these: its own take minutes, and change."""
    root = checkout(target)
    for folder in ("sm90", "small"):
        shutil.rmtree(root / "csrc" / folder)
    (root / "csrc" / "sm90").mkdir()
    (root / "csrc" / "library.cu").write_text("")  # it would call what has been removed
    (root / "csrc" / "sm90" / "bad.cu").write_text(BAD)
    return root


@pytest.mark.build
def test_bad_kernels_are_found(tmp_path) -> None:
    root = tiny(tmp_path / "checkout")
    done = run(CHECK, "--root", str(root), "--arch", "90a", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    failed = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any(x.startswith("serialised<3> for 90a: serialised ") and "limit 0 (C75" in x for x in failed), failed
    assert any(x.startswith("serialised<3> for 90a: injected ") and "limit 0 (C75" in x for x in failed), failed
    assert "stacked for 90a: stack 256, limit 0" in failed
    assert any(x.startswith("spilled for 90a: spills ") for x in failed)
    table = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1:2] == ["90a"]]
    assert table == ["serialised<3>", "spilled", "stacked", "fine"]  # worst first
    assert not any(x.startswith("fine") for x in failed)


@pytest.mark.build
def test_warnings_are_errors(tmp_path) -> None:
    root = checkout(tmp_path / "checkout")
    with (root / "csrc" / "small" / "merge.cu").open("a") as file:
        file.write("static int unused_function() { return 1; }\n")
    done = run(CHECK, "--root", str(root), "--arch", "80", cwd=tmp_path)
    assert done.returncode == 1 and "unused_function" in done.stdout and "FAILED compiling csrc/small" in done.stdout


@pytest.mark.build
def test_the_builds_own_limits(tmp_path) -> None:
    limits = {**LIMITS, "exceptions": [], "build": dict.fromkeys(check_build.BUILD_METRICS, 0.001)}
    (tmp_path / "limits.json").write_text(json.dumps(limits))
    root = tiny(tmp_path / "checkout")
    done = run(CHECK, "--root", str(root), "--arch", "90a", "--limits", str(tmp_path / "limits.json"), cwd=tmp_path)
    assert done.returncode == 1
    for metric in check_build.BUILD_METRICS:
        assert f"FAILED the build: {metric} " in done.stdout
