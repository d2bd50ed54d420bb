"""The public functions over NCCL, one process per rank: a GPU each, or all on one (see RankPool)."""

import os
import time

import pytest
import torch
from attention_cases import METHODS, Inputs, check_error_rule, make_inputs, other_bits, run, truth, unshard

import seqpar_attn
from seqpar_attn.comm import transport
from seqpar_attn.testing.distributed import RankPool

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ZIGZAG, DIST_FLASH = METHODS[0], METHODS[7]
WORLD_SIZE = min(GPUS, 8) if GPUS > 1 else 3
LONG = 8192 if GPUS > 1 else 2048  # tokens per rank


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD_SIZE, timeout=240, backend="nccl") as pool:
        yield pool


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in (x.q, x.k, x.v, x.dout, x.dlse)), x.arguments)


def many(rank, world_size, inputs, methods):
    seqpar_attn.set_transport(None, "p2p")
    results = [run(on_gpu(x), method, world_size, rank, backend="triton") for method in methods for x in inputs]
    return [{name: t.cpu() for name, t in result.items()} for result in results]


@pytest.mark.parametrize("mask", ["causal", "packed", "window"])
def test_error_rule(pool, mask):
    x = make_inputs(2 * WORLD_SIZE * 160, mask, dtype=torch.bfloat16, headdim=64, batch=2)
    expected, single = truth(x), run(on_gpu(x), ZIGZAG, 1, backend="triton")
    single = {name: t.cpu() for name, t in single.items()}
    ranks = pool.run(many, [x], METHODS)
    for i, method in enumerate(METHODS):
        check_error_rule(unshard([results[i] for results in ranks], method), expected, single)


def long_call(rank, world_size, seqlen):
    """Transfers take long enough here to be caught out of order."""
    seqpar_attn.set_transport(None, "p2p")
    torch.manual_seed(0)
    x = make_inputs(seqlen, dtype=torch.bfloat16, headdim=128, nheads=8, device="cuda")
    return other_bits(x, (ZIGZAG, METHODS[9], DIST_FLASH), world_size, rank)


def test_same_bits_as_virtual_ranks(pool):
    assert pool.run(long_call, WORLD_SIZE * LONG) == WORLD_SIZE * [[]]


def differing(rank, world_size, seqlens):
    q = torch.randn(1, seqlens[rank], 4, 64, device="cuda", dtype=torch.bfloat16)
    start = time.monotonic()
    try:
        seqpar_attn.ring_attention(q, q, q)
    except ValueError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_mismatch_raises_on_every_rank(pool):
    lengths = [64] * (WORLD_SIZE - 1) + [96]
    for message, seconds in pool.run(differing, lengths):
        assert "expected the same q shape" in message and f"rank {WORLD_SIZE - 1}" in message
        assert seconds < 10


def by_itself(rank, world_size, seqlen):
    """What a group gets by itself, and what it becomes when its arena may not be as large as a longer call needs."""
    seqpar_attn.set_transport(None, "auto", limit=1 << 20)
    found = []
    for length in (64 * world_size, seqlen):
        torch.manual_seed(0)
        x = make_inputs(length, dtype=torch.bfloat16, headdim=128, nheads=8, device="cuda")
        found.append((transport(None), other_bits(x, (ZIGZAG,), world_size, rank)))
    seqpar_attn.set_transport(None, "p2p")
    return found


def test_a_group_finds_its_transport(pool):
    ranks = pool.run(by_itself, WORLD_SIZE * LONG)
    for (before, differ), (_, differ_too) in ranks:
        assert before.name == "auto" and differ == differ_too == []
    for _, (first, _) in ranks:
        expected = "several ranks share a GPU" if GPUS < WORLD_SIZE else f"{WORLD_SIZE} GPUs of one host"
        assert expected in first.reason and first.name == ("p2p" if GPUS < WORLD_SIZE else "symmetric")
    if GPUS >= WORLD_SIZE:
        for choice in pool.run(after_limit, WORLD_SIZE * LONG):
            assert choice.name == "p2p" and "expected a limit of at least" in choice.reason


def after_limit(rank, world_size, seqlen):
    seqpar_attn.set_transport(None, "auto", limit=1 << 20)
    x = make_inputs(seqlen, dtype=torch.bfloat16, headdim=128, nheads=8, device="cuda")
    run(x, ZIGZAG, world_size, rank)
    return transport(None)


def dies(rank, world_size):
    seqpar_attn.set_transport(None, "p2p")
    q = torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16)
    seqpar_attn.ring_attention(q, q, q)
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(3)
    seqpar_attn.ring_attention(q, q, q)
    torch.cuda.synchronize()
    return "no error"


def test_dead_peer_ends_every_rank():
    """torch's NCCL watchdog ends the processes of a broken group; what matters is that none waits on."""
    with RankPool(WORLD_SIZE, timeout=20, backend="nccl") as pool:
        outcomes = pool.outcomes(dies, timeout=120)
    for outcome in outcomes:
        assert outcome.error is not None and "no answer within" not in outcome.error, outcome
