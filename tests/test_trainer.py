"""transformers' Trainer on ranks that split sequences: losses, evaluations and weights are those of one process."""

import os
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from hf_models import VOCABULARY, build

from seqpar_attn.testing.distributed import RankPool

SEQLEN = 25  # odd: every batch is padded
STEPS = 3


class Rows(torch.utils.data.Dataset):
    """Sequences with a masked prompt each, of different lengths of it, so that no mean of means is the mean."""

    def __init__(self, count, kind):
        generator = torch.Generator().manual_seed(count)
        self.kind, self.rows = kind, []
        for i in range(count):
            ids = torch.randint(3, VOCABULARY, (SEQLEN,), generator=generator)
            labels = ids.clone()
            labels[: int(torch.randint(0, 15, (1,), generator=generator))] = -100
            row = {"input_ids": ids, "labels": labels}
            if kind == "packed":
                row["cu_seqlens"] = torch.tensor([0, 4 + i, 13, SEQLEN])
            if kind == "padded":
                row["attention_mask"] = torch.ones_like(ids)
                row["attention_mask"][20 - i % 3 :] = 0
                labels[20 - i % 3 :] = -100
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def as_rank(rank, world_size):
    """What a launcher sets; the processes of a pool have a group already."""
    import accelerate

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def trainer_of(rank, world_size, out, kind, family="llama", split=1, rows=8, linear=False, plain=False, **options):
    """``plain``: the library's own Trainer."""
    from transformers import Trainer, TrainingArguments

    from seqpar_attn.integrations.accelerate import SequenceParallelConfig
    from seqpar_attn.integrations.trainer import SequenceParallelTrainer

    if world_size > 1:
        as_rank(rank, world_size)
        options["parallelism_config"] = SequenceParallelConfig(cp_size=split, dp_shard_size=world_size // split)
    # The number of sequences per optimizer step must not depend on how many processes share them out.
    batch = 1 if kind == "packed" else 2
    data_parallel = world_size // split
    arguments = TrainingArguments(
        out,
        use_cpu=True,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=2 // data_parallel,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch",
        **options,
    )
    model = build(family)
    if linear:
        from seqpar_attn.integrations.linear_loss import use_linear_loss

        use_linear_loss(model)
    data = {"train_dataset": Rows(rows, kind), "eval_dataset": Rows(5, kind)}
    if plain:
        return Trainer(model, arguments, **data)
    return SequenceParallelTrainer(model, arguments, **data, backend="reference")


def trained(rank, world_size, out, *arguments, plain=False):
    trainer = trainer_of(rank, world_size, out, *arguments, linear=arguments[0] == "packed", plain=plain)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    # AdamW would not notice gradients that are all too large by one factor, so their norms are compared, too.
    losses = [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.save_model(out)  # with its arguments, a mesh among them
    assert os.path.exists(os.path.join(out, "model.safetensors")) or rank > 0
    return before, losses, trainer.evaluate()["eval_loss"], weights


def assert_same_training(results, expected):
    for before, losses, after, weights in results:
        true_before, true_losses, true_after, true_weights = expected
        assert len(losses) == STEPS
        for step, true_step in zip(losses, true_losses):
            assert step == pytest.approx(true_step, rel=1e-5)
        assert before == pytest.approx(true_before, rel=1e-6) and after == pytest.approx(true_after, rel=1e-5)
        assert before != pytest.approx(after, rel=1e-3)
        for name, x in true_weights.items():
            torch.testing.assert_close(weights[name], x, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name} {m}")


def one_process_loss(kind):
    """An evaluation by hand: the library's own attention and loss, one sequence at a time."""
    model, total, count = build("llama").eval(), 0.0, 0
    for row in Rows(5, kind).rows:
        bounds = row["cu_seqlens"].tolist() if kind == "packed" else [0, SEQLEN]
        for a, b in pairwise(bounds):
            ids, labels = row["input_ids"][None, a:b], row["labels"][None, a:b]
            valid = int((labels[:, 1:] != -100).sum())
            if valid:
                total += model(input_ids=ids, labels=labels).loss.item() * valid
                count += valid
    return total / count


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=120) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "family", "split"),
    [("plain", "llama", 2), ("packed", "llama", 2), ("padded", "mistral", 2), ("plain", "llama", 1)],
    ids=["sequence", "sequence-packed", "sequence-padded-window", "data"],
)
def test_as_one_process(pool, tmp_path, kind, family, split):
    expected = trained(0, 1, str(tmp_path / "one"), kind, family)
    assert_same_training(pool.run(trained, str(tmp_path / "two"), kind, family, split), expected)
    if kind == "plain" and split == 2:
        library = trained(0, 1, str(tmp_path / "library"), kind, family, plain=True)
        for step, true_step in zip(expected[1], library[1], strict=True):
            assert step == pytest.approx(true_step, rel=1e-4)  # its softmax is float32
    if family == "llama":
        assert expected[0] == pytest.approx(one_process_loss(kind), rel=1e-5)


def test_data_times_sequence_parallel(tmp_path):
    """Five evaluation rows for two data-parallel ranks: one row is repeated, and must not count twice."""
    expected = trained(0, 1, str(tmp_path / "one"), "plain")
    with RankPool(4, timeout=120) as four:
        assert_same_training(four.run(trained, str(tmp_path / "four"), "plain", "llama", 2), expected)


def complaints(rank, world_size, out):
    """Faults of rank 1 only; every rank must hear of them."""
    trainer = trainer_of(rank, world_size, out, "plain", "llama", 2)
    good = {name: x[None] for name, x in Rows(1, "plain")[0].items()}
    ids = good["input_ids"]
    middle = torch.ones_like(ids)
    middle[:, 3] = 0
    faults = {
        "padding": {"attention_mask": middle},
        "labels in padding": {"attention_mask": (torch.arange(SEQLEN) < 20)[None], "labels": ids},
        "positions": {"position_ids": torch.arange(SEQLEN)[None] % 7},
        "other tokens": {"input_ids": ids + 1},
        "no labels": {"labels": None},
        "boundaries": {"cu_seqlens": torch.tensor([[0, 3, SEQLEN], [0, 4, SEQLEN]])},
    }
    found = {}
    for name, fault in faults.items():
        try:
            trainer._get_num_items_in_batch([good, good | (fault if rank == 1 else {})], torch.device("cpu"))
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    from accelerate import Accelerator

    from seqpar_attn.integrations.accelerate import SequenceParallelConfig

    as_rank(rank, world_size)
    try:
        Accelerator(cpu=True, parallelism_config=SequenceParallelConfig(cp_size=3))
    except ValueError as error:
        found["mesh"] = str(error)
    found["good"] = int(trainer._get_num_items_in_batch([good, good], torch.device("cpu")))
    return found


def test_a_bad_batch_of_one_rank_is_an_error_on_all(pool, tmp_path):
    first, second = pool.run(complaints, str(tmp_path))
    messages = {
        "padding": "expected padding only at the end of a row",
        "labels in padding": "expected padding only at the end of a row, with labels -100",
        "positions": "expected cu_seqlens with position_ids that begin anew",
        "no labels": "expected labels in a batch",
        "boundaries": "expected one cu_seqlens for all rows",
    }
    for name, message in messages.items():
        assert message in second[name] and "got others on ranks [1]" in first[name], (name, first[name], second[name])
    for found in (first, second):
        assert "expected the same batch on all ranks that share a sequence" in found["other tokens"]
        assert "cp_size to be the number of processes, 2, got 1 x 1 x 3" in found["mesh"]
    assert first["good"] == second["good"] == 2 * int((Rows(1, "plain")[0]["labels"][1:] != -100).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_tokens_across_devices": False}, "expected average_tokens_across_devices=True"),
        ({"label_smoothing_factor": 0.1}, "expected label_smoothing_factor=0"),
    ],
)
def test_refused_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(0, 1, str(tmp_path), "plain", **options)


def test_refused_mesh():
    from seqpar_attn.integrations.accelerate import SequenceParallelConfig

    with pytest.raises(ValueError, match="expected cp_size for the ranks that split a sequence"):
        SequenceParallelConfig(sp_size=2)
