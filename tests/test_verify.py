"""verify: right models pass, and each fault is found and named, with the same verdict on every rank."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("transformers")
from hf_models import build

import seqpar_attn
from seqpar_attn import LoopbackGroup, memory
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.integrations.verify import VerificationError
from seqpar_attn.testing.distributed import RankPool


@pytest.fixture(scope="module", params=[2, 4])
def pool(request):
    with RankPool(request.param, timeout=120) as pool:
        yield pool


def tokens(length=80):
    return torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(3))


DOCUMENTS = [0, 17, 17, 70, 80]


def prepared(family="llama", dtype=torch.float64, **arguments):
    model = build(family).to(dtype)
    enable(model, arguments.pop("group", None), backend="reference", **arguments)
    return model


def forward(model, batch, **changes):
    part = seqpar_attn.shard_batch(batch["input_ids"], batch["labels"], batch["cu_seqlens"])
    arguments = dict(
        input_ids=part.input_ids,
        position_ids=part.position_ids,
        labels=part.labels,
        shift_labels=part.labels,
        num_items_in_batch=part.num_valid,
        use_cache=False,
    )
    if part.cu_seqlens is not None:
        arguments["cu_seqlens"] = part.cu_seqlens
    return model(**(arguments | changes))


# What is right passes -------------------------------------------------------------------------------------------------


def right(rank, world_size):
    ids, packed = tokens(), {"input_ids": tokens(), "cu_seqlens": DOCUMENTS}
    if world_size == 4:
        mesh = dist.init_device_mesh("cpu", (2, 2))
        return {"usp": str(seqpar_attn.verify(prepared(method="usp", group=mesh), packed))}
    models = {
        "ring": (prepared(), ids),
        "packed": (prepared("gemma2"), packed),
        "dist_flash": (prepared("mistral", method="dist_flash"), ids),
        "bfloat16": (prepared("qwen3", torch.bfloat16), ids),
        "float32": (prepared("qwen2", torch.float32), ids),
        "memory": (prepared(), packed),
    }
    memory.apply(models["memory"][0], activations="offload")
    found = {}
    for name, (model, batch) in models.items():
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        before = [p.detach().clone() for p in model.parameters()]
        found[name] = str(seqpar_attn.verify(model, batch, tokens_per_rank=16))
        assert model.training and model.config._attn_implementation == "seqpar"
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert [p.grad is not None for p in model.parameters()] == [
            p is model.lm_head.weight for p in model.parameters()
        ]
    found["own step"] = str(seqpar_attn.verify(prepared(), ids, step=lambda model, batch: forward(model, batch).loss))
    mean = lambda model, batch: forward(model, batch).loss * world_size  # noqa: E731
    found["mean"] = str(seqpar_attn.verify(prepared(), ids, step=mean, grad_reduction="mean"))
    return found


def test_right_models_pass(pool):
    ranks = pool.run(right)
    assert all(found == ranks[0] for found in ranks)
    assert all(text.startswith("verification passed") for text in ranks[0].values())


def test_virtual_ranks():
    report = seqpar_attn.verify(prepared(group=LoopbackGroup(4), method="ulysses"), tokens(), LoopbackGroup(4))
    assert report.ok and report.first_module is None and report.loss == pytest.approx(report.expected_loss)


# What is wrong is found -----------------------------------------------------------------------------------------------


def cut_labels(model, batch):
    """The usual mistake: the library's own loss on a shard, which shifts the labels that it finds there."""
    part = seqpar_attn.shard_batch(batch["input_ids"])
    logits = model(input_ids=part.input_ids, position_ids=part.position_ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), part.input_ids[:, 1:].flatten()) / dist.get_world_size()


def local_positions(model, batch):
    """Counted from 0 in every shard. (Without documents, the enabled model refuses that itself.)"""
    length = batch["input_ids"].shape[1] // dist.get_world_size()
    return forward(model, batch, position_ids=torch.arange(length)[None]).loss


def scaled_loss(model, batch):
    return forward(model, batch).loss * dist.get_world_size()


def usual(model, batch):
    return forward(model, batch).loss


def scaled_gradients(model, batch):
    """Behind the loss's back, as by a framework that sums what it should average."""
    loss = forward(model, batch).loss
    loss.register_hook(lambda grad: grad * dist.get_world_size())
    return loss


def wrong_scale(model, batch):
    """Of one layer's scores, in the sharded step only."""
    layer = model.model.layers[1].self_attn
    right, layer.scaling = layer.scaling, 0.1
    loss = forward(model, batch).loss
    layer.scaling = right
    return loss


def fails_late(model, batch):
    loss = forward(model, batch).loss
    if dist.get_rank() == 1:
        raise KeyError("a bug of the step")
    return loss


PACKED = {"input_ids": tokens(), "cu_seqlens": DOCUMENTS}
FAULTS = {
    "not replaced": (lambda: build("llama"), tokens(), {"step": usual}, "attention was not replaced", "0.self_attn"),
    "not replaced, usual step": (lambda: build("qwen3"), tokens(), {}, "attention was not replaced", "0.self_attn"),
    "labels": (prepared, tokens(), {"step": cut_labels}, "labels were shifted after sharding", None),
    "positions": (prepared, PACKED, {"step": local_positions}, "position_ids were not sharded", "model.rotary_emb"),
    "positions, refused": (prepared, tokens(), {"step": local_positions}, "expected position_ids of rank", None),
    "scaled loss": (prepared, tokens(), {"step": scaled_loss}, "group's size: they are {W} times", None),
    "averaged": (
        prepared,
        tokens(),
        {"step": usual, "grad_reduction": "mean"},
        "group's size: they are 1/{W}",
        None,
    ),
    "scaled gradients": (
        prepared,
        tokens(),
        {"step": scaled_gradients},
        "gradients were scaled by the group's size: they are {W} times",
        None,
    ),
    "a module": (
        prepared,
        tokens(),
        {"step": wrong_scale},
        "layers.1.self_attn computes something else",
        "1.self_attn",
    ),
    "a bug": (prepared, tokens(), {"step": fails_late}, "rank 1: the step raised KeyError: 'a bug of the step'", None),
}
"""How to make the model, batch, arguments, words of the first cause, end of the first module that differs."""


def wrong(rank, world_size):
    found = {}
    for name, (make, batch, arguments, _, _) in FAULTS.items():
        try:
            seqpar_attn.verify(make(), batch, **arguments)
            found[name] = "passed", "passed", None
        except VerificationError as error:
            quiet = None
            if name == "labels":
                quiet = str(seqpar_attn.verify(make(), batch, raise_on_failure=False, **arguments))
                assert quiet == str(error)
            found[name] = str(error), error.report.causes[0], error.report.first_module
    return found


def test_faults_are_named(pool):
    ranks = pool.run(wrong)
    assert all(found == ranks[0] for found in ranks)
    for name, (_, _, _, words, module) in FAULTS.items():
        text, cause, first = ranks[0][name]
        assert words.format(W=pool.world_size) in cause, (name, text)
        assert (first or "").endswith(module or "") and (first is None) == (module is None), (name, text)


def bad_batches(rank, world_size):
    found = []
    for batch in (
        tokens() if rank else tokens() + 1,
        {"labels": tokens()} if rank == 1 else tokens(),
        tokens().float() if rank == 1 else tokens(),
        tokens(3),
    ):
        try:
            seqpar_attn.verify(prepared(), batch)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found


def test_bad_batches_are_errors_on_every_rank(pool):
    for found in pool.run(bad_batches):
        assert "expected the same input_ids on every rank" in found[0]
        assert "rank 1: expected a batch with input_ids, got dict" in found[1]
        assert "rank 1: expected input_ids of an integer dtype, got torch.float32" in found[2]
        assert f"expected at least {2 * pool.world_size} tokens, got 3" in found[3]
