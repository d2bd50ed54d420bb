"""Attention of new tokens over sharded keys: what one device computes over all of them."""

import pytest
import torch

import seqpar_attn
from seqpar_attn import LoopbackGroup, ShardedKV, decode
from seqpar_attn.mask import Mask
from seqpar_attn.testing.distributed import RankPool
from seqpar_attn.testing.errors import assert_error_rule
from seqpar_attn.testing.truth import attention

STEPS = (1, 1, 3, 1, 5, 1)
"""New tokens per call."""


def tensors(seqlen, *, batch=1, nheads=4, nheads_kv=2, headdim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seqlen)
    total = seqlen + sum(STEPS)
    shapes = [(batch, total, n, headdim) for n in (nheads, nheads_kv, nheads_kv)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def prompt_shards(x, seqlen, layout, group):
    """Keys or values of this process's part of the prompt; the padding is NaN, so that nobody may touch it."""
    rank, world_size, process_group = seqpar_attn.layout.resolve_group(group)
    placed = seqpar_attn.get_layout(layout, world_size)
    padded = torch.nn.functional.pad(x[:, :seqlen], (0, 0, 0, 0, 0, -seqlen % placed.multiple), value=float("nan"))
    return placed.shard_all(padded) if process_group is None else placed.shard(padded, rank)


def decoded(q, k, v, seqlen, layout, group, **options):
    """``(out, lse)`` of all tokens behind the prompt, and the cache."""
    kv = ShardedKV(seqlen, group=group, layout=layout, reserve=sum(STEPS) // 2)
    if seqlen:
        window = options.get("window_size")
        kv.store(*(prompt_shards(x, seqlen, layout, group) for x in (k, v)), window_size=window)
    found, at = [], seqlen
    for s in STEPS:
        new = slice(at, at + s)
        found.append(kv.attend(q[:, new], k[:, new], v[:, new], **options))
        at += s
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2), kv


def whole(q, k, v, seqlen, window_size=None, softcap=None):
    out, lse = attention(q, k, v, Mask(q.shape[1], window_size=window_size), softcap=softcap)
    return out[:, seqlen:], lse[:, :, seqlen:]


def close(found, expected):
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"window_size": 6}, {"window_size": 1}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seqlen", [0, 1, 5, 37])
def test_equals_one_device(seqlen, world_size, layout, options):
    q, k, v = tensors(seqlen, batch=2)
    out, lse, _ = decoded(q, k, v, seqlen, layout, LoopbackGroup(world_size), **options)
    close((out, lse), whole(q, k, v, seqlen, **options))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4), (5, 1)], ids=str)
def test_long_shards_are_attended_in_parts(heads, monkeypatch):
    monkeypatch.setattr(decode, "KEYS_PER_PART", 4)
    q, k, v = tensors(43, nheads=heads[0], nheads_kv=heads[1])
    close(decoded(q, k, v, 43, "zigzag", LoopbackGroup(3))[:2], whole(q, k, v, 43))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_one_rank(dtype):
    q, k, v = tensors(333, dtype=dtype, headdim=32)
    truth = whole(*(x.double() for x in (q, k, v)), 333)
    one, split = (decoded(q, k, v, 333, "zigzag", LoopbackGroup(n))[:2] for n in (1, 5))
    for name, x, expected, baseline in zip(("out", "lse"), split, truth, one):
        assert_error_rule(x, expected, baseline, name=name, slack=1e-7)


def test_who_keeps_what():
    """A prompt's keys stay where the layout put them, without padding; ranks keep new ones in turns."""
    q, k, v = tensors(10)
    kv = decoded(q, k, v, 10, "zigzag", LoopbackGroup(3))[2]
    # Padded to 12: chunks 0, 1, 2 to the ranks 0, 1, 2, then 3, 4 to 2, 1; 5 is padding. And 12 new tokens.
    assert kv.tokens == (2 + 4, 4 + 4, 4 + 4) and kv.seqlen == 22
    kv = ShardedKV(40, group=LoopbackGroup(4), layout="contiguous")
    x = torch.randn(1, 40, 1, 8)
    kv.store(x, x, window_size=12)
    assert kv.tokens == (0, 0, 1, 10), "a window's later queries see 11 of the prompt's keys"


def on_ranks(rank, world_size, seqlen, layout, options):
    q, k, v = tensors(seqlen)
    out, lse, kv = decoded(q, k, v, seqlen, layout, None, **options)
    return out, lse, kv.tokens


def complaint(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def wrong_calls(rank, world_size):
    """Faults of rank 1 only, and the message on every rank."""
    q, k, v = (x[:, :1] for x in tensors(0))
    kv = ShardedKV(0)
    faults = {
        "head": (q[..., :4], k, v, {}),
        "groups": (q[:, :, :3], k, v, {}),
        "dtype": (q, k.float(), v, {}),
        "window": (q, k, v, {"window_size": 0}),
        "window differs": (q, k, v, {"window_size": 3}),
        "tokens differ": (q.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), {}),
        "backend": (q, k, v, {"backend": "none"}),
    }
    found = {}
    for name, (bad_q, bad_k, bad_v, options) in faults.items():
        good = rank != 1
        arguments = (q, k, v) if good else (bad_q, bad_k, bad_v)
        found[name] = complaint(lambda a=arguments, o={} if good else options: kv.attend(*a, **o))
    kv.attend(q, k, v)  # and after all that it works
    prompt = torch.randn(1, 4, 2, 8)
    found["store"] = complaint(lambda: ShardedKV(12).store(prompt, prompt[:, : 4 - (rank == 1)]))
    found["store differs"] = complaint(lambda: ShardedKV(12 - (rank == 1)).store(prompt, prompt))
    other = ShardedKV(4 if rank == 1 else 0)
    found["no store"] = complaint(lambda: other.attend(q, k, v))
    return found, kv.seqlen


@pytest.fixture(scope="module")
def pool():
    with RankPool(3, timeout=60) as pool:
        yield pool


@pytest.mark.parametrize("options", [{}, {"window_size": 6}], ids=str)
@pytest.mark.parametrize(("seqlen", "layout"), [(37, "zigzag"), (2, "contiguous")])
def test_processes(pool, seqlen, layout, options):
    results = pool.run(on_ranks, seqlen, layout, options)
    expected = whole(*tensors(seqlen), seqlen, **options)
    for out, lse, _ in results:
        close((out, lse), expected)
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]), "ranks differ in a bit"
    if not options:
        assert sum(tokens[0] for _, _, tokens in results) == seqlen + sum(STEPS)


def test_a_fault_of_one_rank_is_an_error_on_all(pool):
    messages = {
        "head": "rank 1: expected q and k of one headdim, got 4 and 8",
        "groups": "rank 1: expected a positive headdim and nheads of q to be a multiple of that of k",
        "dtype": "rank 1: expected q, k and v of one dtype, got torch.float64 for q and torch.float32 for k",
        "window": "rank 1: expected window_size to be a positive int or None, got 0",
        "window differs": "expected the same window_size on every rank, got None on rank 0 and 3 on rank 1",
        "tokens differ": "expected the same q on every rank, got (1, 1, 4, 8) on rank 0 and (1, 2, 4, 8) on rank 1",
        "backend": "rank 1: expected auto or one of",
        "store": "rank 1: expected k and v of shape [batch, 4, nheads_kv, headdim], got [1, 4, 2, 8] and [1, 3, 2, 8]",
        "store differs": "expected the same prompt length on every rank, got 12 on rank 0 and 11 on rank 1",
        "no store": "rank 1: expected store before attend: the prompt has 4 tokens, got no keys of them",
    }
    for found, seqlen in pool.run(wrong_calls):
        assert seqlen == 1, "a refused call must not add a token"
        for name, message in messages.items():
            assert message in found[name], (name, found[name])


def test_refused():
    with pytest.raises(ValueError, match="expected seqlen >= 0 and reserve >= 0, got -1 and 0"):
        ShardedKV(-1)
    with pytest.raises(ValueError, match="layout"):
        ShardedKV(4, layout="spiral")
    kv, x = ShardedKV(10, group=LoopbackGroup(3)), torch.randn(2, 12, 2, 8)
    with pytest.raises(ValueError, match=r"expected k and v of shape \[batch, 12, nheads_kv, headdim\], got"):
        kv.store(x[:, :10], x[:, :10])
    kv.store(x, x)
    with pytest.raises(ValueError, match="expected one store"):
        kv.store(x, x)
    with pytest.raises(ValueError, match="expected at least one new token, got none"):
        kv.attend(x[:, :0], x[:, :0], x[:, :0])
    windowed = ShardedKV(12, group=LoopbackGroup(3), layout="contiguous")
    windowed.store(x, x, window_size=5)
    for window in (None, 6):
        with pytest.raises(ValueError, match=f"expected window_size <= 5, for which keys were stored, got {window}"):
            windowed.attend(x[:, :1], x[:, :1], x[:, :1], window_size=window)
    with pytest.raises(ValueError, match=r"expected k like the stored keys, \[2, s, 2, 8\] in torch.float32"):
        kv.attend(*(torch.randn(1, 1, 2, 8) for _ in range(3)))
