"""One rank of W of a real decoder on one GPU: Hugging Face's Llama, FSDP2's shards, this rank's attention.

What is real: the model's code and sizes (random weights), the parameters', gradients' and optimizer's shards, the
kernels, the memory policy and its copies to the host. What stands in: FSDP2's all-gather copies the own shard W times
and its reduce-scatter keeps the first part, and attention's transfers are local copies (see one_rank.OneRank).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import torch
import torch.distributed as dist
from one_rank import OneRank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

import seqpar_attn
from seqpar_attn import autograd, kernels
from seqpar_attn.testing.still import Idle, Still

ATTENTION = "seqpar_benchmark"

MODELS: dict[str, dict[str, int | float]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                    "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500},
}  # fmt: skip


def parameters_in_gemms(sizes: dict[str, Any]) -> int:
    """All but the embedding: those of the layers' matrices and of the head."""
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    headdim = hidden // heads
    layer = hidden * headdim * (2 * heads + 2 * kv_heads) + 3 * hidden * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * layer + sizes["vocab_size"] * hidden


def flops_per_token(sizes: dict[str, Any], context: int) -> float:
    """Of a training step under a causal mask, nothing counted twice: 6 per parameter of a GEMM, and attention's."""
    return 6.0 * parameters_in_gemms(sizes) + 12.0 * sizes["num_hidden_layers"] * sizes["hidden_size"] * context / 2


class _Gather(AllGather):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False):
        own = dist.get_rank(group)  # whose place in the output is the input
        for rank, shard in enumerate(output_tensor.view(dist.get_world_size(group), -1)):
            if rank != own:
                shard.copy_(input_tensor)


class _Scatter(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ):
        output_tensor.view(-1).copy_(input_tensor.view(dist.get_world_size(group), -1)[0])


@dataclass
class Parts:
    """Milliseconds of parts of a step, by events around them."""

    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(default_factory=dict)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self.events.setdefault(name, []).append((begin, end))
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        return {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in self.events.items()}


@contextlib.contextmanager
def stand_in(world_size: int, rank: int, parts: Parts | None, idle: bool, cuda: bool) -> Iterator[None]:
    """Attention of this rank without the other ones. ``idle``: its kernels do nothing, with all its buffers."""
    comm = OneRank(world_size, rank, "device") if cuda else Still(world_size, [rank])
    saved = autograd.communicator, autograd.forward_pass, autograd.backward_pass, kernels.resolve
    autograd.communicator = lambda name, device: comm  # type: ignore[assignment]
    if parts is not None:
        autograd.forward_pass = parts.timed("attention forward", autograd.forward_pass)
        autograd.backward_pass = parts.timed("attention backward", autograd.backward_pass)
    if idle:
        kernels.resolve = lambda *args, **kwargs: Idle()  # type: ignore[assignment]
    try:
        yield
    finally:
        autograd.communicator, autograd.forward_pass, autograd.backward_pass, kernels.resolve = saved  # type: ignore[assignment]


def _attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return seqpar_attn.ring_attention(q, k, v, softmax_scale=kwargs["scaling"]), None


def begin(world_size: int, rank: int) -> None:
    """A process group of ``world_size`` ranks of which there is this one only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AttentionInterface, AttentionMaskInterface

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def build(sizes: dict[str, Any], layers: int, world_size: int, device: torch.device, parts: Parts | None) -> nn.Module:
    """``(input_ids, labels, position_ids) -> loss``, sharded over ``world_size`` ranks, bf16 with fp32 shards."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers}, max_position_embeddings=1 << 24)
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    mesh = init_device_mesh(device.type, (world_size,))
    options: dict[str, Any] = {"mesh": mesh}
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_Gather())
            module.set_custom_reduce_scatter(_Scatter())
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = p.to_local()
            if local.numel():
                local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
    loss = seqpar_attn.linear_cross_entropy
    if parts is not None:
        loss = parts.timed("loss", loss)

    def forward(input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        return loss(hidden, model.lm_head.weight, labels, reduction="sum") / labels.numel()

    model.forward = forward
    return model.train()
