"""examples/train.py: what it trains is what one process trains, resumed or not; and what its data promise."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from seqpar_attn.testing.distributed import RankPool

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train import main
from training import checkpoint, data, options, pose, sources

SEQLEN = 48


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=200) as pool:
        yield pool


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama's configuration (tied, as small models are), text and conversations."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("home")
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps over the lazy dog. " * (5 + i))
    with open(folder / "chat.jsonl", "w") as file:
        for i in range(9):
            messages = [("user", "ask" * (i + 1)), ("assistant", "answer" * (1 + i % 3))] * (1 + (i % 4 == 0 and i < 5))
            file.write(json.dumps({"messages": [{"role": r, "content": c[:14]} for r, c in messages]}) + "\n")
    return folder


def arguments(home, out, **changed):
    given = {
        "model": home / "model", "random-weights": True, "tokenizer": "bytes", "dataset": home / "text",
        "output-dir": out, "cache-dir": home, "seq-length": SEQLEN, "gradient-accumulate-every": 2,
        "max-train-steps": 4, "learning-rate": 1e-2, "dtype": "float32", "rope-theta": 5e4, "no-final": True,
    } | {name.replace("_", "-"): value for name, value in changed.items()}  # fmt: skip
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run(rank, world_size, words):
    """Ranks of a pool find this module, and by it the examples, where this process has them."""
    main(words)


def losses(out, name="loss"):
    return [json.loads(line)[name] for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_training(out, expected):
    """AdamW would not notice gradients that are all too large by one factor, so their norms count, too."""
    for name in ("loss", "gradient_norm"):
        assert losses(out, name) == pytest.approx(losses(expected, name), rel=1e-4), name


KINDS = {
    "text": {},
    "documents": {"separate-documents": True, "batch-size": 2, "gradient-accumulate-every": 1},
    "sft": {"sft": True, "dataset": "chat.jsonl", "seq-length": 128, "method": "dist_flash"},
    "pose": {"pose-context": 400, "pose-chunks": 3, "memory": "recompute", "activations": "offload"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_as_one_process(pool, home, tmp_path, kind):
    changed = dict(KINDS[kind])
    if "dataset" in changed:
        changed["dataset"] = home / changed["dataset"]
    run(0, 1, arguments(home, tmp_path / "one", **changed))
    expected = losses(tmp_path / "one")
    pool.run(run, arguments(home, tmp_path / "two", **changed))
    assert_same_training(tmp_path / "two", tmp_path / "one")
    assert len(set(expected)) == len(expected) == 4 and expected[-1] < expected[0]
    if kind == "pose":  # positions matter, to the model and nobody else
        without = {"pose-context": None, "pose-chunks": None, "max-train-steps": 1}
        run(0, 1, arguments(home, tmp_path / "without", **changed | without))
        assert losses(tmp_path / "without")[0] != pytest.approx(expected[0], rel=1e-4)
    if kind == "text":  # the same windows per step, by two data-parallel ranks, and by two virtual ranks
        halved = {"gradient-accumulate-every": 1, "parallel-mode": "data_parallel"}
        pool.run(run, arguments(home, tmp_path / "data", **halved))
        run(0, 1, arguments(home, tmp_path / "virtual", **{"virtual-ranks": 2}))
        pool.run(run, arguments(home, tmp_path / "usp", **{"method": "usp"}))
        grid = {"method": "usp", "virtual-ranks": 4, "ring-degree": 2}
        run(0, 1, arguments(home, tmp_path / "grid", **grid))
        assert_same_training(tmp_path / "usp", tmp_path / "one")
        assert_same_training(tmp_path / "grid", tmp_path / "one")
        assert_same_training(tmp_path / "data", tmp_path / "one")
        assert_same_training(tmp_path / "virtual", tmp_path / "one")


def test_fine_tuning_starts_from_the_loss_of_every_conversation_by_itself(pool, home, tmp_path):
    """All windows in one step: the mean over the answers' tokens, whatever is packed with what on which rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = [json.loads(line)["messages"] for line in (home / "chat.jsonl").read_text().splitlines()]
    talks = [sources.conversation(row, sources.Bytes()) for row in rows]
    found = windows(tmp_path / "x", talks, 128, separate=True, whole=True)
    changed = {"dataset": home / "chat.jsonl", "gradient-accumulate-every": len(found), "max-train-steps": 1}
    pool.run(run, arguments(home, tmp_path / "out", **KINDS["sft"] | changed))

    config = AutoConfig.from_pretrained(home / "model", max_position_embeddings=128)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e4}
    torch.manual_seed(42)
    model, total, count = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 0.0, 0
    for ids, learned in talks:
        tokens = torch.tensor(ids.tolist())[None]
        labels = tokens.masked_fill(~torch.tensor(learned)[None], -100)
        total += model(input_ids=tokens, labels=labels, num_items_in_batch=1).loss.item()
        count += int((labels[:, 1:] != -100).sum())
    assert len(found) > 2 and losses(tmp_path / "out") == pytest.approx([total / count], rel=1e-5)


def test_resumed_training_is_the_same_bit_for_bit(pool, home, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    common = {"dtype": "bfloat16", "no-final": False, "report-to": "tensorboard"}
    pool.run(run, arguments(home, straight, **common))
    pool.run(run, arguments(home, resumed, **common | {"max-train-steps": 2, "no-final": True, "save-every": 1}))
    pool.run(run, arguments(home, resumed, **common | {"resume": True, "save-every": 1}))
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 4
    assert [x.name for x in checkpoint.finished(resumed)] == ["step-00000003", "step-00000004"]  # --keep 2

    from transformers import AutoModelForCausalLM

    first, second = (AutoModelForCausalLM.from_pretrained(x / "final", dtype="auto") for x in (straight, resumed))
    assert type(first).__name__ == "LlamaForCausalLM" and first.config.rope_parameters["rope_theta"] == 5e4
    assert (straight / "final" / "model.safetensors").exists() and list((straight / "tensorboard").iterdir())
    for (name, x), (_, y) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(x, y) and x.dtype == torch.bfloat16 and x.isfinite().all(), name
    again = arguments(
        home, tmp_path / "again", **{"model": straight / "final", "random-weights": False, "max-train-steps": 1}
    )
    pool.run(run, again)
    assert losses(tmp_path / "again")[0] < losses(straight)[0] - 0.3  # trained weights, read from safetensors
    # What was saved is what was trained: the last step's model is better than the first one on the same text.
    ids = torch.tensor([list((home / "text" / "0.txt").read_bytes())])
    fresh = AutoModelForCausalLM.from_config(first.config)
    assert first.float()(input_ids=ids, labels=ids).loss < fresh(input_ids=ids, labels=ids).loss - 0.3


def refused(rank, world_size, cases):
    found = []
    for words in cases:
        try:
            main(words)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found


def test_bad_input_is_a_value_error_on_every_rank(pool, home, tmp_path):
    done = tmp_path / "done"
    run(0, 1, arguments(home, done, **{"max-train-steps": 1, "no-final": False}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("x")
    moved = home / "moving.txt"
    moved.write_text("a text that grows " * 20)
    run(0, 1, arguments(home, tmp_path / "moved", **{"dataset": moved, "max-train-steps": 1}))
    moved.write_text("a text that grows " * 30)
    cases = {
        "'tokens': 'tokens-": {"resume": True, "dataset": moved, "output-dir": tmp_path / "moved"},
        "expected --rope-theta, the base, with --rope-factor": {"rope-theta": None, "rope-factor": 4.0},
        "expected the configuration that": {"resume": True, "seq-length": 64, "output-dir": done},
        "expected --resume or an --output-dir without checkpoints": {"output-dir": done},
        "expected --seq-length divisible by 4 for 2 ranks in the zigzag layout, got 50": {"seq-length": 50},
        "expected method to be one of": {"method": "spiral"},
        "expected --sequence-parallel to divide the number of processes, 2": {"sequence-parallel": 3},
        "expected text files, or tables of one kind": {"dataset": tmp_path / "empty"},
        "which does not exist": {"dataset": tmp_path / "nowhere"},
        "expected a dataset of at least two tokens, got 1": {"dataset": tmp_path / "short.txt"},
        "expected conversations for --sft, got text files": {"sft": True},
        "expected conversations of at most --seq-length 16": {
            "sft": True, "dataset": home / "chat.jsonl", "seq-length": 16},
        "expected a model or a folder with a config.json": {"model": tmp_path / "empty"},
        "expected --pose-context without --sft": {"pose-context": 99, "separate-documents": True},
    }  # fmt: skip
    words = [arguments(home, tmp_path / f"out{i}", **changed) for i, changed in enumerate(cases.values())]
    for found in pool.run(refused, words):
        for message, complaint in zip(cases, found, strict=True):
            assert message in complaint, (message, complaint)


def test_options_that_differ_between_ranks(pool, home, tmp_path):
    for found in pool.run(differing, str(home), str(tmp_path)):
        assert "expected the same options on all ranks" in found[0]


def differing(rank, world_size, home, out):
    return refused(rank, world_size, [arguments(Path(home), out, seed=rank)])


def windows(folder, documents, seqlen, **options):
    data.write(folder, [(np.asarray(ids, dtype=np.int32), mask) for ids, mask in documents])
    return data.Windows(folder, seqlen, 1, **options)


@pytest.mark.parametrize("separate", [False, True])
def test_no_token_is_lost_at_a_border(tmp_path, separate):
    documents = [(range(10, 17), None), (range(30, 31), None), (range(50, 63), None)]
    stream = [x for ids, _ in documents for x in ids]
    found = windows(tmp_path / "x", documents, 4, separate=separate)
    predicted, total = [], 0
    for n in range(len(found)):
        batch = found.batch(n)
        total += found.count(n, 1)
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        predicted += [(a, b) for a, b in zip(ids, labels) if b != -100]
        if separate:
            assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 4
            for a, b in pairwise(batch.cu_seqlens):  # within a document tokens count up
                piece = [x for x in ids[a:b] if x]
                assert piece == list(range(piece[0], piece[0] + len(piece))) if piece else True
    pairs = [(a, b) for a, b in pairwise(stream) if not separate or b == a + 1]
    assert sorted(predicted) == sorted(pairs) and total == len(pairs)


def test_conversations_are_packed_whole_and_prompts_masked(tmp_path):
    talks = [
        [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")],
        [("system", "s"), ("user", "q"), ("assistant", "a")],
        [("user", "x"), ("assistant", "long answer")],
    ]
    documents = [sources.conversation([{"role": r, "content": c} for r, c in talk], sources.Bytes()) for talk in talks]
    learned = [bytes(ids[mask].tolist()).decode() for ids, mask in documents]
    assert learned == ["yes\nno\n", "a\n", "long answer\n"]
    found = windows(tmp_path / "x", documents, 100, separate=True, whole=True)
    batches = [found.batch(n) for n in range(len(found))]
    said = [bytes(b.labels[b.labels != -100].tolist()).decode() for b in batches]
    assert sorted(said) == sorted(["yes\nno\na\n", "long answer\n"]) and len(found) == 2
    lengths = sorted(len(b.cu_seqlens) for b in batches)
    assert lengths == [3, 4]  # one conversation and padding; two and padding
    assert sum(found.count(n, 1) for n in range(2)) == sum(map(len, said))


def test_a_chat_template(tmp_path):
    class Templated(sources.Bytes):
        chat_template = "there is one"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
            assert tokenize and not return_dict
            text = "".join(f"[{m['role']}]{m['content']}." for m in messages)
            return list((text + ("[assistant]" if add_generation_prompt else "")).encode())

    talk = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    ids, mask = sources.conversation(talk, Templated())
    assert bytes(ids.tolist()).decode() == "[user]a.[assistant]b.[user]c.[assistant]d."
    assert bytes(ids[mask].tolist()).decode() == "b.d."
    with pytest.raises(ValueError, match="expected an answer of the assistant, got none"):
        sources.conversation(talk[:1], Templated())


def test_arrow_parquet_and_saved_datasets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    rows.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "splits", "rows.parquet"):
        found = [ids.tolist() for ids, mask in sources.documents(str(tmp_path / name), "train", False, sources.Bytes)]
        assert found == [[1, 2, 3], [4, 5]], name
    with pytest.raises(ValueError, match=r"expected --split to be one of \['train'\], got 'test'"):
        next(sources.documents(str(tmp_path / "splits"), "test", False, sources.Bytes))


def test_pose_positions():
    seen, furthest = set(), 0
    for seed in range(200):
        found = pose.positions(32, 100, 3, seed)
        assert torch.equal(found, pose.positions(32, 100, 3, seed))
        steps = found.diff()
        assert found[0] == 0 and found[-1] < 100 and (steps >= 1).all() and (steps > 1).sum() <= 2
        seen.update(found.tolist())
        furthest = max(furthest, int(found[-1]))
    assert furthest > 90 and len(seen) > 90
    assert torch.equal(pose.positions(32, 32, 4, 0), torch.arange(32))
    with pytest.raises(
        ValueError, match="expected 1 <= chunks <= seqlen <= context, got chunks=2, seqlen=9, context=8"
    ):
        pose.positions(9, 8, 2, 0)


def test_easy_contexts_options(tmp_path):
    common = ["--dataset", "x", "--output-dir", str(tmp_path)]
    words = "--batch-size 1 --gradient-accumulate-every 8 --seed 42 --max-train-steps 400 --learning-rate 2e-5 "
    words += "--rope-theta 1e5 --model m --seq-length 16384 --parallel_mode dist_flash_attn --ring_degree 1"
    args = options.parse(None, words.split() + common)
    assert (args.method, args.rope_theta, args.tokenizer, args.sequence_parallel) == ("dist_flash", 1e5, "m", None)
    assert options.parse(None, [*common, "--parallel_mode", "data_parallel"]).sequence_parallel == 1
    with pytest.raises(ValueError, match="expected --method or --parallel-mode"):
        options.parse(None, [*common, "--parallel_mode", "usp_attn", "--method", "ring"])


def test_overhead_is_reported(home, tmp_path, capsys):
    run(0, 1, arguments(home, tmp_path / "out", **{"profile-overhead": True, "max-train-steps": 2, "peak-tflops": 1}))
    assert "outside the model: " in (text := capsys.readouterr().out) and "report" in text
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < line["mfu"] < 1 and line["tokens_per_second"] > 0 and line["gigabytes"] > 0.1
