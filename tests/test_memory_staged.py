"""Blocks whose tokens come in tiles and whose heads come in groups: the same gradients, in less memory."""

import pytest
import torch
from memory_model import POLICIES, Decoder, assert_same, gradients, make_ids, make_model
from torch import nn

import seqpar_attn
from seqpar_attn import memory
from seqpar_attn.testing.distributed import RankPool


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def ids():
    return make_ids()


@pytest.mark.parametrize(("tile_block", "head_groups", "checkpoint_every"), [(5, 2, 1), (100, 1, 2), (8, 2, 3)])
@pytest.mark.parametrize(("attention", "activations"), POLICIES)
def test_gradients_are_those_without_a_policy(
    model, ids, attention, activations, tile_block, head_groups, checkpoint_every
):
    scale = torch.tensor(0.7, dtype=torch.float64)
    expected = gradients(model, ids, scale=scale)
    applied = memory.apply(
        model,
        attention=attention,
        activations=activations,
        tile_block=tile_block,
        head_groups=head_groups,
        checkpoint_every=checkpoint_every,
        keep_last=1,
    )
    for layer in model.layers:
        layer.mlp.seen.clear()
    for _ in range(2):
        assert_same(gradients(model, ids, scale=scale), expected)
    assert max(model.layers[0].mlp.seen) == min(tile_block, 32)
    with torch.no_grad():
        found = model(ids)
    applied.remove()
    torch.testing.assert_close(found, model(ids), rtol=1e-12, atol=1e-14)


def test_ulysses_exchanges_again(ids):
    torch.manual_seed(0)
    model = Decoder(seqpar_attn.LoopbackGroup(2)).double()
    for layer in model.layers:
        layer.self_attn.function = seqpar_attn.ulysses_attention
    expected = gradients(model, ids)
    memory.apply(model, attention="recompute", tile_block=7, head_groups=2, checkpoint_every=2)
    assert_same(gradients(model, ids), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_oss"])
def test_hugging_face_models(family):
    """Grouped heads, biases, norms of queries and keys, windows, soft caps, fused projections, sinks, experts."""
    pytest.importorskip("transformers")
    from hf_models import VOCABULARY, build
    from hf_models import gradients as gradients_of

    from seqpar_attn.integrations.transformers import enable

    model, group = build(family), seqpar_attn.LoopbackGroup(2)
    enable(model, group, backend="reference")
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    batch = seqpar_attn.shard_batch(tokens, group=group)
    call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    call |= {"labels": batch.labels, "shift_labels": batch.labels}

    def step():
        model.zero_grad()
        loss = model(**call).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: x.clone() for name, x in gradients_of(model).items()}

    expected = step()
    memory.apply(model, attention="recompute", activations="offload", tile_block=5, head_groups=2, checkpoint_every=2)
    found = step()
    scale = max(x.abs().max().item() for name, x in expected.items() if name != "loss")
    scale *= 1e-6 if family == "gemma2" else 1e-12  # it computes its norms' weights' gradients in float32
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=scale, msg=name)


def test_rounding_is_not_worse_than_that_of_the_whole(ids):
    """bfloat16: against float64, sums over tiles do not cost accuracy."""
    torch.manual_seed(0)
    model = Decoder(seqpar_attn.LoopbackGroup(2)).double()
    truth = gradients(model, ids)
    model.bfloat16()
    whole = gradients(model, ids)
    memory.apply(model, attention="recompute", tile_block=3, head_groups=2)
    tiled = gradients(model, ids)

    def errors(found):
        return sum((x.double() - truth[name]).square().sum().item() for name, x in found.items()) ** 0.5

    assert errors(tiled) < 1.1 * errors(whole)


def test_autocast_is_the_same_on_the_way_back(model, ids):
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, ids)
        memory.apply(model, attention="recompute", tile_block=8, head_groups=2, checkpoint_every=2)
        found = gradients(model, ids)
    for name, x in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(x, expected[name], rtol=0, atol=3e-2 * scale, msg=name)


def test_gradients_that_others_hold_are_not_written_to(model, ids):
    """A block's gradient takes the place of the next one's only where nobody else has it."""

    def step():
        model.zero_grad()
        caught, hidden = [], model.embed(ids)
        for number, layer in enumerate(model.layers):
            hidden = layer(hidden)
            if number == 0:
                hidden.register_hook(caught.append)
            if number == 1:
                hidden.retain_grad()
                kept = hidden
            if number == 2:
                shift = torch.zeros_like(hidden, requires_grad=True)
                hidden = hidden + shift  # has the same gradient
        (model.head(hidden).square().mean() + 0.1 * kept.square().mean()).backward()
        return {"hook": caught[0], "retained": kept.grad, "sum": shift.grad} | {
            name: p.grad.clone() for name, p in model.named_parameters()
        }

    expected = step()
    memory.apply(model, attention="recompute", tile_block=8)
    assert_same(step(), expected)


@pytest.mark.parametrize("policy", [("save", "keep"), ("recompute", "offload")])
def test_several_forwards_and_backwards(model, ids, policy):
    other = ids[:1, :16]

    def step():
        model.zero_grad()
        first, second = model(ids).square().mean(), model(other).square().mean()
        model(other)  # never goes back
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = step()
    options = {"attention": policy[0], "activations": policy[1], "tile_block": 7, "checkpoint_every": 2}
    applied = memory.apply(model, **options)
    assert_same(step(), expected)
    held = applied.host_bytes
    assert_same(step(), expected)
    assert applied.host_bytes == held


@pytest.mark.parametrize("tile_block", [None, 8])
def test_dropped_inputs_and_last_blocks_take_no_host_memory(model, ids, tile_block):
    applied = memory.apply(
        model, attention="offload", activations="offload", tile_block=tile_block, checkpoint_every=2, keep_last=1
    )
    for _ in range(2):
        gradients(model, ids)
        # Of four blocks' inputs those of the first and third, of their results all but the last one's.
        assert applied.host_bytes == ids.numel() * (2 * 32 * 8 + 3 * (4 * 8 * 8 + 4 * 8))


def test_dropped_inputs_with_dropout(model, ids):
    """Blocks that are not in stages may draw random numbers: they draw the same ones again."""
    for layer in model.layers:
        layer.dropout.p = 0.3

    def step():
        torch.manual_seed(5)
        found = gradients(model, ids)
        return found | {"next": torch.rand(())}

    expected = step()
    memory.apply(model, checkpoint_every=2)
    assert_same(step(), expected)


def test_frozen_weights(model, ids):
    for name, p in model.named_parameters():
        p.requires_grad_("mlp.up" in name)

    def step():
        model.zero_grad()
        model(ids).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    memory.apply(model, attention="recompute", tile_block=8, head_groups=2)
    assert_same(step(), expected)


def sharded(rank, world_size, order):
    """The worst difference of a sharded model's gradients from the mean of every rank's own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        return Decoder(None).double()

    def shard(model):
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def put(model):
        options = {"tile_block": 5, "head_groups": 2, "checkpoint_every": 2, "keep_last": 1}
        memory.apply(model, attention="recompute", activations="offload", **options)

    ids = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(1))
    own = seqpar_attn.get_layout("zigzag", world_size).shard(ids, rank, 1)
    expected = gradients(build(), own)
    model = build()
    for step in (shard, put) if order == "fsdp first" else (put, shard):
        step(model)
    worst = 0.0
    for _ in range(2):
        found = gradients(model, own)
        for name, x in expected.items():
            total = x.clone()
            torch.distributed.all_reduce(total)
            got = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            worst = max(worst, (got - (x if name == "loss" else total / world_size)).abs().max().item())
    return worst


def test_fsdp():
    with RankPool(2, timeout=120) as pool:
        for order in ("fsdp first", "memory first"):
            assert max(pool.run(sharded, order)) < 1e-12


def test_refused(model, ids):
    for options, message in (
        ({"tile_block": 0}, "expected tile_block to be a positive number of tokens or None, got 0"),
        ({"head_groups": 2}, "expected tile_block with head_groups=2, got none"),
        ({"tile_block": 8, "head_groups": 0}, "expected head_groups to be a positive number of groups, got 0"),
        ({"checkpoint_every": 0}, "expected checkpoint_every to be a positive number of blocks, got 0"),
        ({"keep_last": -1}, "expected keep_last to be a number of blocks, 0 or more, got -1"),
        ({"tile_block": 8, "tile_mlp": 8}, "expected no tile_mlp=8 with tile_block"),
        ({"tile_block": 8, "compile": True}, "expected no compile with tile_block"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.apply(model, **options)
    assert not hasattr(model.layers[0], "_seqpar_attn_memory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_groups": 4}, r"expected head_groups to divide the 2 key heads of block 0 \(Layer\), got 4"),
        ({"dropout": 0.1}, r"expected no dropout in block 0 \(Layer\) with tile_block, .* got dropout with p=0.1"),
        ({"own": False}, r"expected the attention of block 0 \(Layer\) to be this package's, got none"),
        (
            {"bias": torch.zeros(1, 32, 1)},
            r"position_embeddings or position_ids, .* got bias of shape \[1, 32, 1\]",
        ),
        ({"scale": torch.ones(1, requires_grad=True)}, "the only argument of .* that needs a gradient .* got scale"),
    ],
)
def test_refused_when_called(ids, options, message):
    model = Decoder(own=options.pop("own", True))
    for layer in model.layers:
        layer.dropout.p = options.get("dropout", 0.0)
    memory.apply(model, attention="recompute", tile_block=8, head_groups=options.pop("head_groups", 1))
    options.pop("dropout", None)
    with pytest.raises(ValueError, match=message):
        model(ids, **options)


def test_checkpoints_of_several_blocks_know_where_their_input_comes_from(model, ids):
    memory.apply(model, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"expected the input of block 1 \(Layer\) to be the output of"):
        model.layers[1](model.layers[0](model.embed(ids)) + 1.0)


def test_attention_is_called_once():
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(8))

    def forward(hidden):
        q = (hidden * module.weight).unflatten(-1, (2, 4))
        for _ in range(2):
            q = seqpar_attn.ring_attention(q, q, q, group=seqpar_attn.LoopbackGroup(1), backend="reference")
        return q.flatten(2)

    module.forward = forward
    memory.apply(module, blocks=[module], attention="recompute", tile_block=4)
    with pytest.raises(ValueError, match=r"expected one attention call in block 0 .* with tile_block, got 2"):
        module.forward(torch.randn(1, 8, 8, requires_grad=True))
