"""Hugging Face's models with the sequence split over ranks: logits, loss and gradients are those of one device."""

import os

import pytest
import torch

pytest.importorskip("transformers")
from hf_models import FAMILIES, VOCABULARY, build, gradients, one_device

import seqpar_attn
from seqpar_attn import memory
from seqpar_attn.integrations.transformers import NAME, enable
from seqpar_attn.testing.distributed import RankPool

SEQLEN = 48
DOCUMENTS = [0, 5, 17, 40, SEQLEN]
WORLD_SIZES = (2, 3, 4)
TOLERANCE = 2e-5
"""Weights are float64, but the library's norms and its eager softmax are float32 whatever the weights are."""


def ids():
    return torch.randint(3, 61, (1, SEQLEN), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=WORLD_SIZES)
def pool(request):
    with RankPool(request.param, timeout=240) as pool:
        yield pool


def sharded(rank, world_size, families, method, documents, checkpoints):
    """Per family: logits of the whole sequence, loss and gradients summed over ranks."""
    results = []
    group = torch.distributed.init_device_mesh("cpu", (2, world_size // 2)) if method == "usp" else None
    for family in families:
        model = build(family)
        enabled = enable(model, group, method=method, backend="reference")
        if checkpoints == "library":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif checkpoints == "memory":
            memory.apply(model, attention="offload", activations="offload", tile_mlp=None if "gpt" in family else 5)
        layout = enabled.settings.layout
        batch = seqpar_attn.shard_batch(ids(), cu_seqlens=documents, layout=layout, group=group)
        packed = {} if documents is None else {"cu_seqlens": batch.cu_seqlens}
        result = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            shift_labels=batch.labels,
            num_items_in_batch=batch.num_valid,
            use_cache=False,
            **packed,
        )
        result.loss.backward()
        loss, found = result.loss.detach().clone(), gradients(model)
        for x in (loss, *found.values()):
            torch.distributed.all_reduce(x)
        logits = seqpar_attn.gather(result.logits.detach(), layout=layout, group=group)
        results.append((logits, loss.item(), found) if rank == 0 else None)
    return results


_expected = {}


def expected(family, documents):
    key = family, documents is None
    if key not in _expected:
        _expected[key] = one_device(family, ids(), documents)
    return _expected[key]


@pytest.mark.parametrize("checkpoints", ["none", "library", "memory"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("method", ["ring", "dist_flash"])
def test_as_on_one_device(pool, method, documents, checkpoints):
    if checkpoints != "none" and pool.world_size != 2 and "SEQPAR_ATTN_REPEAT" not in os.environ:
        pytest.skip("two ranks suffice, but under SEQPAR_ATTN_REPEAT")
    compare(pool, method, documents, checkpoints)


EXCHANGES = [
    (2, "ulysses", DOCUMENTS, "memory"),
    (4, "ulysses", None, "none"),  # more ranks than key heads
    (4, "usp", DOCUMENTS, "none"),
    (4, "usp", None, "library"),
]


def test_exchanging_heads(pool):
    cases = [case[1:] for case in EXCHANGES if case[0] == pool.world_size]
    if not cases:
        pytest.skip("heads that this number of ranks does not divide")
    for case in cases:
        compare(pool, *case)


def compare(pool, method, documents, checkpoints):
    results = pool.run(sharded, FAMILIES, method, documents, checkpoints)[0]
    for family, (logits, loss, found) in zip(FAMILIES, results):
        true_logits, true_loss, true_gradients = expected(family, documents)
        worst = (logits - true_logits).abs().max().item()
        assert worst < TOLERANCE * true_logits.abs().max().item(), f"{family} logits: {worst}"
        assert abs(loss - true_loss) < TOLERANCE * true_loss, family
        scale = max(x.abs().max().item() for x in true_gradients.values())
        for name, x in true_gradients.items():
            worst = (found[name] - x).abs().max().item()
            assert worst < TOLERANCE * scale, f"{family} {name}: {worst} of {scale}"
        assert any(x.abs().max() > 0 for name, x in found.items() if "q_proj" in name or "qkv" in name)


def complaint(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def wrong_calls(rank, world_size, method):
    """Faults of rank 1 only; every rank must hear of them."""
    model = build("llama")
    group = torch.distributed.init_device_mesh("cpu", (2, 2)) if method == "usp" else None
    layout = enable(model, group, method=method, backend="reference").settings.layout
    batch = seqpar_attn.shard_batch(ids(), layout=layout, group=group)
    good = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    faults = {
        "padding": {"attention_mask": torch.arange(batch.input_ids.shape[1])[None] > 2},
        "no positions": {"position_ids": None},
        "unsharded positions": {"position_ids": torch.arange(batch.input_ids.shape[1])[None]},
        "labels": {"labels": batch.labels},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, SEQLEN], dtype=torch.int32)},
    }
    found = {
        name: complaint(lambda f=fault: model(**(good | (f if rank == 1 else {})))) for name, fault in faults.items()
    }
    bare = {"input_ids": good["input_ids"]}  # the decoder without its head, as a linear cross-entropy wants it
    found["no positions, no head"] = complaint(lambda: model.model(**(bare if rank == 1 else good)))
    model(**good)  # and after all that it works
    return found


WHERE = {2: ("ring", "zigzag layout, [12, 13, ..., 35]"), 4: ("usp", "zigzag/2 layout, [36, 37, ..., 47]")}


def test_a_fault_of_one_rank_is_an_error_on_all(pool):
    if pool.world_size not in WHERE:
        pytest.skip("no method for it")
    method, positions = WHERE[pool.world_size]
    messages = {
        "padding": "expected no padding in attention_mask, got some",
        "no positions": "expected position_ids of this rank's shard",
        "no positions, no head": "expected position_ids of this rank's shard",
        "unsharded positions": f"expected position_ids of rank 1's shard in the {positions}",
        "labels": "expected shift_labels besides labels",
        "cu_seq_lens_q": "expected cu_seqlens, the boundaries of the whole sequence's documents",
    }
    for found in pool.run(wrong_calls, method):
        for name, message in messages.items():
            assert message in found[name], (name, found[name])


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 8.0,
            "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def with_rotary(parameters):
    long = parameters["rope_type"] == "longrope"
    model = build("phi3" if long else "llama")
    changed = {"rope_parameters": dict(parameters), "max_position_embeddings": 256 if long else 32}
    if long:
        changed["original_max_position_embeddings"] = 32  # the configuration's own wins over that of the parameters
    config = type(model.config)(**model.config.to_dict() | changed)
    config._attn_implementation = "eager"
    found = type(model)(config).double()
    found.load_state_dict(model.state_dict())
    return found


def rotary(rank, world_size, cases):
    """Logits of the whole sequence, or what was refused."""
    results = []
    for parameters, layout, seqlen, documents in cases:
        model = with_rotary(parameters)
        enable(model, layout=layout, backend="reference")
        tokens = torch.arange(seqlen)[None] % VOCABULARY
        batch = seqpar_attn.shard_batch(tokens, cu_seqlens=documents, layout=layout)
        packed = {} if documents is None else {"cu_seqlens": batch.cu_seqlens}
        try:
            with torch.no_grad():
                logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packed).logits
            results.append(seqpar_attn.gather(logits, layout=layout))
        except ValueError as error:
            results.append(str(error))
    return results


def test_rotary_frequencies_that_follow_the_length(pool):
    """They are those of one device, or refused: a rank sees the positions of its own shard only."""
    if pool.world_size != 2:
        pytest.skip("two ranks suffice")
    cases = [
        (LONGROPE, "zigzag", 28, None),
        (LONGROPE, "zigzag", 80, None),
        (LONGROPE, "contiguous", 48, None),
        (LONGROPE, "contiguous", 80, [0, 10, 20, 30, 70, 80]),
        (DYNAMIC, "zigzag", 32, None),
        (DYNAMIC, "zigzag", 36, None),
    ]
    results = pool.run(rotary, cases)
    for case, *found in zip(cases, *results):
        parameters, layout, seqlen, _ = case
        if layout == "contiguous" or seqlen == 36:
            assert all(isinstance(x, str) and ("longrope" in x or "'dynamic'" in x) for x in found), (case, found)
        else:
            with torch.no_grad():
                whole = with_rotary(parameters)(torch.arange(seqlen)[None] % VOCABULARY, use_cache=False).logits
            torch.testing.assert_close(found[0], whole, rtol=TOLERANCE, atol=TOLERANCE)


def test_virtual_ranks_and_disable():
    model = build("llama")
    whole = model(input_ids=ids(), use_cache=False).logits
    group = seqpar_attn.LoopbackGroup(3)
    enabled = enable(model, group, method="dist_flash", backend="reference")
    assert model.config._attn_implementation == NAME
    batch = seqpar_attn.shard_batch(ids(), layout="contiguous", group=group)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    torch.testing.assert_close(logits, whole, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        cache = model(
            input_ids=batch.input_ids[:, :30], position_ids=batch.position_ids[:, :30], use_cache=True
        ).past_key_values
        model(input_ids=batch.input_ids[:, 30:33], past_key_values=cache)
    enabled = enable(model, group, backend="reference")  # once more, with other settings
    assert enabled.settings.layout == "zigzag"
    with enabled.paused():
        assert torch.equal(model(input_ids=ids(), use_cache=False).logits, whole)
    batch = seqpar_attn.shard_batch(ids(), group=group)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    logits = seqpar_attn.gather(logits, "zigzag", group)
    torch.testing.assert_close(logits, whole, rtol=TOLERANCE, atol=TOLERANCE)
    group = seqpar_attn.LoopbackGroup(4)
    enabled = enable(model, group, backend="reference", transfer="double", ranks_per_host=2)
    batch = seqpar_attn.shard_batch(ids(), group=group)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    torch.testing.assert_close(seqpar_attn.gather(logits, "zigzag", group), whole, rtol=TOLERANCE, atol=TOLERANCE)
    enabled.disable()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, whole)


def test_refused():
    with pytest.raises(ValueError, match=r"expected method to be one of 'ring', .*, got 'spiral'"):
        enable(build("llama"), method="spiral")
    with pytest.raises(ValueError, match=r"expected a mesh of two dimensions .* for method 'usp', got None"):
        enable(build("llama"), method="usp")
    with pytest.raises(ValueError, match="expected one group for method 'ring', got"):
        enable(build("llama"), (seqpar_attn.LoopbackGroup(2), seqpar_attn.LoopbackGroup(2)))
    with pytest.raises(ValueError, match="expected no transfer for method 'ulysses', got 'ring'"):
        enable(build("llama"), method="ulysses", transfer="ring")
    for method, hosts in (("dist_flash", {"transfer": "double"}), ("ulysses", {"ranks_per_host": 2})):
        with pytest.raises(ValueError, match="expected transfer 'double' and ranks_per_host with method 'ring' only"):
            enable(build("llama"), method=method, **hosts)
    model = build("llama")
    enable(model, seqpar_attn.LoopbackGroup(3), method="ulysses")
    with pytest.raises(ValueError, match="expected nheads divisible by the 3 ranks that exchange heads, got 4"):
        model(input_ids=ids(), use_cache=False)
    with pytest.raises(ValueError, match="expected a transformers model, got Linear"):
        enable(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layout"):
        enable(build("llama"), layout="spiral")
    model = build("llama")
    model.config._attn_implementation = NAME
    with pytest.raises(ValueError, match=r"expected a model after enable\(model, group\), got a LlamaAttention"):
        model(input_ids=ids(), use_cache=False)
    model = build("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    enable(model, backend="reference")
    with pytest.raises(ValueError, match="dropout"):
        model(input_ids=ids(), use_cache=False)
