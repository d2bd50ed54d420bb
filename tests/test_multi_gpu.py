"""The benchmarks for several GPUs, rehearsed on a CPU: what the first run on real ones must not stumble over."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import flash_attn_stand_in as stand_in  # noqa: E402
import ranks  # noqa: E402
import step_parts  # noqa: E402
import throughput  # noqa: E402
from one_rank_model import MODELS  # noqa: E402
from rank_contenders import Problem  # noqa: E402

LLAMA = dict(MODELS["llama-2-7b"])
GIB = 2**30


def rehearse(script: str, out: Path, *more: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--out", str(out), "--dry-run", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / f"dry-{script}-2.md").read_text().startswith("REHEARSAL")
    return json.loads((out / f"dry-{script}-2.json").read_text())


def test_ranks(tmp_path):
    found = rehearse("ranks", tmp_path, "--gpus", "2")
    assert [x["tokens_per_gpu"] for x in found["lengths"]] == [64]
    for length in found["lengths"]:
        methods = {x["method"] for x in length["rows"]}
        assert methods >= {"zigzag", "dist_flash", "ulysses"}
        assert "usp" in length["absent"]  # two ranks are no grid
        peers = {"ring-flash-attention zigzag", "torch context_parallel, all-gather"}
        assert peers <= methods | set(length["absent"])  # each takes part, or it is said why not
        assert all(max(x) < 2e-2 for x in length["checks"].values())
        assert {"dist_flash", "ulysses", "one GPU"} <= set(length["checks"])
        assert all("not_waited_for" in x for x in length["rows"] if x["method"] == "zigzag")
    settings = {key: value for key, value in found.items() if key != "lengths"}
    path = tmp_path / "dry-ranks-2.json"
    assert ranks.earlier(path, settings) == found  # another run would have nothing left to do
    assert ranks.earlier(path, settings, [64])["lengths"] == []
    assert ranks.earlier(path, settings | {"nheads": 8})["lengths"] == []


def test_throughput(tmp_path):
    found = rehearse("throughput", tmp_path, "--gpus", "2", "--rows", "64K")
    assert [(x["row"], x["context"], x["activations"]) for x in found["rows"]] == [("64K", 64, "offload")]
    assert all(x["step_s"] > 0 and len(x["losses"]) == 2 for x in found["rows"])


@pytest.mark.parametrize("causal", [False, True])
def test_stand_in_for_flash_attn(causal):
    """As ring-flash-attention calls it: results and gradients of grouped heads, gradients in parts of buffers."""
    torch.manual_seed(0)
    q, dout = torch.randn(2, 1, 24, 4, 16)
    k, v = torch.randn(2, 1, 24, 2, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    given = dict(dropout_p=0.0, softmax_scale=0.25, causal=causal)
    out, lse, _, _ = stand_in._flash_attn_forward(q, k, v, **given)
    assert lse.shape == (1, 4, 24)
    torch.testing.assert_close(out, expected.detach())
    buffers = [torch.full((1, 48, *x.shape[2:]), 7.0) for x in (q, k, v)]
    parts = [x[:, :24] for x in buffers]
    stand_in._flash_attn_backward(dout, q, k, v, out, lse, *parts, **given)
    for part, buffer, grad in zip(parts, buffers, torch.autograd.grad(expected, leaves, dout)):
        torch.testing.assert_close(part, grad)
        assert (buffer[:, 24:] == 7.0).all()
    with pytest.raises(ValueError, match="expected plain attention"):
        stand_in._flash_attn_forward(q, k, v, **given, softcap=3.0)


def test_rows():
    """Two rounds of two ranks, by hand: the slowest rank of a round counts."""

    def rank(zigzag, alone, moved, waited):
        def times(x, what=""):
            host = {"host forward": [0.1, 0.1], "host backward": [0.2, 0.2]}
            return {f"{what}forward": [x, x], f"{what}backward": [2 * x, 2 * x], **host}

        extra = {"zigzag, computation alone": times(alone), "zigzag, transfers alone": times(moved)}
        extra["zigzag, watched alone"] = times(waited, "waited ")
        return {"times": {"one GPU": times(8.0), "zigzag": times(zigzag), **extra}, "single_tokens": 16}

    problem = Problem(16, 2, 2, 8, torch.bfloat16, "auto")
    found = ranks.rows([rank(20.0, 19.0, 2.0, 0.5), rank(18.0, 16.0, 4.0, 0.25)], problem)
    both = next(x for x in found if x["direction"] == "both")
    assert both["ideal"] == "computed"  # one GPU attended 16 of 32 tokens
    assert both["host_ms"] == pytest.approx(0.3)
    assert both["ideal_ms"] == pytest.approx(24.0 * 4 / 2) and both["slowest_ms"]["median"] == 60.0
    assert both["of_ideal"] == pytest.approx(0.8)
    assert both["waiting_ms"] == pytest.approx(1.5)
    assert both["not_waited_for"] == pytest.approx(1 - 1.5 / 12.0)


@pytest.mark.parametrize(
    "tokens, gpus, expected",
    [
        (89600, 8, ("save", "offload", 32)),  # as was measured
        (8192, 8, ("save", "keep", 32)),
        (89600, 2, ("save", "offload", 16)),  # 27 GiB of states and not 54
    ],
)
def test_policy(tokens, gpus, expected):
    first = throughput.choose(LLAMA, tokens, gpus, 74 * GIB, 200 * GIB, None)[0]
    assert (first.attention, first.activations, first.layers) == expected


def test_estimate_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks/results/memory/llama-2-7b-save-offload.json").read_text())
    row = next(x for x in measured["rows"] if x["context"] == 700 << 10)
    policy = throughput.Policy("save", "offload", 32)
    assert throughput.estimate(LLAMA, policy, 89600, 8) == pytest.approx(row["peak_bytes"], rel=0.05)
    assert throughput.host_bytes(LLAMA, policy, 89600) == pytest.approx(row["host_bytes"], rel=0.05)


def test_host_memory_limits_offloading():
    policies = throughput.choose(LLAMA, 131072, 8, 74 * GIB, 450 * GIB, None)
    assert [x.attention for x in policies] == ["recompute"]


def test_next_policy_after_out_of_memory(monkeypatch):
    """A row that ran out of memory tries the next policy, and another run starts with that one."""
    a = argparse.Namespace(model="llama-2-7b", peak=989.0, steps=2, profile=False)
    row, tried = throughput.ROWS[4], []
    policies = [throughput.Policy(x, "offload", 32) for x in ("save", "offload")]
    ran = []

    def launch(row, policy, gpus, a, steps, limit):
        ran.append((policy.attention, steps))
        return {"failed": "out of memory"} if policy.attention == "save" else {"step_s": 1.0}

    monkeypatch.setattr(throughput, "launch", launch)
    now = throughput.time.monotonic()
    assert throughput.attempt(row, policies, 8, a, now + 1e4, tried)[0].attention == "offload"
    assert throughput.attempt(row, policies, 8, a, now + 300, tried)[0].attention == "offload"
    assert throughput.attempt(row, policies, 8, a, now + 100, tried) is None  # two steps take longer
    assert ran == [("save", 2), ("offload", 2), ("offload", 1)]


def test_parts_of_a_step():
    def event(name, begin, length, cat="kernel"):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin * 1e6, "dur": length * 1e6}

    found = step_parts.parts(
        [
            event("void seqpar::sm90::forward_kernel<128>", 0, 4),
            event("nvjet_hsh_192x192", 4, 2),
            event("ncclDevKernel_SendRecv", 3, 5),  # two of them beside others, one alone with a copy, two alone
            event("Memcpy DtoH (Device -> Pinned)", 7, 4, "gpu_memcpy"),
            event("elementwise_kernel", 10, 1),
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1e9},
        ]
    )
    assert found["attention"] == 4 and found["matrix products"] == 2 and found["elementwise"] == 1
    assert found["NCCL"] == 5 and found["NCCL and nothing else"] == 2 and found["copies to and from the host"] == 4
    assert found["all"] == 11 and found["nothing"] == 2
