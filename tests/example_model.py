"""A tiny random model with a tokenizer, in a folder, as the examples load one; and texts for it."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


def tokenizer() -> Any:
    """A token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={"<s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def save(folder: Path, family: str = "llama") -> Path:
    import transformers as hf

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {"sliding_window": 16, "final_logit_softcapping": 3.0}),
    }
    config_class, model_class, extra = kinds[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
        pad_token_id=None, **extra,
    )  # fmt: skip
    model = model_class(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(folder: Path, count: int = 2, words: int = 200) -> Path:
    """Sentences of random words, in as many files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(count):
        text = " ".join("".join(rng.choices("abcdefgh", k=4)) + rng.choice(("", "", ".")) for _ in range(words))
        (folder / f"text{i}.txt").write_text(text, encoding="utf-8")
    return folder
