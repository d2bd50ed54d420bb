"""What is kept, offloaded and computed again changes no gradient, and attention is not computed twice."""

import gc

import pytest
import torch
from memory_model import POLICIES, Decoder, assert_same, gradients, make_ids, make_model
from torch import nn

import seqpar_attn
from seqpar_attn import memory
from seqpar_attn.comm.loopback import Loopback
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.memory import checkpoint, offload
from seqpar_attn.memory.apply import blocks_of
from seqpar_attn.testing.distributed import RankPool


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def ids():
    return make_ids()


@pytest.fixture
def counted(monkeypatch):
    """How many attention kernels and exchanges have run."""
    counts = {"forward": 0, "exchange": 0}

    def counting(cls, method, key):
        original = getattr(cls, method)

        def call(*args, **kwargs):
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, method, call)

    counting(ReferenceKernel, "forward", "forward")
    counting(Loopback, "exchange", "exchange")
    return counts


@pytest.mark.parametrize("tile_mlp", [None, 5, 100])
@pytest.mark.parametrize(("attention", "activations"), POLICIES)
def test_gradients_are_those_without_a_policy(model, ids, attention, activations, tile_mlp):
    expected = gradients(model, ids)
    applied = memory.apply(model, attention=attention, activations=activations, tile_mlp=tile_mlp)
    for layer in model.layers:
        layer.mlp.seen.clear()
    for _ in range(2):
        assert_same(gradients(model, ids), expected)
    assert max(model.layers[0].mlp.seen) == min(tile_mlp or 32, 32)
    scale = torch.tensor(0.7, dtype=torch.float64)
    found = gradients(model, ids, scale=scale)
    applied.remove()
    assert_same(found, gradients(model, ids, scale=scale))


@pytest.mark.parametrize(("attention", "activations"), POLICIES)
def test_what_recomputation_runs(model, ids, counted, attention, activations):
    logits = model(ids)
    plain = dict(counted)
    logits.sum().backward()
    backward = counted["exchange"] - plain["exchange"]
    assert plain["forward"] > 0 and plain["exchange"] > 0 and counted["forward"] == plain["forward"]
    memory.apply(model, attention=attention, activations=activations)
    counted.update(forward=0, exchange=0)
    logits = model(ids)
    assert counted == plain
    counted.update(forward=0, exchange=0)
    logits.sum().backward()
    again = plain if attention == "recompute" else {"forward": 0, "exchange": 0}
    assert counted == {"forward": again["forward"], "exchange": backward + again["exchange"]}


@pytest.mark.parametrize(("attention", "activations"), POLICIES)
def test_several_forwards_and_backwards(model, ids, attention, activations):
    """Micro-batches whose forwards come first, other lengths in between, and a graph that is used twice."""
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
    memory.apply(model, attention=attention, activations=activations)
    assert_same(step(), expected)
    assert_same(step(), expected)


def test_host_memory_is_reused_and_freed(model, ids):
    applied = memory.apply(model, attention="offload", activations="offload")
    gradients(model, ids)
    gc.collect()
    used = applied.host_bytes
    tokens = ids.numel()
    assert used == 4 * tokens * (32 * 8 + 4 * 8 * 8 + 4 * 8)  # per layer: input, out, lse in float64
    gradients(model, ids)
    assert applied.host_bytes == used
    applied.remove()
    assert applied.host_bytes == 0 and "forward" not in model.layers[0].__dict__


def test_no_gradients_no_checkpoints(model, ids, monkeypatch):
    memory.apply(model)
    expected = model(ids)
    monkeypatch.setattr(checkpoint, "Block", None)
    with torch.no_grad():
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("attention", ["save", "offload"])
def test_compiled_inside(ids, attention):
    torch.manual_seed(0)
    model = Decoder().double()
    expected = gradients(model, ids)
    memory.apply(model, attention=attention, activations="offload", tile_mlp=10, compile={"backend": "aot_eager"})
    assert_same(gradients(model, ids), expected)


def sharded(rank, world_size, order, policy):
    """Gradients of a model under FSDP2, whose every rank has a part of the sequence."""
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

    ids = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(1))
    own = seqpar_attn.get_layout("zigzag", world_size).shard(ids, rank, 1)
    expected = gradients(build(), own)  # of this rank's loss only
    model = build()
    steps = [shard, lambda m: memory.apply(m, **policy)]
    for step in steps if order == "fsdp first" else steps[::-1]:
        step(model)
    found = gradients(model, own)
    worst = 0.0
    for name, x in expected.items():
        total = x.clone()
        torch.distributed.all_reduce(total)
        got = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        reference = x if name == "loss" else total / world_size
        worst = max(worst, (got - reference).abs().max().item())
    return worst


@pytest.mark.parametrize("order", ["fsdp first", "memory first"])
@pytest.mark.parametrize(
    "policy",
    [
        {"attention": "offload", "activations": "offload", "tile_mlp": 5},
        {"activations": "offload", "compile": {"backend": "aot_eager"}},
        {},
    ],
    ids=["offload", "compiled", "save"],
)
def test_fsdp(order, policy):
    with RankPool(2, timeout=120) as pool:
        assert max(pool.run(sharded, order, policy)) < 1e-12


def test_bad_policies(model, ids):
    for options, message in (
        ({"attention": "keep"}, "expected attention to be one of 'save', 'offload', 'recompute', got 'keep'"),
        ({"activations": "save"}, "expected activations to be one of 'keep', 'offload', got 'save'"),
        ({"tile_mlp": 0}, "expected tile_mlp to be a positive number of tokens or None, got 0"),
        ({"blocks": []}, "expected at least one block, got none"),
        ({"blocks": [nn.Linear(2, 2)], "tile_mlp": 4}, "expected Linear to have an MLP named"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.apply(model, **options)
    model.is_gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"call gradient_checkpointing_disable\(\)"):
        memory.apply(model)
    del model.is_gradient_checkpointing
    memory.apply(model)
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match=r"got one on Layer: remove\(\) it"):
        memory.apply(model)
    with pytest.raises(ValueError, match=r"expected no key-value cache .* block 0 \(Layer\)"):
        model(ids, past_key_values=object())


def test_attention_of_others_is_named(ids):
    model = Decoder(own=False)
    memory.apply(model)
    with pytest.raises(ValueError, match=r"expected the attention of block 0 \(Layer\) to be this package's, got none"):
        model(ids)


def test_too_little_host_memory_is_said_before_the_second_block(model, ids, monkeypatch):
    per_block = ids.numel() * (32 * 8 + 4 * 8 * 8 + 4 * 8)
    monkeypatch.setattr(offload, "available_host_memory", lambda: 2 * per_block)
    memory.apply(model, attention="offload", activations="offload")
    ran = []
    model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=r"expected host memory for .* GiB of offloaded tensors, got .* GiB available"):
        model(ids)
    assert not ran


def test_available_host_memory():
    available = memory.available_host_memory()
    assert available is None or 0 < available < 1 << 50


def test_changed_results_are_noticed():
    q = torch.randn(1, 16, 2, 8, dtype=torch.float64, requires_grad=True)

    def block(hidden):
        out = seqpar_attn.ring_attention(hidden, q, q, group=None, backend="reference")
        with torch.no_grad():
            out.mul_(2.0)
        return out

    module = nn.Module()
    module.weight, module.forward = nn.Parameter(torch.ones(1)), block
    memory.apply(module, blocks=[module])
    result = module.forward(torch.randn(1, 16, 2, 8, dtype=torch.float64, requires_grad=True))
    with pytest.raises(RuntimeError, match="expected the results of attention call 0 unchanged, got modified ones"):
        result.sum().backward()


def test_blocks_are_found():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Expert() for _ in range(8))
    assert blocks_of(model) == list(model.layers)
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    with pytest.raises(ValueError, match=r"expected one list of blocks in Module, got 2: pass blocks=\.\.\."):
        blocks_of(model)
