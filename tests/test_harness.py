"""The benchmarks' harness: other schemas are refused, rows say how they are known, tables are those of the files."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import files  # noqa: E402
import readme  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402
import throughput_one_rank as one_rank  # noqa: E402

from seqpar_attn.planner import GPUS, MODELS, calibration, from_config  # noqa: E402
from seqpar_attn.planner.hardware import of_device  # noqa: E402

ATTENTION = files.RESULTS / "cuda" / "attention.json"
OLDER = {"ring.json", "ranks/ranks-2.json"}  # than their schemas
APART = {"extend/summary.json"}  # of an example


# Tables in README and docs ----------------------------------------------------------------------------------------


def test_tables_are_those_of_the_files():
    assert not readme.differences(), "run python3 benchmarks/readme.py"


def test_pictures_are_those_of_the_files():
    pytest.importorskip("matplotlib")
    assert not readme.stale(), "run python3 benchmarks/readme.py"


@pytest.mark.parametrize("text", ["<!-- figures: no-such -->\n<!-- /figures -->", "<!-- figures: loss -->\n"])
def test_broken_markers_are_refused(text):
    with pytest.raises(ValueError, match=r"expected (pairs of )?figures"):
        readme.filled(text, "page")


# Files and rows ---------------------------------------------------------------------------------------------------


def committed():
    for path in sorted(files.RESULTS.rglob("*.json")):
        name = path.relative_to(files.RESULTS).as_posix()
        if name not in APART:
            yield pytest.param(path, name in OLDER, id=name)


@pytest.mark.parametrize(("path", "older"), list(committed()))
def test_committed_results_can_be_read_or_are_refused(path, older):
    payload = json.loads(path.read_text())
    if older:
        assert "schema" not in payload
        for part in files.SCHEMAS:
            with pytest.raises(ValueError, match="measure again"):
                files.read(path, part)
        return
    part = payload["part"]
    files.read(path, part)
    if part in rows.READERS:
        found = rows.rows_of(payload)
        assert found and rows.table(found)
        assert len(rows.lines(path, part)) == len(found)
        kinds = {row.kind for row in found}
        assert kinds <= set(rows.KINDS) and (part != "scale" or kinds == {"predicted"})


def test_another_file_is_refused(tmp_path):
    payload = json.loads(ATTENTION.read_text())
    first, *_ = payload["rows"]
    wrong = {
        "got 'attention' with schema 2": payload | {"schema": 2},
        "got 'loss' with schema 1": payload | {"part": "loss"},
        "got None with schema None": {k: v for k, v in payload.items() if k not in ("schema", "part")},
        "got no skipped": {k: v for k, v in payload.items() if k != "skipped"},
        r"got no ratios in rows\[0\]": payload | {"rows": [{k: v for k, v in first.items() if k != "ratios"}]},
    }
    path = tmp_path / "attention.json"
    for message, content in wrong.items():
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            files.read(path, "attention")
    with pytest.raises(ValueError, match="got no machine"):
        files.write(tmp_path, "attention", {"rows": []}, "")
    with pytest.raises(ValueError, match="expected kind"):
        rows.Row("attention", "", "", "", "", "guessed", 1.0)


def test_what_is_written_is_read(tmp_path):
    payload = json.loads(ATTENTION.read_text())
    settings = {key: payload.pop(key) for key in ("schema", "part")}
    files.write(tmp_path, "attention", payload, "text")
    path = tmp_path / "attention.json"
    assert path.read_text() == ATTENTION.read_text()
    assert files.known(path, "attention", settings | {"skipped": {}}) is not None
    assert files.known(path, "attention", {"skipped": {"x": "y"}}) is None
    assert files.known(tmp_path / "none.json", "attention", {}) is None


def test_absent_peers_are_said():
    skipped = {"fa4, S64": "ModuleNotFoundError: No module named 'flash_attn'", "flex, S64": "ValueError: no"}
    first, second = rows.missing({"skipped": skipped})
    assert first.startswith("not measured: fa4, S64: not installed") and second.endswith("flex, S64: ValueError: no")


def test_calibration_has_one_schema():
    assert files.SCHEMAS["calibrate"].version == calibration.SCHEMA


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),  # another peak
        ("NVIDIA GH200 480GB", None),
        ("", None),
    ],
)
def test_gpus_by_their_devices(name, gpu):
    assert of_device(name) == (GPUS[gpu] if gpu else None)


# run.py -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """run.main over parts that only copy a committed file; what was played, and with which status parts end."""
    played, status = [], {}
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    header = {"commit": "abc", "dirty": False}
    monkeypatch.setattr(run, "machine", lambda: dict(header))
    monkeypatch.setattr(run, "describe", str)
    monkeypatch.setattr(run, "draw", lambda *_: None)

    def play(command, log, limit):
        name = log.parent.name
        played.append(name)
        log.write_text("log\n")
        source = {"attention": ATTENTION, "loss": files.RESULTS / "loss" / "loss.json"}[name]
        shutil.copy(source, log.parent)
        return status.get(name, 0)

    monkeypatch.setattr(run, "play", play)

    def go(*more):
        played.clear()
        code = run.main(["--out", str(tmp_path), "--parts", "attention", "loss", *more])
        return code, list(played)

    return go, status, header, tmp_path


def test_parts_are_resumed(harness, capsys):
    go, status, header, out = harness
    status["loss"] = 1
    assert go("--quick") == (1, ["attention", "loss"])
    status.clear()
    assert go("--quick") == (0, ["loss"])  # what failed, once more
    assert go("--quick") == (0, [])
    assert "there already, of commit abc" in capsys.readouterr().out
    assert go("--quick", "--again") == (0, ["attention", "loss"])
    assert go() == (0, ["attention", "loss"])  # other arguments
    header["commit"] = "def"
    assert go() == (0, ["attention", "loss"])
    path = out / "attention" / "attention.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0', 1))
    assert go() == (0, ["attention"])
    header["dirty"] = True
    assert go() == (0, ["attention", "loss"])
    lines = [json.loads(x) for x in (out / "rows.jsonl").read_text().splitlines()]
    assert {x["part"] for x in lines} == {"attention", "loss"}
    assert all(x["kind"] in rows.KINDS and x["commit"] and x["schema"] == 1 for x in lines)
    assert "## loss" in (out / "report.md").read_text()
    (out / "run.json").write_text('{"schema": 99}')
    assert go() == (2, [])


def test_parts_without_time_are_said(harness, capsys):
    go, _, _, _ = harness
    assert go("--quick", "--total", "40") == (3, ["loss"])  # attention takes longer
    assert "attention: not started" in capsys.readouterr().out
    assert go("--quick", "--total", "100") == (0, ["attention"])


def test_list_knows_every_part(capsys):
    assert run.main(["--list"]) == 0
    out = capsys.readouterr().out
    for part in run.PARTS:
        assert f"| {part.name} " in out
        assert part.name in files.SCHEMAS and part.name in rows.READERS
        assert (ROOT / "benchmarks" / f"{part.script}.py").exists()
        assert set(part.arguments) == set(run.MODES)
    assert sum(part.seconds[0] for part in run.PARTS) < 480


def test_a_part_beyond_its_limit_is_ended(tmp_path):
    start = time.monotonic()
    code = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]
    assert run.play(code, tmp_path / "log.txt", 1.0) == 124
    assert time.monotonic() - start < 15


# One rank of 8 ----------------------------------------------------------------------------------------------------


def test_one_rank_adds_what_other_gpus_make_it_wait(monkeypatch):
    model, gpu, row = MODELS["llama-2-7b"], GPUS["h100-80g"], one_rank.ROWS[3]
    tried = []

    def measure(model, gpu, policy, row, a, limit):
        tried.append(policy)
        if len(tried) == 1:
            return {"failed": "out of memory"}
        return {"policy": one_rank.say(policy), "compute_s": 60.0}

    monkeypatch.setattr(one_rank, "measure", measure)
    a = argparse.Namespace(peak=989.0, gpu_name="NVIDIA H100 80GB HBM3", dry_run=False)
    found = one_rank.attempt(model, gpu, row, a, time.monotonic() + 1e4)
    assert len(tried) == 2 and tried[0] != tried[1]
    assert found["kind"] == "computed" and found["step_s"] == pytest.approx(60.0 + sum(found["waits_s"].values()))
    assert found["tokens_per_second"] == pytest.approx(524288 / found["step_s"])
    flops = model.flops_per_token(524288) * found["tokens_per_second"]
    assert found["mfu"] == pytest.approx(flops / (8 * 989e12))
    assert abs(found["model_error"]) < 0.1
    assert one_rank.attempt(model, gpu, row, a, time.monotonic() + 10) is None  # it would not end in time


def test_one_rank_is_a_process_of_memory():
    """Without times, which only a GPU has: memory.py knows the options, and what it writes is read."""
    model = from_config({"model_type": "llama"} | one_rank.MODELS["tiny"], "tiny")
    row = one_rank.Row("row", 64, data_parallel=True)
    policy = one_rank.choices(model, GPUS["h100-80g"], row)[0]
    a = argparse.Namespace(dry_run=True)
    found = one_rank.measure(model, GPUS["h100-80g"], policy, row, a, 120.0)
    assert found == {"failed": "no times in a rehearsal"}


def test_data_parallel_ranks_attend_alone():
    model, gpu, row = MODELS["llama-2-7b"], GPUS["h100-80g"], one_rank.ROWS[0]
    policy = one_rank.choices(model, gpu, row)[0]
    alone = one_rank.parts_of(model, gpu, policy, row)
    ring = one_rank.parts_of(model, gpu, policy, one_rank.Row("", row.tokens))
    assert alone["attention, forward"] == pytest.approx(ring["attention, forward"] / 8, rel=0.05)
    assert alone["optimizer"] == ring["optimizer"] and "waiting for the ring" not in alone


def test_every_row_is_above_easy_context():
    """The bar: a higher MFU than EasyContext's in every row, of what was measured and of what is predicted."""
    payload = files.read(files.RESULTS / "one_rank" / "one_rank.json", "one_rank")
    assert [x["row"] for x in payload["rows"]] == [x.name for x in one_rank.ROWS]
    for row in payload["rows"]:
        ours = [x["mfu"] for x in (row["measured"], *row["predictions"]) if "mfu" in x]
        assert not row["theirs"] or min(ours) > row["theirs"][1], row["row"]
        assert all(x["kind"] == "predicted" and x["note"] for x in row["predictions"])
