"""Passes that are replayed: the same launches at other addresses give what a pass without a tape gives."""

import ctypes
from dataclasses import replace

import pytest
import torch
from attention_cases import METHODS

from seqpar_attn import autograd
from seqpar_attn.comm.loopback import Loopback
from seqpar_attn.kernels.base import BlockMask
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.kernels.tape import Tape, recording
from seqpar_attn.mask import Mask
from seqpar_attn.plan import make_plan
from seqpar_attn.validation import Call


def _at(address, shape, strides, dtype):
    """The tensor at ``address``."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class Recorded(ReferenceKernel):
    """The reference, told by addresses what to do, as a backend with kernels is."""

    name = "recorded"
    recordable = True

    def __init__(self):
        self.replayed = 0

    def _record(self, method, tensors, *rest, **options):
        method(*tensors, *rest, **options)
        tape = recording()
        assert tape is not None
        mask = next((x for x in rest if isinstance(x, BlockMask)), None)
        for bound in () if mask is None else (mask.key_lo, mask.key_hi, mask.query_lo, mask.query_hi):
            assert bound is None or tape.place(bound) == (-1, bound.data_ptr())
        known = [x is not None and (tape.place(x), x.shape, x.stride(), x.dtype) for x in tensors]

        def launch(addresses):
            self.replayed += 1
            again = [_at(addresses[x[0][0]] + x[0][1], *x[1:]) if x else None for x in known]
            method(*again, *rest, **options)

        tape.append(launch)

    def forward(self, q, k, v, lse, out_acc, out, mask, **options):
        self._record(super().forward, (q, k, v, lse, out_acc, out), mask, **options)

    def backward(self, q, k, v, dout, lse, delta, dq, dk, dv, mask, **options):
        self._record(super().backward, (q, k, v, dout, lse, delta, dq, dk, dv), mask, **options)

    def merge(self, lse, out_acc, lse_part, out_part, out):
        self._record(super().merge, (lse, out_acc, lse_part, out_part, out))

    def accumulate(self, target, parts):
        self._record(super().accumulate, (target, parts))


def _inputs(seqlen, interleaved):
    """q, k, v, dout; ``interleaved``: q, k, v as slices of one tensor, as one projection makes them."""
    if interleaved:
        qkv = torch.randn(2, seqlen, 8, 16, dtype=torch.float64)
        q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    else:
        q, k, v = (torch.randn(2, seqlen, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    return q, k, v, torch.randn(2, seqlen, 4, 16, dtype=torch.float64)


def _passes(kernel, plan, call, world_size, inputs):
    comm = Loopback(world_size)
    q, k, v, dout = inputs
    out, lse = autograd.forward_pass(q, k, v, plan, comm, kernel, call)
    return out, lse, *autograd.backward_pass(dout, None, q, k, v, out, lse, plan, comm, kernel, call)


@pytest.mark.parametrize("interleaved", [False, True], ids=["separate", "one_qkv"])
@pytest.mark.parametrize("documents", [None, (0, 30, 41, 96)], ids=["plain", "packed"])
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_replayed_pass_is_a_pass(method, world_size, documents, interleaved):
    seqlen = 96
    name = method.function.removesuffix("_attention")
    call = Call(name, method.transfer, method.layout, True, None, documents, None, 0.25, "auto", False)
    with method.steps(seqlen // world_size):
        plan = make_plan(
            name,
            method.transfer,
            method.layout,
            world_size,
            Mask(seqlen, True, None, documents),
            method.ranks_per_host(world_size),
        )
    kernel = Recorded()
    # Nothing of an earlier pass may be used: three passes, all inputs alive.
    alive = [_inputs(seqlen, interleaved) for _ in range(3)]
    for number, inputs in enumerate(alive):
        expected = _passes(ReferenceKernel(), plan, call, world_size, inputs)
        before = kernel.replayed
        got = _passes(kernel, plan, call, world_size, inputs)
        assert (kernel.replayed > before) == (number > 0)
        for a, b in zip(got, expected):
            assert torch.equal(a, b)


def test_another_geometry_is_recorded_anew():
    call = Call("ring", "pull", "zigzag", True, None, None, None, 0.25, "auto", False)
    plan = make_plan("ring", "pull", "zigzag", 2, Mask(96))
    kernel = Recorded()
    _passes(kernel, plan, call, 2, _inputs(96, False))
    for inputs, other in ((_inputs(96, True), call), (_inputs(96, False), replace(call, softmax_scale=0.5))):
        _passes(kernel, plan, other, 2, inputs)
        assert kernel.replayed == 0
    _passes(kernel, plan, call, 2, _inputs(96, False))
    assert kernel.replayed > 0


def test_a_tensor_unknown_to_the_tape_is_refused():
    tape = Tape()
    base = torch.empty(10)
    piece = base[3:]
    tape.locate(piece, 0, base)
    assert tape.place(piece) == (0, 12)
    assert tape.place(None) == (-1, 0)
    with pytest.raises(AssertionError, match="not made known"):
        tape.place(torch.empty(4))
