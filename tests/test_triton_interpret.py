"""The Triton kernels on the CPU. Triton reads TRITON_INTERPRET when it is first imported, so they get a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.timeout(900)  # six minutes of processor time on a slow machine
@pytest.mark.parametrize("which", ["pointers", "loss", "not pointers and not loss"])
def test_interpreter(which: str) -> None:
    pytest.importorskip("triton")
    chosen = ["-k", which, str(TESTS / "interpreter")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
