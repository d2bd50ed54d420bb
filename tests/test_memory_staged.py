"""Blocks whose tokens come in tiles and whose heads come in groups: the same gradients, in less memory."""

import itertools

import pytest
import torch
from memory_model import Decoder, gradients
from torch import nn

import seqpar_attn
from seqpar_attn import memory
from seqpar_attn.testing.distributed import RankPool

POLICIES = list(itertools.product(("save", "offload", "recompute"), ("keep", "offload")))


class Ulysses(Decoder):
    """As Decoder, but every block exchanges heads over two virtual ranks."""

    def __init__(self):
        super().__init__(seqpar_attn.LoopbackGroup(2))
        for layer in self.layers:
            layer.self_attn.function = seqpar_attn.ulysses_attention


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(seqpar_attn.LoopbackGroup(4)).double()


@pytest.fixture
def ids():
    return torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


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
