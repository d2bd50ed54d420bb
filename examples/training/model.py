"""The model of a run: its configuration and rotary base, its parameters over all ranks, and its end as safetensors."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import seqpar_attn
from seqpar_attn.integrations.linear_loss import use_linear_loss
from seqpar_attn.integrations.transformers import Enabled, enable
from seqpar_attn.memory.apply import blocks_of

from .ranks import Ranks


def configuration(args: argparse.Namespace) -> Any:
    """The model's configuration, with the rotary base and scaling asked for. ValueError if it has no place for them."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a model or a folder with a config.json, got {args.model!r}: {error}") from error
    rope = getattr(config, "rope_parameters", None)
    if args.rope_theta is not None:
        if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
            raise ValueError(
                f"expected a model with one rotary embedding for --rope-theta, got {type(config).__name__}"
            )
        rope = {**rope, "rope_theta": args.rope_theta}
        if args.rope_factor is not None:
            rope = {"rope_type": args.rope_type, "rope_theta": args.rope_theta, "factor": args.rope_factor}
            rope["original_max_position_embeddings"] = config.max_position_embeddings
        config.rope_parameters = rope
    longest = args.pose_context or args.seq_length
    config.max_position_embeddings = max(longest, getattr(config, "max_position_embeddings", 0) or 0)
    config.use_cache = False
    return config


def build(args: argparse.Namespace, config: Any, ranks: Ranks) -> tuple[Any, Enabled]:
    """The model with sharded parameters, this package's attention and loss, and the memory policy asked for.

    Every rank makes it without memory (on "meta"); the first one alone loads the weights and sends each to its shards.
    """
    from transformers import AutoModelForCausalLM

    def load() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if args.random_weights:
            torch.manual_seed(args.seed)
            source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            source = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32)
        return source.state_dict(), dict(source.named_buffers())

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enabled = enable(model, ranks.sequence, method=args.method, backend=args.backend)
    layout = seqpar_attn.get_layout(enabled.settings.layout, ranks.sequence_size)
    if args.seq_length % layout.multiple:
        raise ValueError(
            f"expected --seq-length divisible by {layout.multiple} for {ranks.sequence_size} ranks in the "
            f"{layout.name} layout, got {args.seq_length}"
        )
    loaded: list[Any] = []
    ranks.on_first(lambda: loaded.extend(load()))
    weights, buffers = loaded or ({}, {})
    low = torch.bfloat16 if args.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    blocks = blocks_of(model)
    for module in (*blocks, model):
        fully_shard(module, mesh=ranks.everyone, mp_policy=policy)
    model.to_empty(device=ranks.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.world_size > 1)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        if ranks.first:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    use_linear_loss(model)
    if args.memory != "none":
        seqpar_attn.memory.apply(
            model,
            attention=args.memory,
            activations=args.activations,
            tile_mlp=args.tile_mlp,
            blocks=blocks,
            compile=args.compile,
        )
    return model.train(), enabled


def save(folder: Path, model: Any, config: Any, tokenizer: Any, dtype: torch.dtype, ranks: Ranks) -> None:
    """Weights, configuration and tokenizer as ``from_pretrained`` reads them. Called by all ranks, written by one."""
    from transformers import AutoModelForCausalLM

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write() -> None:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        plain.to_empty(device="cpu")
        plain.tie_weights()
        plain.load_state_dict({name: x.to(dtype) for name, x in full.items()}, strict=False)
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    ranks.on_first(write)


def parameters_in_products(model: Any) -> int:
    """All parameters but the embedding's; the head's count even if they are the embedding's. Of all ranks."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() for p in model.parameters()) - (0 if embedding is head else embedding.numel())


def flops(config: Any, parameters: int, rows: int, seqlen: int, cu_seqlens: Sequence[int] | None) -> float:
    """Of a training step's matrix products on ``rows`` sequences of ``seqlen`` tokens, nothing counted twice.

    6 per token and parameter, and 12 per attended pair, head and dimension. All experts of a mixture count.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    bounds = cu_seqlens or (0, seqlen)
    pairs = 0.0
    for kind in kinds:
        limit = window if window and kind == "sliding_attention" else seqlen
        for a, b in itertools.pairwise(bounds):
            length, seen = b - a, min(b - a, limit)
            pairs += length * seen - seen * seen / 2
    return rows * (6.0 * parameters * seqlen + 12.0 * width * pairs)
