"""Tiny random transformers models of every family that is tested, and what one device makes of them."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_oss")
VOCABULARY, WINDOW = 61, 7


def build(family: str, layers: int = 2) -> Any:
    """float64 weights from a fixed seed; eager attention, which knows soft caps and sinks."""
    import transformers as hf

    size = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    alternating = ["sliding_attention", "full_attention"] * layers
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": WINDOW}),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
        "gemma2": (
            hf.Gemma2Config,
            hf.Gemma2ForCausalLM,
            {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "layer_types": alternating[:layers]},
        ),
        "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {}),
        "gpt_oss": (
            hf.GptOssConfig,
            hf.GptOssForCausalLM,
            {"sliding_window": WINDOW, "layer_types": alternating[:layers], "num_local_experts": 2,
             "num_experts_per_tok": 1, "experts_implementation": "eager"},
        ),
    }  # fmt: skip
    config_class, model_class, extra = classes[family]
    torch.manual_seed(0)
    model = model_class(config_class(**size, **extra)).double()
    with torch.no_grad():
        for p in model.parameters():  # larger than the library's, so that attention is no average
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + (p.dim() == 1))
    return model.train()


def block_diagonal(boundaries: list[int], window: int | None = None) -> torch.Tensor:
    """Additive mask ``[1, 1, seqlen, seqlen]`` of packed documents, causal."""
    i = torch.arange(boundaries[-1])
    document = torch.bucketize(i, torch.tensor(boundaries[1:]), right=True)
    seen = (document[:, None] == document) & (i[None] <= i[:, None])
    if window is not None:
        seen &= i[None] > i[:, None] - window
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))[None, None]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def one_device(
    family: str, ids: torch.Tensor, documents: list[int] | None
) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Logits, loss and gradients of the whole sequence with the library's own attention."""
    model = build(family)
    options: dict[str, Any] = {}
    labels = ids
    if documents is not None:
        mask = block_diagonal(documents)
        if family in ("gemma2", "gpt_oss"):
            mask = {"full_attention": mask, "sliding_attention": block_diagonal(documents, WINDOW)}
        elif family == "mistral":
            mask = block_diagonal(documents, WINDOW)
        starts = torch.tensor(documents[:-1])
        i = torch.arange(documents[-1])
        options = {
            "attention_mask": mask,
            "position_ids": (i - starts[torch.searchsorted(starts, i, right=True) - 1])[None],
        }
        labels = ids.clone()
        labels[:, documents[1:-1]] = -100  # no document predicts the next one's first token
    result = model(input_ids=ids, labels=labels, use_cache=False, **options)
    result.loss.backward()
    return result.logits.detach(), result.loss.item(), gradients(model)
