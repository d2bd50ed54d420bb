"""One row of ``throughput.py`` on this process's GPU, one of many that torchrun started: real training steps.

What is real: the model's sizes and code (random weights, made where their shards lie), FSDP2 over all ranks, attention
over the ranks of a sequence, the loss, AdamW with float32 states, the memory policy. Rank 0 writes the row as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import many
import step_parts
import torch
import torch.distributed as dist
from one_rank_model import MODELS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import seqpar_attn
from seqpar_attn.integrations.linear_loss import use_linear_loss
from seqpar_attn.integrations.transformers import enable
from seqpar_attn.memory.apply import blocks_of


def build(sizes: dict[str, Any], layers: int, group: Any, device: torch.device) -> Any:
    """A sharded Llama with this package's attention over ``group``; no process ever holds the whole of it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers}, max_position_embeddings=1 << 24, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    enable(model, group)
    low = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = p.to_local()  # type: ignore[attr-defined]
            if local.numel():
                local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
    use_linear_loss(model)
    return model.train()


class Row:
    def __init__(self, a: argparse.Namespace, device: torch.device):
        self.a, self.device, self.cuda = a, device, device.type == "cuda"
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.alone = a.context == a.tokens  # data parallel: a sequence per rank
        # Not FSDP's group: in one group the transfers of attention would queue up behind the gathering of parameters.
        self.group = seqpar_attn.LoopbackGroup(1) if self.alone else dist.new_group()
        torch.manual_seed(1 + self.rank)
        self.model = build(dict(MODELS[a.model]), a.layers, self.group, device)
        self.applied = seqpar_attn.memory.apply(
            self.model, attention=a.attention, activations=a.activations, tile_mlp=a.tile_mlp
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.cuda)
        layout = seqpar_attn.get_layout("zigzag", 1 if self.alone else self.ranks)
        self.positions = layout.positions(0 if self.alone else self.rank, a.context)[None].to(device)

    def step(self) -> float:
        """A whole training step; the loss of this rank's tokens over all tokens."""
        vocabulary = int(MODELS[self.a.model]["vocab_size"])
        ids = torch.randint(vocabulary, (2, 1, self.a.tokens), device=self.device)
        loss = self.model(
            input_ids=ids[0],
            position_ids=self.positions,
            labels=ids[1],
            shift_labels=ids[1],
            num_items_in_batch=self.a.tokens * self.ranks,
            use_cache=False,
        ).loss
        (loss * self.ranks).backward()  # FSDP averages what has to be summed
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item()  # waits for the device

    def measure(self) -> dict[str, Any]:
        seconds, losses = [], []
        for n in range(self.a.steps + 1):
            dist.barrier()
            start = time.perf_counter()
            losses.append(self.step())
            dist.barrier()
            if n:
                seconds.append(time.perf_counter() - start)
            elif self.cuda:  # the first step compiles and takes page-locked memory
                torch.cuda.reset_peak_memory_stats()
        if not all(math.isfinite(x) for x in losses):
            raise ValueError(f"expected finite losses, got {losses}")
        peak = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if self.cuda else [0, 0]
        transport = "" if self.alone else seqpar_attn.comm.transport(self.group).name
        of_all = torch.tensor([*peak, self.applied.host_bytes], dtype=torch.float64, device=self.device)
        dist.all_reduce(of_all, dist.ReduceOp.MAX)
        allocated, reserved, host = (int(x) for x in of_all.tolist())
        profiled = {"profile": step_parts.of_step(self.step)} if self.a.profile and self.cuda else {}
        return profiled | {
            "transport": transport, "step_seconds": seconds, "step_s": statistics.median(seconds), "losses": losses,
            "peak_bytes": allocated, "reserved_bytes": reserved, "host_bytes": host,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--attention", required=True)
    parser.add_argument("--activations", required=True)
    for name in ("context", "tokens", "layers", "steps", "tile-mlp"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--profile", action="store_true")
    a = parser.parse_args()
    os.environ.update(many.NO_MULTICAST)
    if a.cpu:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = many.device(a.cpu)
    dist.init_process_group("gloo" if a.cpu else "nccl")
    row = Row(a, device).measure()
    if dist.get_rank() == 0:
        a.into.write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
