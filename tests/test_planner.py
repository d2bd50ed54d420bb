"""The planner: its parts against the package it plans for, its predictions against what was measured, its refusals."""

import json
import math
from pathlib import Path

import pytest
import torch

from seqpar_attn import heads, plan
from seqpar_attn.comm.choice import MEMORY_SHARE
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.layout import get_layout
from seqpar_attn.mask import Mask
from seqpar_attn.passes import Backward, Forward
from seqpar_attn.planner import (
    GPUS,
    LINKS,
    MODELS,
    Model,
    Policy,
    attention,
    attention_cost,
    best_plan,
    from_config,
    longest,
    make_cluster,
    make_plan,
    memory,
    policies,
    predict_memory,
    step,
)
from seqpar_attn.planner.memory import ARENA, ARENA_SHARE
from seqpar_attn.planner.report import amount
from seqpar_attn.schedule import Kind, Rates, simulate_schedule
from seqpar_attn.validation import Call

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
H100 = GPUS["h100-80g"]
LLAMA = MODELS["llama-2-7b"]
EIGHT = make_cluster(8, LINKS["nvlink4"])


# What the planner says again without torch ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "layout"), [("ring", "zigzag"), ("dist_flash", "contiguous")])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_spans_are_those_of_the_layouts(method, layout, world_size):
    assert attention.spans(method, world_size, 6) == get_layout(layout, world_size).chunks(6 * world_size)


@pytest.mark.parametrize("shard", [2048, 16384])
@pytest.mark.parametrize("backward", [False, True])
def test_schedules_are_those_that_are_played(shard, backward):
    played = plan.make_plan("ring", "pull", "zigzag", 4, Mask(4 * shard))
    assert attention.schedule_of("ring", 4, shard, backward) == (played.backward if backward else played.forward)
    played = plan.make_plan("ring", "double", "zigzag", 8, Mask(8 * shard), 4)
    double = attention.schedule_of("double_ring", 8, shard, backward, 4)
    assert double == (played.backward if backward else played.forward)


@pytest.mark.parametrize(("nheads", "nheads_kv"), [(32, 32), (32, 8), (12, 2), (6, 3)])
def test_key_copies_are_those_of_heads(nheads, nheads_kv):
    for ulysses in (n for n in range(1, nheads + 1) if nheads % n == 0):
        expected = heads.key_copies(nheads, nheads_kv, ulysses)
        assert attention.key_copies(nheads, nheads_kv, ulysses) == expected


def test_models_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = pytest.importorskip("one_rank_model")
    for name, model in MODELS.items():
        assert from_config({"model_type": "llama"} | bench.MODELS[name], name) == model
        assert model.flops_per_token(1 << 20) == bench.flops_per_token(bench.MODELS[name], 1 << 20)
        assert model.headdim * model.heads == model.hidden


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("method", ["ring", "dist_flash"])
def test_attention_buffers_are_those_that_are_allocated(method, world_size, kv_heads):
    """Every byte that a pass holds beside its operands and what it returns, on the rank that holds most."""
    model = Model("small", 64, 64, 1, 4, kv_heads, 100, 16)
    tokens = 32
    s = memory._sizes(model, tokens)
    layout = "contiguous" if method == "dist_flash" else "zigzag"
    made = plan.Plan(method, "pull", layout, world_size, Mask(tokens * world_size), 1)
    call = Call(method, "pull", layout, True, None, None, None, 0.25, "reference", False)
    q, k = (torch.zeros(1, tokens, n, 16, dtype=torch.bfloat16) for n in (4, kv_heads))
    lse = torch.zeros(1, 4, tokens)
    for backward, given in ((False, (q, k, k)), (True, (q, k, k, q, lse, q))):
        held = []
        for rank in range(world_size):
            program = made.program(backward, (rank,))
            rest = (made, program, ReferenceKernel(), call, given)
            played = Backward(*rest, wide_keys=False) if backward else Forward(*rest)
            held.append(sum(nbytes for _, nbytes in played.pieces._memory))
        schedule = made.backward if backward else made.forward
        predicted = sum(memory._ring_buffers(s, s.key, schedule, backward).values())
        returned = s.query + 2 * s.key if backward else 0  # dq, dk and dv in bfloat16
        assert predicted - returned == max(held), (backward, held)


def test_runs_of_tiles():
    assert step.runs(Policy(tile_mlp=None), 100) == step.Runs(2, 1)
    assert step.runs(Policy(tile_mlp=100), 100) == step.Runs(2, 1)
    assert step.runs(Policy(tile_mlp=40), 100) == step.Runs(2.8, 1.8)  # the last of 3 tiles is 20
    assert step.runs(Policy(tile_mlp=50), 100) == step.Runs(2.5, 1.5)


# Predictions against measurements ---------------------------------------------------------------------------------


def _stand_ins(model, gpus, tokens, head_groups):
    """Bytes that benchmarks/one_rank.py's sources of transfers take on the measured GPU: one per shape and dtype."""
    shapes = set()
    for backward in (False, True):
        schedule = attention.schedule_of("ring", gpus, tokens, backward)
        for row in schedule.steps:
            for receive in row[gpus // 2].receives:
                shapes.add((schedule.length(receive.block), 2 if receive.kind is Kind.KV else 4))
    return sum(length * itemsize for length, itemsize in shapes) * model.kv_heads // head_groups * model.headdim


def _one_rank_rows():
    """Every row of benchmarks/memory.py that is committed, new ones as well."""
    for path in sorted((RESULTS / "memory").glob("*.json")):
        payload = json.loads(path.read_text())
        for row in [*payload["rows"], *payload.get("longest", {}).get("tried", [])]:
            if "peak_bytes" in row and payload["model"] in MODELS and "H100" in payload["machine"]["gpu"]:
                yield pytest.param(payload, row, id=f"{path.stem}-{amount(row['context'])}")


def _easy_context_rows():
    """Rows of EasyContext's table that were measured (benchmarks/throughput.py --one-rank)."""
    payload = json.loads((RESULTS / "one_rank" / "one_rank.json").read_text())
    for row in payload["rows"]:
        one = row["measured"]
        if "memory_row" in one and not row["data_parallel"] and "H100" in payload["machine"]["gpu"]:
            attention, activations = (x.split()[-1] for x in one["policy"].split(","))
            of_file = {"model": payload["model"], "gpus": payload["gpus"], "tile_mlp": 16384}
            of_file |= {"attention": attention, "activations": activations}
            yield pytest.param(of_file, one["memory_row"], id=f"one_rank-{row['row']}")


ONE_RANK = [*_one_rank_rows(), *_easy_context_rows()]


def test_there_are_measurements():
    assert ONE_RANK


@pytest.mark.parametrize(("payload", "row"), ONE_RANK)
def test_predictions_are_near_one_rank_measurements(payload, row):
    """Memory within 5% and time within 10%, for the H100's built-in rates; the files measure without any waiting."""
    names = ("tile_block", "head_groups", "checkpoint_every", "keep_last")
    options = {name: payload[name] for name in names if name in payload}
    policy = Policy("ring", payload["attention"], payload["activations"], payload["tile_mlp"], **options)
    cluster = make_cluster(payload["gpus"], LINKS["nvlink4"])
    found = make_plan(MODELS[payload["model"]], H100, cluster, row["context"], policy)
    memory = predict_memory(found.model, cluster, policy, found.tokens)  # nothing is received by copy engines
    predicted = memory.total + _stand_ins(found.model, payload["gpus"], found.tokens, options.get("head_groups") or 1)
    # What a benchmark said it held of the row before (results/memory/*.md).
    assert predicted == pytest.approx(row["peak_bytes"] - row.get("left_over_bytes", 0), rel=0.05)
    assert memory.host == pytest.approx(row["host_bytes"], rel=0.01)
    if "step_ms" in row:
        seconds = sum(x for name, x in found.step.parts if not name.startswith("waiting"))
        assert seconds == pytest.approx(row["step_ms"] / 1e3, rel=0.1)
        backward = dict(found.step.parts)["attention, backward"] + dict(found.step.parts)["attention, forward"]
        assert backward == pytest.approx(row["attention_ms"] / 1e3, rel=0.1)


def _real_rows():
    for path in sorted((RESULTS / "throughput").glob("*.json")):
        payload = json.loads(path.read_text())
        for row in payload["rows"]:
            if "peak_bytes" in row and not row["data_parallel"] and row["layers"] == row["of_layers"]:
                yield pytest.param(payload, row, id=f"{path.stem}-{amount(row['context'])}")


@pytest.mark.parametrize(("payload", "row"), list(_real_rows()))
def test_memory_is_near_that_of_real_steps(payload, row):
    """Within 5% on several GPUs. torch does not count the copy engines' slots, which it does not allocate."""
    cluster = make_cluster(payload["gpus"], LINKS["nvlink4"])
    policy = Policy("ring", row["attention"], row["activations"], row["tile_mlp"])
    limit = 80 * 2**30 / 16  # as long as rows did not say their transport
    if "transport" in row:
        limit = math.inf if row["transport"] == "symmetric" else 0
    parts = dict(predict_memory(MODELS[payload["model"]], cluster, policy, row["tokens_per_gpu"], limit).parts)
    assert sum(parts.values()) - parts.get(ARENA, 0) == pytest.approx(row["peak_bytes"], rel=0.05)


def test_copy_engines_slots_are_kept_for_good():
    policy, four = Policy("ring", "save", "keep"), make_cluster(4, LINKS["nvlink4"])
    near, far = (make_plan(LLAMA, H100, four, 4 * n, policy).memory for n in (16384, 131072))
    without = predict_memory(LLAMA, four, policy, 16384)
    assert ARENA_SHARE == MEMORY_SHARE
    assert dict(near.parts)[ARENA] == dict(without.parts)["attention: received"] < 80 * 2**30 / 6
    assert without.total <= near.total, "they are there at every moment"
    assert ARENA not in dict(far.parts) and "attention: received" in dict(far.parts), "NCCL does what would not fit"
    for cluster, method in ((make_cluster(16, LINKS["nvlink4"]), "ring"), (four, "ulysses")):
        assert ARENA not in dict(make_plan(LLAMA, H100, cluster, 1 << 16, Policy(method)).memory.parts)


def test_a_rings_share_is_near_what_was_measured_over_a_link():
    """One rank of 8 whose transfers go over NVLink, from 8192 tokens on."""
    payload = json.loads((RESULTS / "cuda" / "peer" / "ring.json").read_text())
    model = Model("measured", 4096, 1, 1, payload["nheads"], payload["nheads_kv"], 1, payload["headdim"])
    rows = [row for row in payload["rows"] if row["method"] == "zigzag" and row["tokens_per_gpu"] >= 8192]
    assert rows
    for row in rows:
        forward, backward, _ = attention_cost(model, H100, EIGHT, Policy("ring"), row["tokens_per_gpu"])
        for name, cost in (("forward", forward), ("backward", backward)):
            assert cost.total * 1e3 == pytest.approx(max(row[name]["rank_ms"]), rel=0.1), (row["tokens_per_gpu"], name)


def test_built_in_rates_are_those_of_the_files():
    """So that no figure marked as measured differs from what is committed."""
    payload = json.loads((RESULTS / "cuda" / "attention.json").read_text())
    for row in payload["rows"]:
        shape = row["shape"]
        measured = dict(getattr(H100.attention[shape["headdim"]], row["direction"]))
        rate = measured.get(shape["seqlen"])
        if rate is not None and shape["mask"] == "full" and shape["nheads_kv"] == 32:
            assert rate == pytest.approx(row["results"]["cuda"]["tflops"]["median"], abs=0.51), row["case"]
    loss = json.loads((RESULTS / "loss" / "loss.json").read_text())
    for row in loss["linear"]:
        vocab = row["shape"]["vocab"]
        flops = 6 * math.prod(row["shape"].values())
        took = {name: row["results"][name]["ms"]["median"] for name in ("ours_linear_ce", "ours_ce")}
        assert dict(H100.head)[vocab] == pytest.approx(flops / took["ours_linear_ce"] / 1e9, rel=0.002)
        if vocab == 128256:
            (rows,) = (x for x in loss["logits"] if x["shape"]["vocab"] == vocab)
            products = took["ours_ce"] - rows["results"]["ours_ce"]["ms"]["median"]
            assert H100.gemm_tflops == pytest.approx(flops / products / 1e9, rel=0.002)
            assert H100.copy_gbps == pytest.approx(rows["gb_per_s"]["copy of half"], rel=0.01)


# Simulation -------------------------------------------------------------------------------------------------------


def test_a_slower_link_between_nodes_is_priced():
    schedule = attention.schedule_of("ring", 4, 1024, False)
    weights = dict.fromkeys(Kind, 1.0)

    def makespan(between):
        found = simulate_schedule(
            schedule,
            Rates(1e30, weights, 1.0),
            bandwidth=lambda a, b: 1.0 if a // 2 == b // 2 else between,
        )
        return found.makespan

    assert makespan(1.0) == simulate_schedule(schedule, Rates(1e30, weights, 1.0)).makespan
    assert makespan(0.1) > 5 * makespan(1.0)
    assert makespan(10.0) < makespan(1.0)


@pytest.mark.parametrize(("method", "tokens"), [("ring", 4096), ("dist_flash", 16384), ("double_ring", 4096)])
def test_a_large_ring_follows_from_two_smaller_ones(method, tokens, monkeypatch):
    cluster = make_cluster(64, LINKS["nvlink4"])
    estimated = attention_cost(LLAMA, H100, cluster, Policy(method), tokens)
    monkeypatch.setattr(attention, "LARGEST", 64)
    attention.attention_cost.cache_clear()
    simulated = attention_cost(LLAMA, H100, cluster, Policy(method), tokens)
    attention.attention_cost.cache_clear()
    for ours, truth in zip(estimated[:2], simulated[:2]):
        assert ours.compute == pytest.approx(truth.compute, rel=0.02)
        assert ours.total == pytest.approx(truth.total, rel=0.05)


def test_messages_between_other_ranks_do_not_wait_for_each_other():
    """A ring bound by its links takes what its bytes need, with several messages per rank and step as well."""
    world_size, tokens = 16, 4096
    schedule = attention.schedule_of("ring", world_size, tokens, True)
    assert max(len(cell.sends) for row in schedule.steps for cell in row) > 2
    found = simulate_schedule(schedule, Rates(1e30, dict.fromkeys(Kind, 1.0), 1.0))
    received = max(
        sum(schedule.length(t.block) for row in schedule.steps for t in row[rank].receives)
        for rank in range(world_size)
    )
    assert received <= found.makespan < 1.5 * received


def test_faster_links_wait_less_and_double_rings_need_less_of_them():
    cost = {}
    for method in ("ring", "double_ring"):
        for between in ("ib200", "ib400"):
            cluster = make_cluster(32, LINKS["nvlink4"], LINKS[between])
            cost[method, between] = attention_cost(LLAMA, H100, cluster, Policy(method), 8192)[0].exposed
    assert cost["ring", "ib200"] > 1.5 * cost["ring", "ib400"] > 0
    assert cost["double_ring", "ib400"] < 0.2 * cost["ring", "ib400"]


def test_a_ring_over_adapters_waits_below_as_many_tokens_as_theory_says():
    """2.4 g F / B tokens per GPU hide backward's transfers: 12 bytes per key element, 5 operations per pair."""
    model = MODELS["llama-3-8b"]
    cluster = make_cluster(32, LINKS["nvlink4"])
    needed = 2.4 * model.kv_heads / model.heads * 581e12 / (cluster.between.gbps * 1e9)
    for tokens, bound in ((needed / 2, True), (1.5 * needed, False)):
        backward = attention_cost(model, H100, cluster, Policy("ring"), 2 * int(tokens / 2))[1]
        assert (backward.exposed > 0.3 * backward.compute) is bound
        assert bound or backward.exposed < 0.05 * backward.compute


def test_scale_is_what_its_script_computes(monkeypatch):
    """Some rows of the committed result, again: run benchmarks/scale.py if this fails."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    payload = json.loads((RESULTS / "scale" / "llama-3-8b-ib400.json").read_text())
    checked = 0
    for row in payload["rows"]:
        assert row["predicted"] is True
        gpus, context, method = (row[key] for key in ("gpus", "context", "method"))
        if context == 1 << 20 and gpus in (8, 16) and method != "usp":
            plan = scale.predict(MODELS["llama-3-8b"], H100, gpus, context, method, "ib400")
            found = scale.row(plan, gpus, context, method)
            for key in ("tokens_per_second", "memory_gib"):
                assert found[key] == pytest.approx(row[key], rel=1e-6), row
            checked += 1
    assert checked == 6


def test_plans_of_one_gpu_move_nothing():
    found = make_plan(LLAMA, GPUS["h200"], make_cluster(1, LINKS["nvlink4"]), 65536, Policy())
    assert found.step.transfers == 0 and found.step.hidden_share == 1.0
    assert not any(name.startswith("waiting for the ring") for name, _ in found.step.parts)


def test_recomputing_costs_time_and_saves_memory():
    plans = {a: make_plan(LLAMA, H100, EIGHT, 1 << 19, Policy(attention=a)) for a in ("save", "offload", "recompute")}
    saved, offloaded, again = plans.values()
    assert again.step.total > 1.15 * saved.step.total
    assert offloaded.memory.total < 0.75 * saved.memory.total
    assert offloaded.memory.host > saved.memory.host > 0


def test_blocks_in_stages_hold_few_units_of_hidden_states():
    """The bytes per token of docs/memory.md: 6.8 hidden states for Llama-3-8B with every key head by itself."""
    llama = MODELS["llama-3-8b"]
    policy = Policy("ring", "recompute", "offload", None, tile_block=8192, head_groups=8)
    sizes = [predict_memory(llama, EIGHT, policy, n) for n in (450000, 460000)]
    assert {x.moment for x in sizes} == {"attention's backward, first block"}
    units = (sizes[1].total - sizes[0].total) / 10000 / (2 * llama.hidden)
    rows, rotary, group = 1 / 64, 1 / 16, (4 + 24 / 4 + 1 / 64) / 8
    assert units == pytest.approx(2 + 2 + 1 + 2 * rows + rotary + 2 / 4 + group, rel=1e-3)
    every = Policy(
        "ring", "recompute", "offload", None, tile_block=8192, head_groups=8, checkpoint_every=2, keep_last=2
    )
    assert predict_memory(llama, EIGHT, every, 450000).host == sizes[0].host * 15 / 32
    assert make_plan(llama, H100, EIGHT, 3700000, policy).fits
    with pytest.raises(ValueError, match="expected head_groups to divide 8 key heads, got 3"):
        make_plan(llama, H100, EIGHT, 3700000, Policy(tile_mlp=None, tile_block=8192, head_groups=3))


# Choosing ---------------------------------------------------------------------------------------------------------


def test_the_best_plan_is_the_fastest_that_fits():
    choices = policies(MODELS["llama-3-8b"], 8)
    assert {p.method for p in choices} == {"ring", "dist_flash", "ulysses", "usp"}
    assert {p.method for p in policies(MODELS["llama-3-8b"], 16)} - {p.method for p in choices} == {"double_ring"}
    best = best_plan(MODELS["llama-3-8b"], H100, EIGHT, 1 << 20, choices)
    assert best.fits
    for policy in choices:
        other = make_plan(MODELS["llama-3-8b"], H100, EIGHT, 1 << 20, policy)
        assert not other.fits or other.step.total >= best.step.total


def test_the_longest_context_fits_and_a_longer_one_does_not():
    most = longest(LLAMA, H100, EIGHT, Policy())
    assert most > 1 << 19
    assert make_plan(LLAMA, H100, EIGHT, most, Policy()).fits
    assert not make_plan(LLAMA, H100, EIGHT, int(1.04 * most), Policy()).fits


def test_memory_grows_with_tokens_and_falls_with_gpus():
    sizes = [predict_memory(LLAMA, EIGHT, Policy(), n).total for n in (8192, 16384, 32768)]
    assert sizes == sorted(sizes)
    sixteen = make_cluster(16, LINKS["nvlink4"])
    assert predict_memory(LLAMA, sixteen, Policy(), 8192).total < sizes[0]
