"""The soak of benchmarks/soak.py: a short one holds, and one with a leak does not."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import soak
import soak_calls

from seqpar_attn import passes

ARGUMENTS = ["--cpu", "--loopback", "2", "--calls", "24", "--every", "3", "--tokens", "64"]


def test_a_short_soak_holds(tmp_path, capsys):
    assert soak.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "soak-loopback-2.json").read_text())
    assert [x["call"] for x in found["samples"]] == list(range(3, 25, 3))
    assert all(set(x["checks"]) == {"out", "dq", "dk", "dv"} for x in found["samples"])
    assert all(x["holds"] for x in found["verdicts"])
    assert (tmp_path / "soak-loopback-2.md").read_text().strip() in capsys.readouterr().out


def test_a_leak_is_found(tmp_path, monkeypatch):
    kept, end = [], passes.Pass.end

    def leak(self):
        kept.append(torch.ones(1 << 22))  # 16 MiB per pass
        end(self)

    monkeypatch.setattr(passes.Pass, "end", leak)
    assert soak.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    verdicts = json.loads((tmp_path / "soak-loopback-2.json").read_text())["verdicts"]
    assert [x["rule"] for x in verdicts if not x["holds"]] == ["host RSS, MiB, rank 0"]


def sample(call, *, rss=(100, 100), error=1.0, broken=None):
    check = {"roundings": error, "broken": broken}
    memory = [{"rss": x * soak.MIB, "blocks": 1000} for x in rss]
    return {"call": call, "dtype": "torch.float32", "memory": memory, "checks": {"out": check}}


@pytest.mark.parametrize(
    "change, rule",
    [
        (lambda n: {}, None),
        (lambda n: {"rss": (100, 100 + 10 * n // 4)}, "host RSS, MiB, rank 1"),
        (lambda n: {"rss": (100, 300 if n == 9 else 100)}, None),  # one peak is no leak
        (lambda n: {"error": 1 + n / 4}, "error / epsilon, float32"),
        (lambda n: {"broken": "too far" if n == 3 else None}, "of 64 comparisons, those that break the error rule"),
    ],
    ids=["flat", "leak", "peak", "drift", "wrong"],
)
def test_rules(change, rule):
    samples = [sample(50 * n, **change(n)) for n in range(16)]
    assert [x.rule for x in soak.verdicts(samples) if not x.holds] == ([] if rule is None else [rule])


def test_draws_are_the_same_on_every_rank_and_cover_everything():
    options = soak_calls.Options(300, 50, 7, 256, False, False)
    drawn = [soak_calls.draw(options, 4, call) for call in range(300)]
    assert drawn == [soak_calls.draw(options, 4, call) for call in range(300)]
    methods = {"ring zigzag", "ring contiguous", "ring striped", "dist_flash contiguous"}
    methods |= {f"ulysses {layout}" for layout in soak_calls.RING_LAYOUTS}
    assert {kind for problem in drawn for kind in problem.kinds} == methods | set(soak_calls.MASKS) | {"softcap"}
    assert {problem.nheads // problem.nheads_kv for problem in drawn} >= {1, 2, 4, 8}
