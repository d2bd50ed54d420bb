"""Text from models whose key-value cache is split over ranks: the tokens and logits of one device."""

import pytest
import torch

pytest.importorskip("transformers")
from hf_models import FAMILIES, VOCABULARY, build

import seqpar_attn
from seqpar_attn.integrations.generation import generate, prefill
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.testing.distributed import RankPool

NEW = 6
TOLERANCE = 2e-5
"""Weights are float64, but the library's norms and its eager softmax are float32 whatever the weights are."""


def prompt(seqlen=23, batch=2):
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def on_one_device(family, ids):
    """Tokens and the logits of the new ones, by the library's own cache and its own generate."""
    result = build(family).eval().generate(
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits, 1)


def decoded(model, ids, tokens):
    """Logits of the new tokens, ``tokens`` being taken for granted, and how many tokens each layer has here."""
    cache = prefill(model, ids, max_new_tokens=3)  # more come than there is room for
    logits = []
    for i in range(ids.shape[1] - 1, tokens.shape[1] - 1):
        logits.append(model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1), [kv.tokens for kv in cache.sharded]


def on_ranks(rank, world_size, families, method, ids, tokens):
    found = []
    for family, expected in zip(families, tokens):
        model = build(family).eval()
        grid = (2, world_size // 2) if world_size > 2 else (1, world_size)
        group = torch.distributed.init_device_mesh("cpu", grid) if method == "usp" else None
        enable(model, group, method=method)
        with torch.no_grad():
            logits, held = decoded(model, ids, expected)
        found.append((generate(model, ids, NEW), logits, held))
    return found


_expected = {}


def expected(family, ids):
    key = family, ids.shape
    if key not in _expected:
        _expected[key] = on_one_device(family, ids)
    return _expected[key]


def check(family, ids, tokens, logits):
    true_tokens, true_logits = expected(family, ids)
    assert torch.equal(tokens, true_tokens), family
    worst = (logits - true_logits).abs().max().item()
    assert worst < TOLERANCE * true_logits.abs().max().item(), f"{family} logits: {worst}"


@pytest.fixture(scope="module", params=[2, 3])
def pool(request):
    with RankPool(request.param, timeout=120) as pool:
        yield pool


@pytest.mark.parametrize("method", ["ring", "dist_flash"])
def test_as_on_one_device(pool, method):
    if method == "dist_flash" and pool.world_size == 2:
        pytest.skip("three ranks suffice")
    ids = prompt()
    results = pool.run(on_ranks, FAMILIES, method, ids, [expected(family, ids)[0] for family in FAMILIES])
    for rank in results:
        for family, (tokens, logits, _) in zip(FAMILIES, rank):
            check(family, ids, tokens, logits)
    llama = [rank[0][2] for rank in results]
    assert sum(held[0][0] for held in llama) == ids.shape[1] - 1 + NEW, "each token's keys are on one rank"
    assert max(held[0][0] for held in llama) <= -(-ids.shape[1] // pool.world_size) + 1 + -(-NEW // pool.world_size)


@pytest.mark.parametrize("method", ["ulysses", "usp"])
def test_methods_that_exchange_heads(method):
    ids, families = prompt(), ("llama", "mistral")
    with RankPool(4, timeout=120) as pool:
        results = pool.run(on_ranks, families, method, ids, [expected(family, ids)[0] for family in families])
    for rank in results:
        for family, (tokens, logits, _) in zip(families, rank):
            check(family, ids, tokens, logits)
    assert sum(rank[0][2][0][0] for rank in results) == ids.shape[1] - 1 + NEW, "each token's keys are on one rank"


def test_a_grid_of_virtual_ranks():
    for seqlen in (2, 17):
        ids, model = prompt(seqlen), build("mistral").eval()
        enable(model, (seqpar_attn.LoopbackGroup(3), seqpar_attn.LoopbackGroup(2)), method="usp")
        with torch.no_grad():
            logits, _ = decoded(model, ids, expected("mistral", ids)[0])
        check("mistral", ids, generate(model, ids, NEW), logits)


@pytest.mark.parametrize("seqlen", [1, 2, 5, 16, 17])
def test_virtual_ranks_and_any_prompt_length(seqlen):
    for family in ("mistral", "gpt_oss"):
        ids = prompt(seqlen)
        model = build(family).eval()
        for layout in ("zigzag", "striped"):
            handle = enable(model, seqpar_attn.LoopbackGroup(4), layout=layout)
            tokens = expected(family, ids)[0]
            with torch.no_grad():
                logits, _ = decoded(model, ids, tokens)
            check(family, ids, generate(model, ids, NEW), logits)
            handle.disable()


def test_the_library_generates_from_our_cache():
    ids = prompt()
    model = build("qwen3").eval()
    enable(model, seqpar_attn.LoopbackGroup(3))
    options = dict(max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    tokens = model.generate(ids, past_key_values=prefill(model, ids), do_sample=False, **options)
    assert torch.equal(tokens, expected("qwen3", ids)[0])
    # More text after an answer: all tokens that the cache does not know, in one call.
    cache = prefill(model, ids)
    more = torch.cat([ids, prompt(5)], 1)
    tokens = model.generate(more, past_key_values=cache, do_sample=False, **options)
    assert torch.equal(tokens, expected("qwen3", more)[0])
    beams = prefill(model, ids.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="got a beam search"):
        model.generate(ids, past_key_values=beams, num_beams=2, **options)


def test_rows_end():
    ids = prompt()
    model = build("llama").eval()
    enable(model, seqpar_attn.LoopbackGroup(2))
    new = generate(model, ids, NEW)[:, ids.shape[1] :]
    first, second = new[0, 1].item(), new[1, 3].item()
    stopped = generate(model, ids, NEW, eos_token_id=[first, second], pad_token_id=60)[:, ids.shape[1] :]
    ends = [next(i for i, token in enumerate(row.tolist()) if token in (first, second)) for row in new]
    assert stopped.shape[1] == max(ends) + 1 < NEW, "stops when all rows have ended"
    for row, end, given in zip(stopped, ends, new):
        assert torch.equal(row[: end + 1], given[: end + 1]) and (row[end + 1 :] == 60).all()
    assert generate(model, ids, 0) is ids


def complaint(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def wrong_calls(rank, world_size):
    model = build("llama").eval()
    enable(model)
    ids, faulty = prompt(), rank == 1
    found = {
        "prompt": complaint(lambda: generate(model, ids + faulty, 1)),
        "length": complaint(lambda: generate(model, ids[:, : 20 if faulty else 23], 1)),
        "number": complaint(lambda: generate(model, ids, 2 if faulty else 1)),
        "dtype": complaint(lambda: generate(model, ids.float() if faulty else ids, 1)),
        "empty": complaint(lambda: prefill(model, ids[:, :0] if faulty else ids)),
        "negative": complaint(lambda: generate(model, ids, -1 if faulty else 1)),
    }
    model.train(faulty)
    found["training"] = complaint(lambda: generate(model, ids, 1))
    model.eval()
    cache = prefill(model, ids)
    late = torch.full((2, 1), 23 if faulty else 22)
    found["positions"] = complaint(lambda: model(input_ids=ids[:, -1:], position_ids=late, past_key_values=cache))
    padding = torch.ones(2, 23, dtype=torch.bool)
    padding[:, 0] = not faulty
    found["padding"] = complaint(lambda: model(input_ids=ids[:, -1:], attention_mask=padding, past_key_values=cache))
    packed = {"cu_seqlens": [0, 23]} if faulty else {}
    found["packed"] = complaint(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, **packed))
    model(input_ids=ids[:, -1:], past_key_values=cache)  # and after all that it works
    return found


def test_a_fault_of_one_rank_is_an_error_on_all():
    messages = {
        "prompt": "expected the same input_ids (hash) on every rank, got",
        "length": "expected the same shape of input_ids on every rank, got (2, 23) on rank 0 and (2, 20) on rank 1",
        "number": "expected the same max_new_tokens on every rank, got 1 on rank 0 and 2 on rank 1",
        "dtype": "rank 1: expected integer input_ids of shape [batch, seqlen >= 1], got torch.float32 [2, 23]",
        "empty": "rank 1: expected integer input_ids of shape [batch, seqlen >= 1], got torch.int64 [2, 0]",
        "negative": "rank 1: expected max_new_tokens >= 0, got -1",
        "training": "rank 1: expected a model in evaluation mode",
        "positions": "rank 1: expected position_ids from 22 on, behind the cache, got [[23], [23]]",
        "padding": "rank 1: expected no padding in attention_mask, got some",
        "packed": "rank 1: expected no cu_seqlens with tokens after a prompt, got some",
    }
    with RankPool(2, timeout=60) as pool:
        for found in pool.run(wrong_calls):
            for name, message in messages.items():
                assert message in found[name], (name, found[name])


def test_refused():
    with pytest.raises(
        ValueError, match=r"expected a model after enable\(model, group\), got a LlamaForCausalLM without"
    ):
        generate(build("llama").eval(), prompt(), 1)
