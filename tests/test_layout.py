"""Layouts and batches: every position once, round trips, labels as on a single device, padding that counts nothing."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from seqpar_attn.batch import pad_batch, shard_batch
from seqpar_attn.layout import Contiguous, Striped, Zigzag, gather, get_layout
from seqpar_attn.testing import run_ranks

LAYOUTS = ("zigzag", "contiguous", "striped")
plain = st.builds(get_layout, st.sampled_from(LAYOUTS), st.integers(1, 9))
nested = st.builds(
    lambda outer, rows, parts: get_layout(f"{outer}/{parts}", rows * parts),
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    st.integers(1, 4),
)
layouts = plain | nested
IGNORE = -100


class Loopback:
    """What layouts need to know of a LoopbackGroup."""

    is_loopback = True

    def __init__(self, world_size):
        self.world_size = world_size


@st.composite
def boundaries(draw, max_length=70):
    """``(seqlen, cu_seqlens or None)``; documents may be empty or of one token."""
    seqlen = draw(st.integers(1, max_length))
    if draw(st.booleans()):
        return seqlen, None
    cuts = draw(st.lists(st.integers(0, seqlen), max_size=6))
    return seqlen, (0, *sorted(cuts), seqlen)


@given(layouts, st.integers(0, 12))
def test_every_position_lies_on_exactly_one_rank(layout, blocks):
    seqlen = blocks * layout.multiple
    chunks = layout.chunks(seqlen)
    assert len(chunks) == layout.world_size
    assert len({len(spans) for spans in chunks}) == 1
    held = [[s.position(i) for s in spans for i in range(s.length)] for spans in chunks]
    assert {len(h) for h in held} == {seqlen // layout.world_size}
    assert sorted(p for h in held for p in h) == list(range(seqlen))
    for rank, positions in enumerate(held):
        assert layout.positions(rank, seqlen).tolist() == positions
    assert layout.positions(0, seqlen).dtype == torch.int64
    assert layout.permutation(seqlen).tolist() == [p for h in held for p in h]


def test_shapes_of_the_layouts():
    """The definitions, by hand, at W = 2."""
    assert [Zigzag(2).positions(r, 8).tolist() for r in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [Striped(2).positions(r, 6).tolist() for r in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert [Contiguous(2).positions(r, 6).tolist() for r in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [[s.length for s in spans] for spans in Contiguous(2).chunks(6)] == [[2, 1], [2, 1]]
    grid = get_layout("zigzag/2", 4)
    assert [grid.positions(r, 8).tolist() for r in range(4)] == [[0, 1], [6, 7], [2, 3], [4, 5]]
    assert [layout(3).multiple for layout in (Zigzag, Contiguous, Striped)] == [6, 3, 3]
    assert [get_layout(*args).multiple for args in (("zigzag/2", 4), ("zigzag/3", 6), ("striped/2", 6))] == [4, 12, 6]


@given(layouts, st.integers(1, 6), st.integers(1, 3), st.sampled_from([(0, 1), (1, 2), (-1, 2), (2, 3), (-2, 3)]))
def test_shard_and_unshard_are_inverse_and_differentiable(layout, blocks, batch, where):
    dim, ndim = where
    seqlen = blocks * layout.multiple
    shape = [batch + i for i in range(ndim)]
    shape[dim] = seqlen
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    shards = [layout.shard(x, rank, dim) for rank in range(layout.world_size)]
    for rank, shard in enumerate(shards):
        assert shard.is_contiguous()
        assert torch.equal(shard, x.index_select(dim, layout.positions(rank, seqlen)))
    together = layout.shard_all(x, dim)
    assert torch.equal(together, torch.cat(shards, dim))
    assert torch.equal(together, x.index_select(dim, layout.permutation(seqlen)))
    assert torch.equal(layout.unshard(shards, dim), x)
    assert torch.equal(layout.unshard_all(together, dim), x)
    assert torch.equal(together.index_select(dim, layout.inverse(seqlen)), x)

    weight = torch.randn_like(x)
    parts = [layout.shard(weight, rank, dim) for rank in range(layout.world_size)]
    (grad,) = torch.autograd.grad(sum((s * p).sum() for s, p in zip(shards, parts)), x)
    assert torch.equal(grad, weight)
    leaves = [s.detach().requires_grad_() for s in shards]
    grads = torch.autograd.grad((layout.unshard(leaves, dim) * weight).sum(), leaves)
    assert all(torch.equal(g, p) for g, p in zip(grads, parts))


def _mine(rank, world_size, name, x):
    """Each rank weighs the gathered tensor with its own number; returns the result and its shard's gradient."""
    layout = get_layout(name, world_size)
    local = layout.shard(x, rank).requires_grad_()
    whole = gather(local, name)
    (whole * whole * (rank + 1)).sum().backward()
    return whole.detach(), local.grad


@pytest.mark.parametrize("name", LAYOUTS)
def test_gather_across_processes_sums_gradients(name):
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    results = run_ranks(_mine, 3, name, x)
    expected = 2 * x * (1 + 2 + 3)
    for rank, (whole, grad) in enumerate(results):
        assert torch.equal(whole, x)
        torch.testing.assert_close(grad, get_layout(name, 3).shard(expected, rank))


def test_gather_without_processes():
    x = torch.randn(2, 12, 3, requires_grad=True)
    assert torch.equal(gather(x, "zigzag"), x)
    whole = gather(Zigzag(3).shard_all(x), "zigzag", Loopback(3))
    assert torch.equal(whole, x)
    whole.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def single_device_labels(labels, cu_seqlens):
    """Written plainly: the pairs (position, label) that a loss over each document of its own would use."""
    rows, seqlen = labels.shape
    cu_seqlens = cu_seqlens or (0, seqlen)
    expected = torch.full_like(labels, IGNORE)
    for first, end in pairwise(cu_seqlens):
        for i in range(first, end - 1):
            for row in range(rows):
                expected[row, i] = labels[row, i + 1]
    return expected


@given(layouts, boundaries(), st.integers(1, 3), st.booleans(), st.randoms(use_true_random=False))
def test_batch_is_the_single_device_batch(layout, lengths, batch, own_labels, random):
    seqlen, cu_seqlens = lengths
    world_size = layout.world_size
    ids = torch.randint(1, 50, (batch, seqlen))
    labels = None
    if own_labels:
        labels = torch.where(torch.rand(batch, seqlen) < random.random(), IGNORE, ids)
    arguments = dict(cu_seqlens=cu_seqlens, layout=layout.name, pad_token_id=99)
    parts = [shard_batch(ids, labels, rank=r, world_size=world_size, **arguments) for r in range(world_size)]

    first = parts[0]
    padding = first.seqlen - seqlen
    assert first.seqlen % layout.multiple == 0 and 0 <= padding < layout.multiple
    whole_ids, whole_labels, whole_positions = (
        layout.unshard([getattr(p, name) for p in parts]) for name in ("input_ids", "labels", "position_ids")
    )
    assert torch.equal(whole_ids, F.pad(ids, (0, padding), value=99))
    expected = single_device_labels(ids if labels is None else labels, cu_seqlens)
    assert torch.equal(whole_labels, F.pad(expected, (0, padding), value=IGNORE))
    assert {p.num_valid for p in parts} == {int((expected != IGNORE).sum())}

    bounds = (*(cu_seqlens or (0, seqlen)), first.seqlen) if padding else cu_seqlens
    assert {p.cu_seqlens for p in parts} == {bounds}
    if cu_seqlens is None:
        places = list(range(first.seqlen))
    else:
        places = [i for a, b in pairwise(bounds) for i in range(b - a)]
    assert whole_positions.tolist() == [places] * batch
    assert whole_positions.dtype == whole_labels.dtype == torch.int64
    assert [(p.rank, p.world_size) for p in parts] == [(r, world_size) for r in range(world_size)]

    together = shard_batch(ids, labels, group=Loopback(world_size), **arguments)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(p, name) for p in parts], 1))
    assert (together.num_valid, together.world_size) == (first.num_valid, world_size)


@given(layouts, boundaries())
def test_loss_is_the_single_device_loss(layout, lengths):
    """A bigram model: the sum of the ranks' losses over num_valid is the mean loss of the unsharded documents."""
    seqlen, cu_seqlens = lengths
    table = torch.randn(7, 7, dtype=torch.float64)
    ids = torch.randint(0, 7, (2, seqlen))
    bounds = cu_seqlens or (0, seqlen)
    pairs = [(row[i], row[i + 1]) for row in ids for a, b in pairwise(bounds) for i in range(a, b - 1)]
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(layout.world_size):
        part = shard_batch(ids, None, cu_seqlens, layout=layout, rank=rank, world_size=layout.world_size)
        assert part.num_valid == len(pairs)
        total += F.cross_entropy(table[part.input_ids].flatten(0, 1), part.labels.flatten(), reduction="sum")
    expected = -sum(table[a].log_softmax(0)[b] for a, b in pairs)
    torch.testing.assert_close(total, torch.as_tensor(expected, dtype=torch.float64))


def test_labels_that_are_aligned_already_are_left_alone():
    ids = torch.arange(1, 6)[None]
    part = shard_batch(ids, ids * 10, (0, 2, 5), layout="contiguous", rank=0, world_size=1, shift_labels=False)
    assert part.labels.tolist() == [[10, 20, 30, 40, 50]] and part.num_valid == 5


def test_positions_that_are_given_are_sharded():
    ids, positions = torch.arange(10)[None], torch.tensor([[0, 1, 2, 3, 4, 90, 91, 92, 93, 94]])
    parts = [
        shard_batch(ids, cu_seqlens=(0, 3, 10), position_ids=positions, layout="zigzag", rank=r, world_size=2)
        for r in (0, 1)
    ]
    assert [p.position_ids.tolist() for p in parts] == [[[0, 1, 2, 94, 0, 0]], [[3, 4, 90, 91, 92, 93]]]


@given(boundaries(), st.integers(1, 20))
def test_pad_batch(lengths, multiple):
    seqlen, cu_seqlens = lengths
    ids = torch.randint(1, 9, (2, seqlen), dtype=torch.int32)
    given_cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    padded = pad_batch(ids, ids, given_cu, multiple=multiple)
    padding = padded.input_ids.shape[1] - seqlen
    assert 0 <= padding < multiple and (seqlen + padding) % multiple == 0
    assert torch.equal(padded.input_ids, F.pad(ids, (0, padding), value=0)) and padded.input_ids.dtype == torch.int32
    assert torch.equal(padded.labels, F.pad(ids, (0, padding), value=IGNORE))
    if padding:
        assert padded.cu_seqlens == (*(cu_seqlens or (0, seqlen)), seqlen + padding)
    else:
        assert padded.cu_seqlens == cu_seqlens
    assert pad_batch(ids, multiple=multiple).labels is None


IDS = torch.arange(12)[None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_layout("ring", 2), "expected one of .*'zigzag'.* got 'ring'"),
        (lambda: get_layout("zigzag/x", 2), "expected one of .*'zigzag'.* got 'zigzag/x'"),
        (
            lambda: get_layout("zigzag/3", 4),
            "expected a number of parts that divides world_size 4, got layout 'zigzag/3'",
        ),
        (lambda: get_layout("zigzag", 0), "expected world_size >= 1, got 0"),
        (
            lambda: Zigzag(4).chunks(13),
            r"divisible by 8 \(2 x world_size 4\) for layout 'zigzag', got 13; pad with pad",
        ),
        (lambda: Striped(4).shard(IDS[:, :6], 0), r"divisible by 4 \(world_size 4\) for layout 'striped', got 6"),
        (lambda: Contiguous(2).shard(IDS, 2), "expected 0 <= rank < world_size 2, got 2"),
        (lambda: Contiguous(2).positions(-1, 12), "expected 0 <= rank < world_size 2, got -1"),
        (lambda: Zigzag(2).unshard([IDS]), r"expected 2 shards \(one per rank\), got 1"),
        (lambda: Zigzag(2).unshard([IDS, IDS[:, :4]]), r"expected shards of one length along dim 1, got \[12, 4\]"),
        (lambda: gather(IDS, Zigzag(2)), "expected a layout for world_size 1"),
        (lambda: shard_batch(IDS, rank=2, world_size=2), "expected 0 <= rank < world_size 2, got 2"),
        (lambda: shard_batch(IDS, rank=1), "expected both rank and world_size"),
        (lambda: shard_batch(IDS, rank=0, world_size=2, group=Loopback(2)), "expected either group or rank"),
        (lambda: shard_batch(IDS, layout=Zigzag(3), rank=0, world_size=2), "expected a layout for world_size 2"),
        (lambda: shard_batch(IDS, layout="plain", rank=0, world_size=2), "expected one of"),
        (lambda: shard_batch(IDS, shift_labels=False), "expected labels with shift_labels=False"),
        (lambda: shard_batch(IDS[0]), r"expected input_ids of shape \[batch, seqlen >= 1\], got \[12\]"),
        (lambda: shard_batch(IDS[:, :0]), "seqlen >= 1"),
        (lambda: shard_batch(IDS.float()), "expected input_ids of an integer dtype, got torch.float32"),
        (lambda: shard_batch(IDS, IDS.bool()), "expected labels of an integer dtype, got torch.bool"),
        (lambda: shard_batch(IDS, IDS[:, 1:]), r"expected labels of the shape of input_ids \[1, 12\], got \[1, 11\]"),
        (lambda: shard_batch(IDS, position_ids=IDS[:, 1:]), r"expected position_ids of the shape of input_ids"),
        (lambda: shard_batch(IDS, position_ids=IDS.float()), "expected position_ids of an integer dtype"),
        (lambda: shard_batch(IDS, None, (0, 5, 3, 12)), r"sorted from 0 to seqlen 12, got \(0, 5, 3, 12\)"),
        (lambda: shard_batch(IDS, None, (1, 12)), "sorted from 0"),
        (lambda: shard_batch(IDS, None, (0, 11)), "to seqlen 12"),
        (lambda: shard_batch(IDS, None, ()), "sorted from 0"),
        (lambda: shard_batch(IDS, None, torch.tensor([[0, 12]])), "expected integer cu_seqlens of shape"),
        (lambda: shard_batch(IDS, None, torch.tensor([0.0, 12.0])), "expected integer cu_seqlens of shape"),
        (lambda: pad_batch(IDS, multiple=0), "expected multiple >= 1, got 0"),
    ],
)
def test_what_is_wrong_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
