"""What a decoder's blocks take at their worst moment, counted by the allocator, is what docs/memory.md promises."""

import pytest
import torch

pytest.importorskip("transformers")
from live_bytes import idle_attention, peak_bytes
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel

import seqpar_attn
from seqpar_attn import memory
from seqpar_attn.schedule import choice

TOKENS, HIDDEN, HEADS, HEADDIM, TILE = 4096, 64, 8, 8, 128


def attend(module, query, key, value, mask, **kwargs):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return seqpar_attn.ring_attention(q, k, v, softmax_scale=kwargs["scaling"]), None


def promised(kv_heads, groups):
    """In units of bfloat16 hidden states, of a ring of 8: forward, and backward of the first block on the way back."""
    keys = kv_heads / HEADS
    rows = 4 * HEADS / (2 * HIDDEN)  # lse, or delta
    rotary = 2 * HEADDIM / HIDDEN
    several = groups > 1
    # The embedding, which the decoder holds, two blocks' inputs, the result of attention; and of a group: operands,
    # float32 result, received keys and values twice, and its part of the result.
    group = 1 + 2 * keys + 2 + 2 * 2 * keys + several * (1 + rows)
    attends = 3 + rotary + 1 + rows + group / groups
    # The same three with all of attention's result and the output; or with the output, its norm in tiles and joined.
    finishes, norm = 3 + rotary + 1 + rows + 1, 3 + rotary + 3
    # Two blocks' inputs, gradients of output and input, out and its gradient; dk and dv.
    # Of a group: operands; dq, dk, dv in float32 and in bfloat16; delta; received: keys and values twice, and three
    # times their gradients.
    group = 1 + 2 * keys + 2 + 4 * keys + 1 + 2 * keys + rows + 2 * 2 * keys + 3 * 4 * keys
    backward = 2 + rotary + 2 + 1 + 2 * rows + several * 2 * keys + group / groups
    return max(attends, finishes, norm), backward


@pytest.mark.parametrize(("kv_heads", "groups"), [(2, 2), (8, 4)])
def test_peak(monkeypatch, kv_heads, groups):
    idle_attention(monkeypatch, world_size=8)
    monkeypatch.setattr(choice, "KEYS_PER_STEP", TOKENS)  # buffers of long shards
    AttentionInterface.register("idle", attend)
    AttentionMaskInterface.register("idle", lambda *args, **kwargs: None)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        vocab_size=50,
        max_position_embeddings=1 << 20,
    )
    config._attn_implementation = "idle"
    torch.manual_seed(0)
    model = LlamaModel(config).bfloat16()
    memory.apply(model, attention="recompute", activations="offload", tile_block=TILE, head_groups=groups)
    ids, positions = torch.randint(50, (1, TOKENS)), torch.arange(TOKENS)[None]

    def forward():
        return model(input_ids=ids, position_ids=positions, use_cache=False)[0].sum()

    def step():
        forward().backward()
        model.zero_grad()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operators are small
    try:
        step()  # takes host memory and makes passes
        unit = 2 * TOKENS * HIDDEN
        found = peak_bytes(forward) / unit, peak_bytes(step) / unit
    finally:
        torch.set_num_threads(threads)
    expected = promised(kv_heads, groups)
    weights = 4 * sum(p.numel() for p in model.layers[0].parameters()) / unit
    # A tile's own tensors, which are there at other moments, and sums of weights' gradients.
    assert expected[0] - 0.05 < found[0] < expected[0] + 0.1
    assert expected[1] - 0.05 < found[1] < expected[1] + weights + 0.25
