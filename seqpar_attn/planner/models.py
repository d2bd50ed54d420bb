"""Decoders by their sizes: built in, or read from a Hugging Face configuration. No transformers needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
"""``model_type`` of decoders whose blocks are of Llama's kind: one attention, and an MLP of three matrices."""


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder of Llama's kind. Biases and the weights of norms are left out: they are below 0.1%."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    headdim: int
    tied: bool = False
    """Whether the head is the embedding."""
    window: int | None = None
    """A sliding window of the configuration, which plans do not know."""

    @property
    def attention_weights(self) -> int:
        """Parameters of a layer's four projections."""
        return self.hidden * self.headdim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.head_weights * (1 if self.tied else 2)
        return self.layers * (self.attention_weights + self.mlp_weights) + embeddings

    def flops_per_token(self, context: int) -> float:
        """Of a training step under a causal mask, nothing counted twice: 6 per parameter of a matrix product, and
        attention's 12 per layer and element of the heads for each of context / 2 keys."""
        weights = self.layers * (self.attention_weights + self.mlp_weights) + self.head_weights
        return 6.0 * weights + 12.0 * self.layers * self.heads * self.headdim * context / 2


MODELS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 4096, 11008, 32, 32, 32, 32000, 128),
        Model("llama-2-13b", 5120, 13824, 40, 40, 40, 32000, 128),
        Model("llama-3-8b", 4096, 14336, 32, 32, 8, 128256, 128),
    )
}


def from_config(config: dict[str, Any], name: str) -> Model:
    """From the fields of a Hugging Face configuration; ValueError for other kinds of models."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"expected model_type of {name} to be one of {', '.join(FAMILIES)}, got {family!r}")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        raise ValueError(f"expected {name} to have positive numbers {', '.join(missing)}, got none")
    heads = config["num_attention_heads"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return Model(
        name=name,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        vocab=config["vocab_size"],
        headdim=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", False)),
        window=window,
    )


def find_model(name: str) -> Model:
    """A built-in name, a folder with a ``config.json``, or such a file; ValueError for anything else."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"expected model to be one of {', '.join(MODELS)}, a folder with a config.json or such a file, got {name!r}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected {path} to be a JSON configuration, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected {path} to hold an object, got {type(config).__name__}")
    return from_config(config, path.parent.name or path.stem)
