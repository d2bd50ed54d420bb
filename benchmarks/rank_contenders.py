"""Who takes part in ``ranks.py``: this package's methods, ring-flash-attention's zigzag, torch's context_parallel.

All attend one sequence, made chunk by chunk from seeds so that no rank ever holds all of it, and every contender's
output and gradients are compared with those of our zigzag before anything is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common  # noqa: F401  (first: finds the checkout)
import flash_attn_stand_in
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqpar_attn
from seqpar_attn.comm import set_transport

Tensors = tuple[torch.Tensor, ...]
REFERENCE = "zigzag"
PUSHED = "copy engines"
"""Of a method whose transfers are the symmetric transport's."""


@dataclass(frozen=True)
class Problem:
    """Causal attention over ``tokens`` per rank; a batch of one."""

    tokens: int
    nheads: int
    nheads_kv: int
    headdim: int
    dtype: torch.dtype
    backend: str

    def make(self, positions: torch.Tensor, device: torch.device) -> Tensors:
        """q, k, v, dout ``[1, s, h, d]`` of these tokens, which are whole chunks of half a rank's tokens."""
        chunk, parts = self.tokens // 2, []
        for first in positions[::chunk].tolist():
            generator = torch.Generator(device).manual_seed(1 + first // chunk)
            shapes = [(1, chunk, n, self.headdim) for n in (self.nheads, self.nheads_kv, self.nheads_kv, self.nheads)]
            parts.append([torch.randn(s, generator=generator, device=device).to(self.dtype) for s in shapes])
        q, k, v, dout = (torch.cat(x, 1) for x in zip(*parts))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def flops(self, seqlen: int, direction: str) -> float:
        """Of the whole sequence."""
        forward = 2.0 * self.nheads * self.headdim * float(seqlen) ** 2
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]


@dataclass
class Contender:
    """``attend`` gets what ``given`` made of a rank's q, k, v; its output compares after ``back``."""

    layout: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    transposed: bool = False
    """Takes ``[b, h, s, d]``."""
    note: str = ""


def _torch(backend: SDPBackend, rotate: str, repeat: bool, mesh: DeviceMesh, tokens: int, name: str) -> Contender:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    @contextlib.contextmanager
    def scope():
        set_rotate_method(rotate)
        # It shards buffers in place at its entrance, before the clock starts; the tensors attended are shards already.
        buffer = torch.zeros(1, tokens * mesh.size(), device=mesh.device_type)
        with (
            sdpa_kernel(backend),
            context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1], no_restore_buffers={buffer}),
        ):
            yield

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if repeat:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        # Asked for through the module: the context replaces the function in it.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return Contender("zigzag", attend, scope, transposed=True, note=name + (", key heads repeated" if repeat else ""))


def _zigzag_of_peer(device: torch.device, dtype: torch.dtype) -> Contender:
    function = flash_attn_stand_in.zigzag()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q, k, v, causal=True, group=dist.group.WORLD)

    return Contender("zigzag", attend, note=flash_attn_stand_in.note(device, dtype))


def ours(problem: Problem, ranks: int, device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    """Our methods, and why the others cannot take part."""

    def of(function: Callable[..., torch.Tensor], layout: str, **options: Any) -> Contender:
        return Contender(layout, lambda q, k, v: function(q, k, v, backend=problem.backend, **options))

    pushing = dist.new_group()
    set_transport(pushing, "symmetric")
    set_transport(None, "p2p")
    found = {
        REFERENCE: of(seqpar_attn.ring_attention, "zigzag"),
        f"{REFERENCE}, {PUSHED}": of(seqpar_attn.ring_attention, "zigzag", group=pushing),
        "dist_flash": of(seqpar_attn.dist_flash_attention, "contiguous"),
        f"dist_flash, {PUSHED}": of(seqpar_attn.dist_flash_attention, "contiguous", group=pushing),
    }
    absent: dict[str, str] = {}
    if problem.nheads % ranks:
        absent["ulysses"] = f"{problem.nheads} heads do not divide among {ranks} ranks"
    else:
        found["ulysses"] = of(seqpar_attn.ulysses_attention, "contiguous")
        found[f"ulysses, {PUSHED}"] = of(seqpar_attn.ulysses_attention, "contiguous", group=pushing)
    if ranks % 2 or ranks < 4 or problem.nheads % 2:
        absent["usp"] = f"no grid of rows of two of {ranks} ranks that is neither a ring nor one row"
    else:
        for name, transport in (("usp", "p2p"), (f"usp, {PUSHED}", "symmetric")):
            mesh = init_device_mesh(device.type, (ranks // 2, 2), mesh_dim_names=("ring", "ulysses"))
            for dimension in ("ring", "ulysses"):
                set_transport(mesh[dimension], transport)
            found[name] = of(seqpar_attn.usp_attention, "zigzag/2", group=mesh)
    return found, absent


Attempt = Callable[[], Contender]


def peers(problem: Problem, ranks: int, device: torch.device) -> dict[str, list[Attempt]]:
    """Ways to run each, the first that works and is right takes part."""
    mesh = init_device_mesh(device.type, (ranks,))
    tokens = problem.tokens
    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}

    def torchs(rotate: str) -> list[Attempt]:
        ways = [(name, repeat) for repeat in (False, True) for name in kernels]
        return [
            lambda name=name, repeat=repeat: _torch(kernels[name], rotate, repeat, mesh, tokens, name)
            for name, repeat in ways
        ]

    return {
        "ring-flash-attention zigzag": [lambda: _zigzag_of_peer(device, problem.dtype)],
        "torch context_parallel, all-gather": torchs("allgather"),
        "torch context_parallel, all-to-all": torchs("alltoall"),
    }


class Data:
    """This rank's tensors in every layout that is asked for."""

    def __init__(self, problem: Problem, rank: int, ranks: int, device: torch.device):
        self.problem, self.rank, self.ranks, self.device = problem, rank, ranks, device
        self._known: dict[tuple[str, bool], Tensors] = {}

    def positions(self, layout: str, rank: int | None = None) -> torch.Tensor:
        rank = self.rank if rank is None else rank
        return seqpar_attn.get_layout(layout, self.ranks).positions(rank, self.problem.tokens * self.ranks)

    def of(self, contender: Contender) -> Tensors:
        key = contender.layout, contender.transposed
        if key not in self._known:
            made = self.problem.make(self.positions(contender.layout), self.device)
            if contender.transposed:
                made = tuple(x.detach().transpose(1, 2).contiguous() for x in made)
                for x in made[:3]:
                    x.requires_grad_()
            self._known[key] = made
        return self._known[key]


def results(contender: Contender, data: Data) -> list[torch.Tensor]:
    """out, dq, dk, dv, ``[1, s, h, d]``."""
    q, k, v, dout = data.of(contender)
    with contender.scope():
        out = contender.attend(q, k, v)
        found = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    return [x.transpose(1, 2) for x in found] if contender.transposed else found


def errors(contender: Contender, data: Data, reference: list[torch.Tensor]) -> list[float]:
    """Relative difference (Frobenius, of all ranks) of out, dq, dk, dv from the zigzag shards in ``reference``."""
    found, differences = results(contender, data), []
    for x, expected in zip(found, reference):
        if contender.layout != "zigzag":
            shards = [torch.empty_like(expected) for _ in range(data.ranks)]
            dist.all_gather(shards, expected.contiguous())
            whole = seqpar_attn.get_layout("zigzag", data.ranks).unshard(shards)
            del shards
            expected = whole[:, data.positions(contender.layout).to(data.device)]
            del whole
        sums = torch.stack([(x.float() - expected.float()).square().sum(), expected.float().square().sum()])
        dist.all_reduce(sums)
        differences.append((sums[0] / sums[1]).sqrt().item())
    return differences
