"""The planner's command, its calibration files, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar_attn import __main__
from seqpar_attn.planner import (
    GPUS,
    LINKS,
    MODELS,
    Policy,
    best_plan,
    calibration,
    find_gpu,
    find_link,
    find_model,
    make_cluster,
    make_plan,
    policies,
    read_calibration,
)
from seqpar_attn.planner.report import amount, parse_amount

ROOT = Path(__file__).parent.parent
H100 = GPUS["h100-80g"]
LLAMA = MODELS["llama-2-7b"]
EIGHT = make_cluster(8, LINKS["nvlink4"])


# Calibration files ------------------------------------------------------------------------------------------------


def test_a_calibration_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(calibration.to_json(H100, {"gpu": "test"})))
    found = read_calibration(path)
    for field in dataclasses.fields(H100):
        assert getattr(found, field.name) == getattr(H100, field.name), field.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 1, got 2"),
        ({"schema": None}, "schema 1, got None"),
        ({"gemm_tflops": None}, "TypeError"),
        ({"gemm_tflops": -1}, "positive rates"),
        ({"attention": {}}, "0 for attention"),
        ({"head": []}, r"list of \[size, rank\]".replace("rank", "rate")),
        ({"head": [[2, 1.0], [1, 1.0]]}, "growing sizes"),
    ],
)
def test_another_file_is_refused(tmp_path, change, message):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(calibration.to_json(H100, {}) | change))
    with pytest.raises(ValueError, match=message):
        read_calibration(path)


def test_calibrate_writes_what_plans_read(tmp_path):
    path = tmp_path / "mine.json"
    script = ROOT / "benchmarks" / "calibrate.py"
    options = ("--dry-run", "--headdims", "16", "--out", str(path))
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = read_calibration(path)
    assert "dry run" in found.name and list(found.attention) == [16]
    assert all(len(curve) == 2 for curve in (found.attention[16].forward, found.attention[16].backward, found.head))
    assert "backend reference" in found.sources["attention"]
    payload = json.loads(path.read_text())
    assert payload["part"] == "calibrate" and path.with_suffix(".md").exists()
    rates = {"gemm_tflops", "copy_gbps", "host_gbps", "head 100", "attention 16 backward 64"}
    assert rates <= set(payload["spread"])
    assert all(low <= high for low, high in payload["spread"].values())


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: write one with python3 benchmarks/calibrate.py"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="to be JSON"):
        read_calibration(tmp_path / "broken.json")


# Bad input --------------------------------------------------------------------------------------------------------


def test_what_is_unknown_is_refused_with_what_is_possible(tmp_path):
    with pytest.raises(ValueError, match="llama-2-7b, llama-2-13b, llama-3-8b, a folder"):
        find_model("gpt")
    with pytest.raises(ValueError, match=r"h100-80g, a100-80g, h200, got 'b200': .* benchmarks/calibrate.py"):
        find_gpu("b200")
    with pytest.raises(ValueError, match="nvlink4, nvlink3, ib400"):
        find_link("pcie")
    with pytest.raises(ValueError, match=r"whole nodes of 8 GPUs, got 12 GPUs: use 8 or 16"):
        make_cluster(12, LINKS["nvlink4"])
    with pytest.raises(ValueError, match="expected method to be one of ring"):
        Policy("zigzag")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ValueError, match="llama, mistral"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ValueError, match="intermediate_size, num_hidden_layers"):
        find_model(str(tmp_path / "config.json"))


def test_heads_that_do_not_divide_are_refused():
    model = MODELS["llama-2-13b"]
    sixteen = make_cluster(16, LINKS["nvlink4"])
    with pytest.raises(ValueError, match=r"one of 1, 2, 4, 8 for 40 heads on 16 GPUs, got 16: or choose method 'ring'"):
        make_plan(model, H100, sixteen, 1 << 18, Policy("ulysses"))
    assert "ulysses" not in {p.method for p in policies(model, 16)}
    with pytest.raises(ValueError, match="choose 'ring'"):
        policies(model, 7, "usp")


def test_a_context_that_fits_nowhere_says_what_would():
    with pytest.raises(ValueError, match=r"up to \d+ tokens should fit") as error:
        best_plan(LLAMA, H100, EIGHT, 1 << 24, policies(LLAMA, 8))
    most = int(str(error.value).split("up to ")[1].split()[0])
    assert best_plan(LLAMA, H100, EIGHT, most, policies(LLAMA, 8)).fits
    with pytest.raises(ValueError, match="no context fits: use more GPUs"):
        best_plan(LLAMA, H100, make_cluster(1, LINKS["nvlink4"]), 1 << 20, policies(LLAMA, 1))


def test_amounts():
    assert parse_amount("700k") == 716800 and parse_amount("1.5M") == 3 << 19 and parse_amount("77") == 77
    assert amount(716800) == "700K" and amount(1 << 20) == "1M" and amount(1000) == "1000"
    for text in ("", "k", "many", "-1", "1g"):
        with pytest.raises(ValueError, match="tokens"):
            parse_amount(text)


# The command ------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = __main__.main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_a_plan(capsys):
    code, out, _ = run(capsys, "--model", "llama-2-7b", "--context", "700k", "--method", "ring")
    assert code == 0
    for text in ("PREDICTED", "fits", "tokens/s, predicted", "MFU of 989", "longest context", "assumed", "measured"):
        assert text in out
    code, out, _ = run(capsys, "--model", "llama-2-7b", "--context", "700k", "--json")
    found = json.loads(out)
    assert found["predicted"] is True
    assert found["step_total"] == pytest.approx(sum(found["step"].values()))
    assert found["tokens_per_second"] == pytest.approx(716800 / found["step_total"])


def test_the_command_says_when_a_fixed_policy_does_not_fit(capsys):
    fixed = ("--method", "ring", "--attention", "save", "--activations", "keep", "--tile-mlp", "none")
    code, out, _ = run(capsys, "--model", "llama-2-7b", "--context", "4m", *fixed)
    assert code == 1 and "DOES NOT FIT" in out


def test_the_command_reads_a_configuration_and_a_calibration(capsys, tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(
        json.dumps(
            sizes | {"model_type": "mistral", "vocab_size": 32000, "num_key_value_heads": 4, "sliding_window": 4096}
        )
    )
    (tmp_path / "gpu.json").write_text(json.dumps(calibration.to_json(dataclasses.replace(H100, name="mine"), {})))
    arguments = ("--model", str(tmp_path), "--calibration", str(tmp_path / "gpu.json"), "--context", "128k")
    code, out, _ = run(capsys, *arguments, "--method", "ring")
    assert code == 0 and "8 x mine" in out and "planned as full causal" in out


def test_the_sweep_is_a_table_and_a_picture(capsys, tmp_path):
    picture = tmp_path / "sweep.png"
    drawing = ("--plot", str(picture)) if _matplotlib() else ()
    choices = ("--method", "ring", "--activations", "offload")
    code, out, _ = run(capsys, "--model", "llama-2-7b", *choices, "--sweep", "64k", "1m", "64m", *drawing)
    assert code == 0 and "PREDICTED" in out
    assert out.splitlines()[-1].split() == ["64M", "does", "not", "fit"]
    assert not drawing or picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_says_what_does_not_fit_and_what_cannot_be(capsys):
    choices = ("--model", "llama-2-13b", "--method", "ring", "--json", "--sweep", "64m")
    code, out, _ = run(capsys, *choices)
    assert code == 1 and json.loads(out) == [{"predicted": True, "context": 64 << 20, "fits": False}]
    code, out, err = run(capsys, "--model", "llama-2-13b", "--gpus", "16", "--method", "ulysses", "--sweep", "64k")
    assert code == 2 and not out and "one of 1, 2, 4, 8 for 40 heads" in err


def _matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt", "--context", "1m"), "expected model"),
        (("--model", "llama-2-7b"), "expected --context"),
        (("--model", "llama-2-7b", "--context", "x"), "such as 65536"),
        (("--model", "llama-2-7b", "--context", "1m", "--calibration", "nowhere.json"), "does not exist"),
        (("--model", "llama-2-7b", "--context", "1m", "--gpu", "h200", "--calibration", "x.json"), "got both"),
        (("--model", "llama-2-7b", "--context", "1m", "--gpu", "b200"), "h100-80g, a100-80g, h200"),
        (("--model", "llama-2-13b", "--context", "1m", "--gpus", "16", "--method", "ulysses"), "one of 1, 2, 4, 8"),
        (("--model", "llama-2-7b", "--context", "1m", "--gpus", "0"), "at least 1"),
        (("--model", "llama-2-7b", "--context", "99m"), "should fit"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_the_planner_needs_no_torch():
    code = (
        "import sys, types, importlib; package = types.ModuleType('seqpar_attn');"
        f"package.__path__ = [{str(ROOT / 'seqpar_attn')!r}]; sys.modules['seqpar_attn'] = package;"
        "planner = importlib.import_module('seqpar_attn.planner');"
        "print(len(planner.MODELS), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["3", "False"], done.stderr
