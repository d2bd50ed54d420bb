"""Grids of ranks for the tests of Ulysses and USP, and the one body that runs a call on them."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist
from attention_cases import NAMES

import seqpar_attn
from seqpar_attn import LoopbackGroup
from seqpar_attn.layout import get_layout


@dataclasses.dataclass(frozen=True)
class Grid:
    """``rows`` rings of ``columns`` ranks that exchange heads; one row is plain Ulysses."""

    rows: int
    columns: int
    layout: str

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}-{self.layout}"

    def whole_layout(self):
        name = self.layout if self.rows == 1 else f"{self.layout}/{self.columns}"
        return get_layout(name, self.rows * self.columns)

    @functools.cache  # noqa: B019 (as few as there are grids, and each costs a group per row and column)
    def mesh(self, device):
        return dist.init_device_mesh(device, (self.rows, self.columns), mesh_dim_names=("ring", "ulysses"))

    def set_transport(self, transport, device):
        """Of the groups of real ranks."""
        groups = [None] if self.rows == 1 else [self.mesh(device)[name] for name in ("ring", "ulysses")]
        for group in groups:
            seqpar_attn.set_transport(group, transport)

    def attend(self, q, k, v, real, **arguments):
        if self.rows == 1:
            group = None if real else LoopbackGroup(self.columns)
            return seqpar_attn.ulysses_attention(q, k, v, group=group, layout=self.layout, **arguments)
        group = (LoopbackGroup(self.rows), LoopbackGroup(self.columns))
        if real:
            group = self.mesh(q.device.type)
        return seqpar_attn.usp_attention(q, k, v, group=group, layout=self.layout, **arguments)


def run(x, grid, rank=None, **more):
    """Results of the whole sequence on virtual ranks (``rank`` None), or of this process's shard."""
    layout = grid.whole_layout()

    def shard(tensor, dim=1):
        return layout.shard_all(tensor, dim) if rank is None else layout.shard(tensor, rank, dim)

    q, k, v = (shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = grid.attend(q, k, v, rank is not None, return_lse=True, **(x.arguments | more))
    assert out.dtype == q.dtype and out.shape == q.shape
    gradients = torch.autograd.grad((out, lse), (q, k, v), (shard(x.dout), shard(x.dlse, 2)))
    results = dict(zip(NAMES, (out.detach(), lse.detach(), *gradients)))
    if rank is None:
        results = {name: layout.unshard_all(t, 2 if name == "lse" else 1) for name, t in results.items()}
    return results


def other_bits(x, grids, rank, **more):
    """Which of this process's results differ from virtual ranks'; see ``attention_cases.other_bits``."""
    differ = []
    for grid in grids:
        layout = grid.whole_layout()
        whole = run(x, grid, deterministic=True, **more)
        for name, t in run(x, grid, rank, deterministic=True, **more).items():
            expected = layout.shard(whole[name], rank, 2 if name == "lse" else 1)
            if not torch.equal(t, expected):
                differ.append((grid.name, name, (t.double() - expected.double()).abs().max().item()))
    return differ


def unshard(shards, grid):
    layout = grid.whole_layout()
    return {name: layout.unshard([s[name] for s in shards], 2 if name == "lse" else 1) for name in NAMES}
