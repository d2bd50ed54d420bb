"""Code as EasyContext's users write it: loss and gradients on two ranks are those of one."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
from hf_models import build

from seqpar_attn.integrations import easy_context
from seqpar_attn.integrations.easy_context import (
    FAMILIES,
    apply_seq_parallel_monkey_patch,
    apply_unsloth_offloaded_gradient_checkpoint_monkey_patch,
    prepare_dataloader,
    prepare_seq_parallel_inputs,
    remove_monkey_patches,
)
from seqpar_attn.integrations.transformers import enabled
from seqpar_attn.testing.distributed import RankPool

SEQLEN = 48
TOLERANCE = 2e-5
"""As in test_transformers: the library computes norms in float32."""


@pytest.fixture(autouse=True)
def clean():
    yield
    remove_monkey_patches()


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=240) as pool:
        yield pool


def tokens(length=SEQLEN + 1):
    return torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(7))


def train_step(seq_algo, model, rank, world_size, seqlen=SEQLEN, **degree):
    """The body of EasyContext's training loop, without the optimizer: the loss of this rank's tokens."""
    batch = tokens(seqlen + 1)
    input_ids, target_ids = batch[:, :-1], batch[:, 1:]
    position_ids = torch.arange(seqlen).unsqueeze(0).expand(input_ids.shape[0], -1)
    prepared = prepare_seq_parallel_inputs(
        seq_algo, input_ids, position_ids, target_ids, rank, world_size, torch.device("cpu"), **degree
    )
    logits = model(prepared["local_input_ids"], position_ids=prepared["local_position_ids"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), prepared["local_target_ids"].flatten())
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    ("zigzag_ring_attn", "llama", {}, True),
    ("zigzag_ring_attn", "mistral", {}, False),
    ("dist_flash_attn", "llama", {}, False),
    ("ulysses_attn", "mistral", {}, True),
    ("usp_attn", "llama", {"ring_degree": 2}, False),
    ("usp_attn", "qwen3", {"ring_degree": 1}, True),
    ("zigzag_ring_attn", "gemma2", {}, False),
]


def steps(rank, world_size):
    """Per case the mean loss and the mean gradients, as DistributedDataParallel makes them."""
    results = []
    for seq_algo, family, degree, offload in CASES:
        early = family == "llama"  # a family may be named after its model was made, too
        if early:
            apply_seq_parallel_monkey_patch(seq_algo, family)
        model = build(family)
        if not early:
            apply_seq_parallel_monkey_patch(seq_algo, family)
        if offload:
            apply_unsloth_offloaded_gradient_checkpoint_monkey_patch()
            model.gradient_checkpointing_enable()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for seqlen in (24, SEQLEN):  # a new length is nothing special
            model.zero_grad()
            loss = train_step(seq_algo, wrapped, rank, world_size, seqlen, **degree)
        with torch.no_grad():
            model.eval()
            evaluated = prepare_seq_parallel_inputs(
                seq_algo, tokens(SEQLEN), torch.arange(SEQLEN)[None], None, rank, world_size, "cpu", **degree
            )
            assert evaluated["local_target_ids"] is None
            model(evaluated["local_input_ids"], position_ids=evaluated["local_position_ids"], use_cache=False)
        dist.all_reduce(loss)
        results.append((loss.item() / world_size, gradients(model)))
        settings = enabled(model).settings
        assert settings.layout == {"usp_attn": f"zigzag/{2 // degree.get('ring_degree', 1)}"}.get(
            seq_algo, settings.layout
        )
        if offload:
            model.gradient_checkpointing_disable()
        remove_monkey_patches()
        assert enabled(model) is None
    return results


def test_as_on_one_rank(pool):
    for (seq_algo, family, degree, _), (loss, found) in zip(CASES, pool.run(steps)[0]):
        model = build(family)
        expected_loss = train_step("data_parallel", model, 0, 1)
        expected = gradients(model)
        assert abs(loss - expected_loss.item()) < TOLERANCE * expected_loss.item(), (seq_algo, family)
        scale = max(x.abs().max().item() for x in expected.values())
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            worst = (found[name] - x).abs().max().item()
            assert worst < TOLERANCE * scale, f"{seq_algo} {degree} {family} {name}: {worst} of {scale}"


def test_offloaded_checkpoints_without_sequence_parallelism():
    """data_parallel has the library's attention, which is computed again."""
    model = build("llama")
    train_step("data_parallel", model, 0, 1)
    plain = gradients(model)
    model.zero_grad()
    apply_unsloth_offloaded_gradient_checkpoint_monkey_patch()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()  # twice is once
    runs = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    train_step("data_parallel", model, 0, 1)
    hook.remove()
    assert len(runs) == 2  # forward, and once more in backward
    assert all(torch.equal(x, plain[name]) for name, x in gradients(model).items())
    model.gradient_checkpointing_disable()
    assert "forward" not in model.model.layers[0].__dict__


FAULTS = {
    "algorithm": ({"seq_algo": "spiral"}, "expected seq_algo to be one of zigzag_ring_attn, .*, got 'spiral'"),
    "length": ({"length": 46}, "expected seqlen divisible by 4 .* got 46; pad with pad_batch"),
    "degree": ({"seq_algo": "usp_attn", "ring_degree": 3}, "expected a ring_degree that divides world_size 2, got 3"),
    "other shape": ({"length": 44}, "expected the same input_ids shape on every rank"),
    "positions": ({"positions": 24}, r"expected position_ids of shape \[1, 48\], got \[1, 24\]"),
    "targets": ({"targets": 47}, r"expected target_ids of shape \[1, 48\], got \[1, 47\]"),
}


def prepare(seq_algo="zigzag_ring_attn", length=SEQLEN, positions=None, targets=None, rank=0, world_size=2, **degree):
    x = tokens(length)
    position_ids = torch.arange(positions or length)[None]
    return prepare_seq_parallel_inputs(
        seq_algo, x, position_ids, x[:, : targets or length], rank, world_size, "cpu", **degree
    )


def faulty(rank, world_size):
    """What every rank hears of a fault of rank 1."""
    found = {}
    for name, (arguments, _) in FAULTS.items():
        try:
            prepare(rank=rank, **(arguments if rank == 1 else {}))
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    prepare(rank=rank)
    return found


def test_a_fault_of_one_rank_is_an_error_on_all(pool):
    import re

    for found in pool.run(faulty):
        for name, (_, message) in FAULTS.items():
            assert re.search(message, found[name]), (name, found[name])


def test_inputs():
    """Tokens, positions and targets stay together; nothing is dropped, nothing sharded twice."""
    parts = [prepare(rank=rank) for rank in (0, 1)]
    assert parts[0]["local_position_ids"].tolist() == [[*range(12), *range(36, 48)]]
    assert parts[1]["local_position_ids"].tolist() == [[*range(12, 36)]]
    for part in parts:
        assert torch.equal(part["local_input_ids"], tokens(SEQLEN)[:, part["local_position_ids"][0]])
        assert torch.equal(part["local_target_ids"], part["local_input_ids"])
    grid = [prepare("usp_attn", rank=rank, world_size=4, ring_degree=2)["local_position_ids"] for rank in range(4)]
    assert [x.tolist() for x in grid] == [
        [[*range(12)]], [[*range(36, 48)]], [[*range(12, 24)]], [[*range(24, 36)]]
    ]  # fmt: skip
    whole = prepare("data_parallel", length=47)
    assert torch.equal(whole["local_input_ids"], tokens(47))


class Accelerator:
    def prepare(self, dataloader):
        return ("prepared", dataloader)


def test_dataloader():
    for seq_algo in ("zigzag_ring_attn", "dist_flash_attn", "ulysses_attn", "usp_attn"):
        assert prepare_dataloader(seq_algo, "loader", Accelerator()) == "loader"
    assert prepare_dataloader("data_parallel", "loader", Accelerator()) == ("prepared", "loader")
    with pytest.raises(ValueError, match="expected seq_algo to be one of"):
        prepare_dataloader("spiral", "loader", Accelerator())


def test_what_is_patched_and_undone():
    from transformers import LlamaPreTrainedModel, PreTrainedModel

    enable, disable = PreTrainedModel.gradient_checkpointing_enable, PreTrainedModel.gradient_checkpointing_disable
    llama, mistral = build("llama"), build("mistral")
    apply_seq_parallel_monkey_patch("zigzag_ring_attn", "llama")
    positions = torch.arange(SEQLEN)[None]
    llama(tokens(SEQLEN), position_ids=positions, use_cache=False)
    mistral(tokens(SEQLEN), position_ids=positions, use_cache=False)
    assert enabled(llama) is not None and enabled(mistral) is None
    with enabled(llama).paused():
        llama(tokens(SEQLEN), use_cache=False)
        assert llama.config._attn_implementation == "eager"
    apply_seq_parallel_monkey_patch("dist_flash_attn", "llama")  # another algorithm for the same models
    llama(tokens(SEQLEN), position_ids=positions, use_cache=False)
    assert enabled(llama).settings.method == "dist_flash"
    apply_seq_parallel_monkey_patch("ulysses_attn", mistral)  # a model by itself
    assert enabled(mistral).settings.method == "ulysses"
    apply_seq_parallel_monkey_patch("usp_attn", "llama", ring_degree=2)  # which prepare then takes up
    assert prepare("usp_attn", world_size=4)["local_position_ids"].tolist() == [[*range(12)]]
    apply_unsloth_offloaded_gradient_checkpoint_monkey_patch()
    apply_seq_parallel_monkey_patch("data_parallel", "llama")
    assert enabled(llama) is None and "__call__" not in LlamaPreTrainedModel.__dict__
    remove_monkey_patches()
    assert enabled(mistral) is None
    assert PreTrainedModel.gradient_checkpointing_enable is enable
    assert PreTrainedModel.gradient_checkpointing_disable is disable
    assert not easy_context._state.families


def test_refused():
    with pytest.raises(ValueError, match=r"expected model to be one of llama, mistral, .* got 'gpt2'"):
        apply_seq_parallel_monkey_patch("zigzag_ring_attn", "gpt2")
    with pytest.raises(ValueError, match="expected seq_algo to be one of"):
        apply_seq_parallel_monkey_patch("ring", "llama")
    with pytest.raises(ValueError, match="expected model to be a name or a transformers model, got Linear"):
        apply_seq_parallel_monkey_patch("ulysses_attn", torch.nn.Linear(2, 2))
    for family in FAMILIES:  # every name is one that the library knows
        apply_seq_parallel_monkey_patch("ulysses_attn", family)
