"""The long-context examples: their parts, and the evaluation scripts from command line to pictures."""

import csv
import math
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
import example_model  # finds the examples

# isort: split
import eval_needle
import eval_ppl
import launch
import long_eval
import needle
import plot_ppl
import plots
from retrieval_facts import Encoder, training_sequence

import seqpar_attn
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.testing.distributed import RankPool

LENGTH = 280
"""Tokens (bytes here) of a prompt: about 190 of it are the question, the needle and what stands around."""


@pytest.fixture(scope="module")
def tokenizer():
    return example_model.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def llama(folder):
    return example_model.save(folder / "llama")


@pytest.fixture(scope="module")
def gemma(folder):
    return example_model.save(folder / "gemma2", "gemma2")


@pytest.fixture(scope="module")
def texts(folder):
    return example_model.texts(folder / "texts")


def rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("distractors", [0, 3])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_prompt(tokenizer, depth, distractors):
    haystack = list(range(300)) * 4  # no byte's tokens, so what is hay can be told
    haystack = [1000 + x for x in haystack]
    length = 400 + 45 * distractors
    made = needle.make_prompt(tokenizer, haystack, length, depth, random.Random(1), distractors=distractors)
    assert len(made.ids) == length and made.ids[-len(made.answer) :] == made.answer
    assert len(made.text) == 7 and tokenizer.decode(made.answer).strip() == made.text
    text = tokenizer.decode([x for x in made.ids if x < 1000])
    assert text.count("The special magic") == 2 + distractors and text.count(made.text) == 2
    city = text.rsplit("The special magic ", 1)[1].split(" number")[0]
    sentence = tokenizer(needle.NEEDLE.format(city=city, value=f" {made.text}"), add_special_tokens=False).input_ids
    at = next(i for i in range(length) if made.ids[i : i + len(sentence)] == sentence)
    before, after = (len(tokenizer(x, add_special_tokens=False).input_ids) for x in (needle.BEFORE, needle.AFTER))
    hay = length - before - (after - len("{city}{city}") + 2 * len(city)) - len(made.answer) - len(sentence)
    assert at - before == round(depth * hay), "there is no full stop to go back to"


def test_needle_goes_behind_a_sentence(tokenizer):
    haystack = tokenizer("Nine words. " * 100, add_special_tokens=False).input_ids
    made = needle.make_prompt(tokenizer, haystack, 600, 0.5, random.Random(2))
    text = tokenizer.decode(made.ids)
    assert text[: text.index("\nThe special magic")].endswith("words.")


def test_prompts_refused(tokenizer, tmp_path):
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"expected a haystack of at least [0-9]+ tokens, got 50"):
        needle.make_prompt(tokenizer, [1] * 50, 600, 0.5, rng)
    with pytest.raises(
        ValueError, match="expected prompts long enough for the question and the needles, got 100 tokens"
    ):
        needle.make_prompt(tokenizer, [1] * 500, 100, 0.5, rng)
    with pytest.raises(ValueError, match=r"expected 0 <= depth <= 1, got 1\.5"):
        needle.make_prompt(tokenizer, [1] * 500, 400, 1.5, rng)
    with pytest.raises(ValueError, match="expected digits >= 1 and 0 <= distractors < 29, got 7 and 29"):
        needle.make_prompt(tokenizer, [1] * 500, 400, 0.5, rng, distractors=29)
    (tmp_path / "empty.txt").write_text(" \n")
    for place, files in ((tmp_path, 1), (tmp_path / "none", 0)):
        with pytest.raises(
            ValueError, match=rf"expected a folder with text in files \*.txt, got '.*' with {files} files"
        ):
            needle.read_folder(place)


def test_facts(tokenizer):
    text = [1000 + x for x in range(4000)]
    asked = 0
    for seed in range(5):
        ids, answers = training_sequence(text, 3000, Encoder(tokenizer), random.Random(seed), tokens_per_fact=600)
        assert len(ids) == len(answers) == 3000
        hay = [x for x in ids if x >= 1000]
        assert hay == list(range(hay[0], hay[0] + len(hay))), "the text goes on where a fact interrupted it"
        begins = [i for i in range(1, 3000) if answers[i] and not answers[i - 1]]
        for i in begins:
            end = next(j for j in range(i, 3000) if not answers[j])
            value = ids[i:end]
            said = any(ids[j : j + len(value)] == value for j in range(i - len(value)))
            assert said, "an answer is said before it is asked for"
        asked += len(begins)
    assert asked >= 5
    with pytest.raises(ValueError, match="expected a text of at least 3000 tokens, got 10"):
        training_sequence(text[:10], 3000, Encoder(tokenizer), random.Random(0))


@pytest.fixture
def on_virtual_ranks(llama):
    model, tokenizer = long_eval.load(llama, torch.float64, "cpu")
    group = seqpar_attn.LoopbackGroup(3)
    handle = enable(model, group)
    yield model, tokenizer, group
    handle.disable()


def test_losses_and_perplexity(on_virtual_ranks):
    model, _, group = on_virtual_ranks
    ids = torch.randint(0, 257, (2, 61))
    losses = long_eval.token_losses(model, ids, group)
    alone = long_eval.load(model.config._name_or_path, torch.float64, "cpu")[0]
    with torch.no_grad():
        logits = alone(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-4, atol=1e-4)
    row = long_eval.perplexity_curve(losses, [20], window=5)[0]
    assert math.isclose(row["perplexity"], expected.view(2, 60)[:, :19].mean().exp().item(), rel_tol=1e-4)
    assert math.isclose(
        row["perplexity_of_last_tokens"], expected.view(2, 60)[:, 14:19].mean().exp().item(), rel_tol=1e-4
    )
    assert row["tokens"] == 38


def test_answers_are_those_of_greedy_decoding(on_virtual_ranks):
    """Generated answers: what one device generates. In one pass over the right answer: the same up to an error."""
    model, tokenizer, group = on_virtual_ranks
    haystack = tokenizer("Some words of no use. " * 40).input_ids
    prompts = [
        needle.make_prompt(tokenizer, haystack, LENGTH, 0.5, random.Random(i), digits=i % 2 + 3) for i in range(3)
    ]
    alone = long_eval.load(model.config._name_or_path, torch.float64, "cpu")[0]
    found = long_eval.generated_answers(model, prompts, group)
    for prompt, answer in zip(prompts, found):
        ids = torch.tensor([prompt.ids[: -len(prompt.answer)]])
        expected = alone.generate(ids, max_new_tokens=len(prompt.answer), do_sample=False, eos_token_id=None)
        assert answer == expected[0, ids.shape[1] :].tolist()
        right = needle.Prompt(prompt.ids[: -len(answer)] + answer, answer, "")
        assert long_eval.greedy_answers(model, [right], group) == [answer], "an answer that is right is seen to be"


def test_accuracy_counts_right_answers(tokenizer):
    haystack = tokenizer("Some words of no use. " * 40).input_ids
    asked = []

    def answers(model, prompts, group, layout):
        asked.extend(prompts)
        return [p.answer if i % 2 else [1] for i, p in enumerate(prompts)]

    options = dict(lengths=[LENGTH, LENGTH + 9], depths=[0.0, 1.0], samples=4, digits=3, answers=answers)
    found = list(long_eval.needle_grid(None, tokenizer, haystack, None, **options))
    assert [(row["length"], row["depth"], row["accuracy"]) for row in found] == [
        (LENGTH, 0.0, 0.5), (LENGTH, 1.0, 0.5), (LENGTH + 9, 0.0, 0.5), (LENGTH + 9, 1.0, 0.5)
    ]  # fmt: skip
    assert len(asked) == 16 and len({p.text for p in asked}) > 10, "every prompt has a number of its own"
    again = list(long_eval.needle_grid(None, tokenizer, haystack, None, **options))
    assert again == found, "one seed asks every model the same"


def test_rope_base(llama):
    model, _ = long_eval.load(llama, torch.float32, "cpu")
    before = model.model.rotary_emb.inv_freq.clone()
    long_eval.set_rope_base(model, 5e5, 1024)
    assert not torch.equal(before, model.model.rotary_emb.inv_freq) and model.config.max_position_embeddings == 1024
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 5e5 ** -(torch.arange(0, 8, 2) / 8))
    model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="expected a model with rope_type 'default', got 'yarn'"):
        long_eval.set_rope_base(model, 5e5, 1024)


def needle_arguments(model, texts, out, *more):
    return [
        "--model", *map(str, model), "--haystack_dir", str(texts), "--out", str(out), "--dtype", "float32",
        "--min_context_length", str(LENGTH), "--max_context_length", str(LENGTH + 40), "--context_interval", "40",
        "--depth_interval", "0.5", "--num_samples", "2", "--rnd_number_digits", "3", *more,
    ]  # fmt: skip


def test_eval_needle(llama, gemma, texts, tmp_path, capsys):
    for method, ranks in (("ring", "1"), ("dist_flash", "3")):
        out = tmp_path / method
        more = ["--method", method, "--ranks", ranks, "--num_distractor", "1", "--pdf", "--rope_theta", "20000"]
        eval_needle.main(needle_arguments([llama, gemma], texts, out, *more))
    first, second = (rows(tmp_path / method / "needle.csv") for method in ("ring", "dist_flash"))
    assert first == second, "ranks and methods give the same answers"
    assert len(first) == 2 * 2 * 3 and {row["model"] for row in first} == {"llama", "gemma2"}
    assert {row["depth"] for row in first} == {"0", "0.5", "1"} and {row["distractors"] for row in first} == {"1"}
    assert all(len(row["expected"].split()) == 2 for row in first)
    assert [row["prompts"] for row in rows(out / "accuracy.csv")] == ["12", "12"]
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG") and (out / "needle.pdf").stat().st_size > 1000
    assert "llama: accuracy" in capsys.readouterr().out


def scripts_on_ranks(rank, world_size, model, texts, out, faulty):
    """Both scripts on real ranks; then with faults of one rank."""
    eval_needle.main(needle_arguments([model], texts, out))
    eval_ppl.main(ppl_arguments([model], texts, out / "ppl.csv"))

    def complaint(call):
        try:
            call()
        except ValueError as error:
            return str(error)
        return "no error"

    bad = str(faulty if rank == 1 else texts)
    return [
        complaint(lambda: eval_needle.main(needle_arguments([model], bad, out / "bad"))),
        complaint(lambda: eval_ppl.main(ppl_arguments([model], bad, out / "bad.csv"))),
        complaint(lambda: eval_needle.main(needle_arguments([bad], texts, out / "bad"))),
        complaint(
            lambda: eval_needle.main(needle_arguments([model], texts, out / "bad", "--max_context_length", "9000"))
        ),
        complaint(lambda: eval_needle.main(needle_arguments([model], texts, out / "bad", "--method", "none"))),
        complaint(lambda: eval_ppl.main(ppl_arguments([model], texts, out / "bad.csv", "--max-tokens", "9000"))),
    ]


def test_processes(llama, texts, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    eval_needle.main(needle_arguments([llama], texts, tmp_path / "one"))
    eval_ppl.main(ppl_arguments([llama], texts, tmp_path / "one" / "ppl.csv"))
    with RankPool(2, timeout=120) as pool:
        complaints = pool.run(scripts_on_ranks, llama, texts, tmp_path / "two", empty)
    assert rows(tmp_path / "two" / "needle.csv") == rows(tmp_path / "one" / "needle.csv")
    for split, alone in zip(rows(tmp_path / "two" / "ppl.csv"), rows(tmp_path / "one" / "ppl.csv")):
        assert math.isclose(float(split["perplexity"]), float(alone["perplexity"]), rel_tol=1e-4)
    messages = [
        "rank 1: expected a folder with text in files *.txt, got",
        "rank 1: expected texts in",
        "rank 1: ",
        "expected a haystack of at least",
        "expected method to be one of",
        "expected a text of at least 9000 tokens, got 2, the longest",
    ]
    assert complaints[0] == complaints[1]
    for found, message in zip(complaints[0], messages):
        assert message in found, (message, found)


def ppl_arguments(models, texts, out, *more):
    return [
        "-m", *map(str, models), "-d", str(texts), "--output-file", str(out), "--dtype", "float32", "--min-tokens",
        "50", "--max-tokens", "150", "--tokens-step", "50", "--truncate", *more,
    ]  # fmt: skip


def test_windows():
    assert list(eval_ppl.windows(100, 40, 25)) == [(0, 40, 39), (25, 65, 25), (50, 90, 25), (75, 100, 10)]
    assert list(eval_ppl.windows(40, 40, 10)) == [(0, 40, 39)]
    for seqlen, length, stride in ((101, 40, 7), (33, 50, 50), (90, 30, 30)):
        counted = [t for _, end, n in eval_ppl.windows(seqlen, length, stride) for t in range(end - n, end)]
        assert counted == list(range(1, seqlen)), "every token but the first counts once"


def test_eval_ppl(llama, gemma, texts, tmp_path):
    out, tokens = tmp_path / "ppl.csv", tmp_path / "tokens.pt"
    eval_ppl.main(ppl_arguments([llama, gemma], texts, out, "--ranks", "3", "--save-tokenized", str(tokens)))
    found = rows(out)
    assert [(row["model"], row["length"]) for row in found] == [
        (m, n) for m in ("llama", "gemma2") for n in ("50", "100", "150")
    ]
    for path in (llama, gemma):
        model, tokenizer = long_eval.load(path, torch.float32, "cpu")
        ids = [tokenizer(file.read_text()).input_ids[:100] for file in sorted(texts.glob("*.txt"))]
        with torch.no_grad():
            loss = model(torch.tensor(ids), labels=torch.tensor(ids)).loss
        row = next(row for row in found if row["model"] == path.name and row["length"] == "100")
        assert math.isclose(float(row["perplexity"]), loss.exp().item(), rel_tol=1e-3)
        assert row["tokens"] == "198" and row["texts"] == "2"
    # Windows over whole texts, here from the tokens that were saved: one window as long as the text is the text.
    more = [
        "--tokenized",
        str(tokens),
        "--samples",
        "1",
        "--sliding-window",
        "40",
        "--method",
        "dist_flash",
        "--ranks",
        "2",
    ]
    arguments = [x for x in ppl_arguments([llama], texts, tmp_path / "windows.csv", *more) if x != "--truncate"]
    eval_ppl.main([*arguments, "--max-tokens", "5000", "--tokens-step", "4950", "--dataset-min-tokens", "150"])
    found = rows(tmp_path / "windows.csv")
    assert [row["length"] for row in found] == ["50", "5000"]
    kept = torch.load(tokens)[0]
    with torch.no_grad():
        model, _ = long_eval.load(llama, torch.float32, "cpu")
        loss = model(kept[None], labels=kept[None]).loss
    assert math.isclose(float(found[1]["perplexity"]), loss.exp().item(), rel_tol=1e-3)
    assert {row["tokens"] for row in found} == {str(len(kept) - 1)}
    plot_ppl.main([str(out), "--ymax", "2000"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and out.with_suffix(".pdf").stat().st_size > 1000


def test_scripts_refuse(llama, texts, tmp_path):
    def ppl(*more):
        eval_ppl.main(ppl_arguments([llama], texts, tmp_path / "x.csv", *more))

    for match, more in {
        "expected 2 <= min-tokens <= max-tokens": ["--max-tokens", "20"],
        "expected --dtype to be a torch dtype such as bfloat16, got 'fast'": ["--dtype", "fast"],
        "expected a file that --save-tokenized wrote": ["--tokenized", str(tmp_path / "none")],
    }.items():
        with pytest.raises(ValueError, match=match):
            ppl(*more)
    with pytest.raises(ValueError, match="expected 0 < min_context_length <= max_context_length"):
        eval_needle.main(needle_arguments([llama], texts, tmp_path, "--depth_interval", "0"))
    with pytest.raises(ValueError, match="expected prompts long enough"):
        eval_needle.main(needle_arguments([llama], texts, tmp_path, "--min_context_length", "30"))
    (tmp_path / "needle.csv").write_text("model,length\na,1\n")
    with pytest.raises(
        ValueError, match=r"expected rows with columns length, perplexity in .*, got none of perplexity"
    ):
        plots.read(tmp_path / "needle.csv", ("length", "perplexity"))
    assert launch.is_first()
