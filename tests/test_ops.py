"""The dispatcher ops: torch's own checks on schema, fake, autograd registration and functionalisation; and values."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import NAN, REFERENCE, make_inputs, split

from seqpar_attn.kernels import FULL, BlockMask, ops
from seqpar_attn.mask import MaskKind

KINDS = ["full", "causal", "interval"]


def case(kind: str, softcap: float | None = None, nheads_kv: int = 2, dtype: torch.dtype = torch.float32):
    """Inputs with one block of the given kind, and plausible ``lse``, ``out_acc``."""
    x = make_inputs(24, 24, dtype=dtype, nheads_kv=nheads_kv, headdim=8, softcap=softcap)
    blocks, _ = split(kind, [0, 24], [0, 24])
    generator = torch.Generator().manual_seed(1)
    lse = torch.randn(2, 4, 24, generator=generator) + 3
    out_acc = torch.randn(2, 24, 4, 8, generator=generator)
    return x, blocks[0].mask, lse, out_acc


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("targets", ["first", "continue", "last", "only"])
@pytest.mark.parametrize("kind", KINDS)
def test_block_forward(kind, targets, softcap) -> None:
    x, mask, lse, out_acc = case(kind, softcap)
    out = torch.zeros_like(x.q) if targets in ("last", "only") else None
    carried = None if targets == "only" else out_acc
    args = (x.q, x.k, x.v, lse, carried, out, *ops.flatten_mask(mask), x.softmax_scale, softcap)
    torch.library.opcheck(ops.block_forward, (*args, targets in ("continue", "last"), "reference"))


@pytest.mark.parametrize("carried", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("kind", KINDS)
def test_block_backward(kind, softcap, carried) -> None:
    x, mask, lse, _ = case(kind, softcap)
    grads = [torch.ones_like(t) for t in (x.q, x.k, x.v)]
    args = (x.q, x.k, x.v, x.dout, lse, torch.zeros_like(lse), *grads, *ops.flatten_mask(mask))
    flags = (x.softmax_scale, softcap, carried, carried, True, "reference")
    torch.library.opcheck(ops.block_backward, (*args, *flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_block_delta(dtype) -> None:
    x, *_ = case("full", dtype=dtype)
    torch.library.opcheck(ops.block_delta, (x.q, x.dout, "reference"))


@pytest.mark.parametrize("with_out", [False, True])
def test_block_merge(with_out) -> None:
    x, _, lse, out_acc = case("full")
    out = torch.zeros_like(x.q) if with_out else None
    torch.library.opcheck(ops.block_merge, (lse, out_acc, lse.clone() + 1, out_acc.clone(), out, "reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_ops_do_what_the_kernel_does(kind) -> None:
    x, mask, lse, out_acc = case(kind, nheads_kv=4)
    got = [lse.clone(), out_acc.clone(), torch.full_like(x.q, NAN)]
    want = [t.clone() for t in got]
    block = ops.flatten_mask(mask)
    torch.ops.seqpar_attn.block_forward(x.q, x.k, x.v, *got, *block, x.softmax_scale, 1.5, True, "reference")
    REFERENCE.forward(x.q, x.k, x.v, *want, mask, softmax_scale=x.softmax_scale, softcap=1.5, carry=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))

    delta = torch.ops.seqpar_attn.block_delta(got[2], x.dout, "reference")
    assert torch.equal(delta, REFERENCE.delta(got[2], x.dout))
    got_grads = [torch.full_like(t, NAN) for t in (x.q, x.k, x.v)]
    want_grads = [t.clone() for t in got_grads]
    torch.ops.seqpar_attn.block_backward(
        x.q, x.k, x.v, x.dout, lse, delta, *got_grads, *block, x.softmax_scale, 1.5, False, False, True, "reference"
    )
    flags = {"carry_dq": False, "carry_dkv": False, "deterministic": True}
    REFERENCE.backward(
        x.q, x.k, x.v, x.dout, lse, delta, *want_grads, mask, softmax_scale=x.softmax_scale, softcap=1.5, **flags
    )
    assert all(torch.equal(a, b) for a, b in zip(got_grads, want_grads))


def test_compiled() -> None:
    """One graph, no break, and the mutations survive functionalisation (traced only: no compiler is needed)."""
    x, mask, lse, out_acc = case("causal")

    def step(q, k, v, dout, lse, out_acc):
        out = torch.empty_like(q)
        ops.block_forward(q, k, v, lse, out_acc, out, *ops.flatten_mask(mask), 0.3, None, True, "reference")
        return out * 2, ops.block_delta(out, dout, "reference")

    want = step(x.q, x.k, x.v, x.dout, want_lse := lse.clone(), want_acc := out_acc.clone())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = compiled(x.q, x.k, x.v, x.dout, lse, out_acc)
    for a, b in zip((*got, lse, out_acc), (*want, want_lse, want_acc)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "nonsense"])
def test_unresolved_backend(backend) -> None:
    _, _, lse, out_acc = case("full")
    with pytest.raises(ValueError, match=f"expected one of .*reference.*, got '{backend}'"):
        ops.block_merge(lse, out_acc, lse, out_acc, None, backend)


def test_flatten_mask() -> None:
    assert ops.flatten_mask(FULL) == ("full", 0, None, None, None, None)
    assert ops.flatten_mask(BlockMask(MaskKind.CAUSAL, -1)) == ("causal", -1, None, None, None, None)
