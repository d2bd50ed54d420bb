"""Passes are made once and played many times: nothing of one playing may be seen in another."""

import gc
import threading
import weakref
from collections import deque

import pytest
import torch
from attention_cases import METHODS
from test_tape import Recorded, _passes

from seqpar_attn import passes, pieces
from seqpar_attn import plan as plans
from seqpar_attn.comm.loopback import Loopback
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.mask import Mask
from seqpar_attn.testing.steps import ring_steps
from seqpar_attn.validation import Call

CALL = Call("ring", "pull", "zigzag", True, None, None, None, 0.25, "auto", False)


def plan_of(world_size=4, seqlen=96, call=CALL):
    plans._make_plan.cache_clear()  # so that no test finds another's passes
    return plans.make_plan(call.method, call.transfer, call.layout, world_size, Mask(seqlen), call.ranks_per_host)


def inputs_of(dtype=torch.float64, seqlen=96, batch=2):
    return [torch.randn(batch, seqlen, heads, 16, dtype=dtype) for heads in (4, 2, 2, 4)]


def waiting(plan, world_size=4):
    ranks = tuple(range(world_size))
    return [
        played
        for backward in (False, True)
        for shelf in plan.program(backward, ranks).passes.values()
        for played in shelf
    ]


def equal(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("together", [0, 1 << 40], ids=["storages", "storage"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_rounded_gradients_replayed(method, batch, together, monkeypatch):
    """In half precision dk and dv have accumulators, which are added to together."""
    monkeypatch.setattr(pieces, "_TOGETHER", together)
    name = method.function.removesuffix("_attention")
    per_host = method.ranks_per_host(4)
    call = Call(name, method.transfer, method.layout, True, None, None, None, 0.25, "auto", False, per_host)
    with method.steps(96 // 4):
        plan = plan_of(call=call)
    kernel = Recorded()
    alive = [inputs_of(torch.bfloat16, batch=batch) for _ in range(3)]
    for inputs in alive:
        assert equal(_passes(kernel, plan, call, 4, inputs), _passes(ReferenceKernel(), plan, call, 4, inputs))
    assert kernel.replayed > 0


@pytest.mark.parametrize("together", [0, 1 << 40], ids=["storages", "storage"])
def test_memory_between_passes_is_given_back(together, monkeypatch):
    monkeypatch.setattr(pieces, "_TOGETHER", together)
    plan, inputs = plan_of(), inputs_of(torch.bfloat16)
    for _ in range(2):
        _passes(Recorded(), plan, CALL, 4, inputs)
        own = [x for played in waiting(plan) for x in (*played.pieces._scratch, *played.pieces._bases())]
        assert len(waiting(plan)) >= 2 and own
        storages = {len(played.pieces._memory) for played in waiting(plan)}
        assert storages == {1} if together else min(storages) > 1
        assert all(x.untyped_storage().nbytes() == 0 for x in own)


def test_results_and_inputs_are_let_go():
    plan, inputs = plan_of(), inputs_of()
    _passes(Recorded(), plan, CALL, 4, inputs)
    for played in waiting(plan):
        assert not played.pieces.tensors
        assert all(played.pieces.views[index] is None for index in played.pieces.foreign)


@pytest.mark.parametrize("kernel", [ReferenceKernel, Recorded])
def test_made_in_inference_mode_played_outside(kernel):
    plan, inputs, used = plan_of(), inputs_of(), kernel()
    expected = _passes(ReferenceKernel(), plan_of(), CALL, 4, inputs)
    with torch.inference_mode():
        inside = [x.clone() for x in _passes(used, plan, CALL, 4, inputs)]
    assert equal(inside, expected)
    assert equal(_passes(used, plan, CALL, 4, inputs), expected)
    with torch.inference_mode():
        assert equal(_passes(used, plan, CALL, 4, inputs), expected)


def test_one_tensor_given_twice_and_then_two():
    """That q, k and v are one tensor is no part of the geometry that a recording is for."""
    plan, kernel = plan_of(), Recorded()
    first, *others = (torch.randn(2, 96, 4, 16, dtype=torch.float64) for _ in range(5))
    for inputs in ([first] * 4, others):
        assert equal(_passes(kernel, plan, CALL, 4, inputs), _passes(ReferenceKernel(), plan, CALL, 4, inputs))
    assert kernel.replayed > 0


def test_passes_of_old_geometries_are_forgotten(monkeypatch):
    """One bound for all plans: batches change without end, and every pass is host memory."""
    monkeypatch.setattr(passes, "_GEOMETRIES", 6)
    monkeypatch.setattr(passes, "_kept", deque())
    plan, other = plan_of(), plans.make_plan("ring", "pull", "zigzag", 4, Mask(96, window_size=9))
    first = inputs_of(batch=1)
    expected = _passes(ReferenceKernel(), plan, CALL, 4, first)
    for batch in (1, 2, 3):
        _passes(ReferenceKernel(), plan, CALL, 4, inputs_of(batch=batch))
    played = [weakref.ref(x) for x in waiting(plan)]
    for batch in (4, 5):
        _passes(ReferenceKernel(), other, CALL, 4, inputs_of(batch=batch))
    gc.collect()
    assert len(passes._kept) == 6 == len(waiting(plan)) + len(waiting(other))
    assert sum(x() is not None for x in played) == len(waiting(plan)) == 2  # the newest
    assert equal(_passes(ReferenceKernel(), plan, CALL, 4, first), expected)


def test_passes_go_with_their_plan():
    plan = plan_of()
    _passes(ReferenceKernel(), plan, CALL, 4, inputs_of())
    played = [weakref.ref(x) for x in waiting(plan)]
    assert played
    del plan
    plans._make_plan.cache_clear()
    gc.collect()
    assert not any(x() for x in played)


class Breaks(Loopback):
    """A group that a rank leaves in the second exchange."""

    exchanges = 0

    def exchange(self, sends, receives):
        self.exchanges += 1
        if self.exchanges == 2:
            raise RuntimeError("a peer is gone")
        return super().exchange(sends, receives)


@pytest.mark.parametrize("before", [0, 2])
def test_a_pass_that_failed_is_not_played_again(before):
    with ring_steps(24):
        plan = plan_of()
    inputs, kernel = inputs_of(), Recorded()
    for _ in range(before):
        _passes(kernel, plan, CALL, 4, inputs)
    count = len(waiting(plan))
    with pytest.raises(RuntimeError, match="gone"):
        passes.forward_pass(*inputs[:3], plan, Breaks(4), kernel, CALL)
    assert len(waiting(plan)) == max(0, count - 1)
    assert equal(_passes(kernel, plan, CALL, 4, inputs), _passes(ReferenceKernel(), plan, CALL, 4, inputs))


class Meets(Loopback):
    """A group whose exchanges wait until the other thread has got as far."""

    def __init__(self, world_size, barrier):
        super().__init__(world_size)
        self.barrier = barrier

    def exchange(self, sends, receives):
        self.barrier.wait(20)
        return super().exchange(sends, receives)


@pytest.mark.parametrize("kernel", [ReferenceKernel, Recorded])
def test_two_threads_play_at_the_same_time(kernel):
    with ring_steps(24):
        plan = plan_of()
    used, barrier = kernel(), threading.Barrier(2)
    alive = [inputs_of() for _ in range(2)]
    expected = [_passes(ReferenceKernel(), plan, CALL, 4, inputs)[:2] for inputs in alive]
    found = {}

    def play(number):
        found[number] = [passes.forward_pass(*alive[number][:3], plan, Meets(4, barrier), used, CALL) for _ in range(3)]

    threads = [threading.Thread(target=play, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(2):
        assert len(found[number]) == 3 and all(equal(got, expected[number]) for got in found[number])
