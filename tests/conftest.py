"""One thread per process, a fresh seed per test (printed when the test fails), and no GPU tests without a GPU,
no tests of compiling without nvcc."""

import os
import random
from collections.abc import Generator
from typing import Any

import pytest
import torch

from seqpar_attn.kernels.cuda import building

try:
    import hypothesis
except ImportError:  # test modules that need it skip themselves
    pass
else:
    hypothesis.settings.register_profile("seqpar_attn", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("seqpar_attn")

_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: two processes would wait for one of them at the end.
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout") if mark.args), default=0))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
    if any(item.get_closest_marker("build") for item in items) and (reason := building.nvcc_missing()) is not None:
        for item in items:
            if item.get_closest_marker("build"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    given = os.environ.get("SEQPAR_ATTN_TEST_SEED")
    seed = int(given) if given else int.from_bytes(os.urandom(4), "little")
    item.stash[_SEED] = seed
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):  # many test processes share one GPU
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"SEQPAR_ATTN_TEST_SEED={item.stash.get(_SEED, None)}"))
    return report
