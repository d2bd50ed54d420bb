"""Cases and the one body for the tests of the public functions, on virtual ranks or real processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch

import seqpar_attn
from seqpar_attn.layout import get_layout
from seqpar_attn.mask import Mask
from seqpar_attn.testing.errors import assert_error_rule, chance
from seqpar_attn.testing.steps import ring_steps
from seqpar_attn.testing.truth import attention64

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Method:
    function: str
    layout: str
    transfer: str = "pull"
    owners: int | None = None
    """How many ranks' keys a step attends; by default as many as there are, for shards as short as these."""
    hosts: int = 1
    """For transfer "double"; of a number that they do not divide there is one rank on each."""
    last: bool = False
    """Whether half of the own work comes last in backward."""

    def ranks_per_host(self, world_size: int) -> int | None:
        if self.transfer != "double":
            return None
        return 1 if world_size % self.hosts else world_size // self.hosts

    @property
    def name(self) -> str:
        name = f"{'dist_flash' if 'dist' in self.function else self.layout}-{self.transfer}"
        name += f"-{self.hosts}-hosts" if self.transfer == "double" else ""
        name += "" if self.owners is None else f"-by-{self.owners}"
        return f"{name}-own-last" if self.last else name

    def steps(self, shard: int) -> AbstractContextManager[None]:
        """Around calls with shards of so many tokens."""
        return ring_steps((self.owners or 1 << 20) * max(1, shard), 0 if self.last else None)


METHODS = [
    Method("ring_attention", "zigzag"),
    Method("ring_attention", "zigzag", "ring"),
    Method("ring_attention", "zigzag", "all_gather"),
    Method("ring_attention", "contiguous"),
    Method("ring_attention", "contiguous", "ring"),
    Method("ring_attention", "striped"),
    Method("ring_attention", "striped", "ring"),
    Method("dist_flash_attention", "contiguous"),
    Method("dist_flash_attention", "contiguous", "ring"),
    Method("ring_attention", "zigzag", owners=1),
    Method("ring_attention", "zigzag", owners=2),
    Method("ring_attention", "zigzag", owners=2, last=True),
    Method("ring_attention", "striped", owners=3),
    Method("ring_attention", "zigzag", "double", owners=1, hosts=2),
    Method("ring_attention", "zigzag", "double", owners=2, hosts=2),
    Method("ring_attention", "contiguous", "double", hosts=2),
    Method("ring_attention", "striped", "double", owners=1, hosts=4),
]

MASKS: dict[str, dict] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 0.2},
    "packed": {"documents": (0.1, 0.1, 0.45, 0.8)},
    "packed-full": {"causal": False, "documents": (0.3, 0.35, 0.9)},
    "packed-window": {"window": 0.15, "documents": (0.4, 0.7)},
    "softcap": {"softcap": 2.0},
}


@dataclasses.dataclass
class Inputs:
    """A whole sequence: ``q, dout: [b, s, h, d]``, ``k, v: [b, s, h_kv, d]``, ``dlse: [b, h, s]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    arguments: dict

    def mask(self) -> Mask:
        a = self.arguments
        return Mask(self.q.shape[1], a.get("causal", True), a.get("window_size"), a.get("cu_seqlens"))


def make_inputs(
    seqlen: int,
    mask: str = "causal",
    *,
    dtype: torch.dtype = torch.float64,
    nheads: int = 4,
    nheads_kv: int = 2,
    headdim: int = 16,
    batch: int = 1,
    device: str = "cpu",
) -> Inputs:
    """Fresh random inputs; masks are given as fractions of the length."""
    case = MASKS[mask]
    arguments: dict = {k: v for k, v in case.items() if k in ("causal", "softcap")}
    if "window" in case:
        arguments["window_size"] = max(1, int(case["window"] * seqlen))
    if "documents" in case:
        arguments["cu_seqlens"] = (0, *(int(f * seqlen) for f in case["documents"]), seqlen)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype)

    q, dout = (normal(batch, seqlen, nheads, headdim) for _ in range(2))
    k, v = (normal(batch, seqlen, nheads_kv, headdim) for _ in range(2))
    dlse = torch.randn(batch, nheads, seqlen).to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    return Inputs(q, k, v, dout, dlse, arguments)


def truth(x: Inputs) -> dict[str, torch.Tensor]:
    return attention64(x.q, x.k, x.v, x.mask(), x.dout, x.dlse, softcap=x.arguments.get("softcap"))


def run(x: Inputs, method: Method, world_size: int, rank: int | None = None, **more) -> dict[str, torch.Tensor]:
    """Results of the whole sequence on virtual ranks (``rank`` None), or of this process's shard in a real group."""
    with method.steps(x.q.shape[1] // world_size):
        return _run(x, method, world_size, rank, **more)


def other_bits(x: Inputs, methods: Iterable[Method], world_size: int, rank: int) -> list[tuple[str, str, float]]:
    """Which of this process's results differ from virtual ranks', and by how much. Those have the same data and no
    links, and a fixed order of sums makes what is right the same in every bit."""
    differ = []
    for method in methods:
        layout = get_layout(method.layout, world_size)
        whole = run(x, method, world_size, deterministic=True)
        for name, t in run(x, method, world_size, rank, deterministic=True).items():
            expected = layout.shard(whole[name], rank, 2 if name == "lse" else 1)
            if not torch.equal(t, expected):
                differ.append((method.name, name, (t.double() - expected.double()).abs().max().item()))
    return differ


def _run(x: Inputs, method: Method, world_size: int, rank: int | None, **more) -> dict[str, torch.Tensor]:
    layout = get_layout(method.layout, world_size)

    def shard(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return layout.shard_all(tensor, dim) if rank is None else layout.shard(tensor, rank, dim)

    group = seqpar_attn.LoopbackGroup(world_size) if rank is None else None
    q, k, v = (shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    per_host = method.ranks_per_host(world_size)
    more = more if per_host is None else {"ranks_per_host": per_host} | more
    out, lse = getattr(seqpar_attn, method.function)(
        q,
        k,
        v,
        group=group,
        layout=method.layout,
        transfer=method.transfer,
        return_lse=True,
        **(x.arguments | more),
    )
    assert out.dtype == x.q.dtype and out.shape == q.shape
    gradients = torch.autograd.grad((out, lse), (q, k, v), (shard(x.dout), shard(x.dlse, 2)))
    assert all(g.dtype == x.q.dtype for g in gradients)
    results = dict(zip(NAMES, (out.detach(), lse.detach(), *gradients)))
    if rank is None:
        results = {name: layout.unshard_all(t, 2 if name == "lse" else 1) for name, t in results.items()}
    return results


def unshard(shards: list[dict[str, torch.Tensor]], method: Method) -> dict[str, torch.Tensor]:
    layout = get_layout(method.layout, len(shards))
    return {name: layout.unshard([s[name] for s in shards], 2 if name == "lse" else 1) for name in NAMES}


def check_exact(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for name in NAMES:
        difference = (results[name].double() - expected[name]).abs()
        worst = difference.max().item() if difference.numel() else 0.0
        where = divmod(int(difference.argmax()), difference[0].numel()) if difference.numel() else None
        assert worst <= tolerance, f"{name}: {worst:.3e} at batch, element {where}"


def check_error_rule(
    results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], single: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The rule: at most 1.1 x the error of one single-device call. Returns the ratios.

    The mean square has four of its own standard errors besides, see ``kernel_cases.compare``: a few elements with large
    roundings can make up most of it (seen: 1.115 x, by dq of the first queries in float16).
    """
    ratios = {}
    for name in NAMES:
        report = assert_error_rule(
            results[name],
            expected[name],
            single[name],
            1.1,
            2e-7 + chance(results[name], expected[name], single[name]),
            name,
            3.0,
        )
        ratios[name] = report.relative / max(report.baseline.relative, 1e-30)
    return ratios
