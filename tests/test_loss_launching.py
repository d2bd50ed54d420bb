"""Launching by address: what was compiled once is launched again only for arguments that it was compiled for."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from seqpar_attn.loss.triton import launching

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Kernel:
    """Counts how often Triton would have been asked, and keeps what the driver gets."""

    def __init__(self) -> None:
        self.arg_names = ["x", "y", "stride", "tokens", "FLAG", "BLOCK"]
        self.params = [SimpleNamespace(is_constexpr=name.isupper()) for name in self.arg_names]
        self.asked: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.asked.append((grid, arguments, options))
            return SimpleNamespace(
                run=lambda *given: self.launched.append(given), function="function", packed_metadata="metadata"
            )

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_compiled", {})
    return Kernel()


def test_the_second_launch_goes_to_the_driver(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    launching.launch(kernel, 3, (x, y), (16,), (7,), (True, 128), num_warps=8)
    assert kernel.asked == [((3,), (x, y, 16, 7), {"FLAG": True, "BLOCK": 128, "num_warps": 8})]
    a, b = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    launching.launch(kernel, 5, (a, b), (16,), (9,), (True, 128), num_warps=8)
    assert len(kernel.asked) == 1
    nothing = (None, None, None)
    assert kernel.launched == [
        (5, 1, 1, "stream of -1", "function", "metadata", *nothing, a.data_ptr(), b.data_ptr(), 16, 9, True, 128)
    ]


def test_what_is_compiled_for_is_looked_at(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    usual: dict[str, Any] = dict(arrays=(x, y), numbers=(16,), constants=(True, 128), num_warps=8)
    others = [
        dict(arrays=(x[1:], y)), dict(arrays=(x, y[1:])), dict(arrays=(x[1:], y[1:])), dict(arrays=(x.long(), y)),
        dict(arrays=(x, y.float())), dict(numbers=(17,)), dict(constants=(False, 128)), dict(constants=(True, 64)),
        dict(num_warps=4),
    ]  # fmt: skip
    for times in (1, 2):
        for changed in ({}, *others):
            launching.launch(kernel, 1, variables=(7,), **{**usual, **changed})
        assert len(kernel.asked) == 1 + len(others) and len(kernel.launched) == (times - 1) * (1 + len(others))
