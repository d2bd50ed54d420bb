"""The testing tools themselves: ranks, failures, hangs; the error rule."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from seqpar_attn.comm.base import Communicator
from seqpar_attn.testing import RankError, RankPool, assert_error_rule, error_report, run_ranks, run_ranks_outcomes
from seqpar_attn.testing.still import Still

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import one_rank


def _sum_of_ranks(rank, world_size, scale):
    x = torch.full((3,), float(rank + 1))
    dist.all_reduce(x)
    assert dist.get_rank() == rank and dist.get_world_size() == world_size
    return rank, os.getpid(), x * scale, torch.get_num_threads(), os.environ.get("SEQPAR_ATTN_PROBE")


def _raise_on(rank, world_size, bad):
    if rank == bad:
        raise ValueError(f"broken on purpose, {rank}")
    return rank


def _die_on(rank, world_size, bad):
    if rank == bad:
        os._exit(7)
    return rank


def _hang_on(rank, world_size, bad):
    if rank == bad:
        _sleep_here()
    return rank


def _sleep_here():
    time.sleep(1000)


def _wait_for_a_rank_that_raised(rank, world_size):
    if rank == 0:
        raise ValueError("I leave")
    dist.barrier()


def test_pool_ranks_see_each_other_and_stay(monkeypatch):
    with RankPool(3, timeout=120) as pool:
        first = pool.run(_sum_of_ranks, 2)
        second = pool.run(_sum_of_ranks, 3)
        for results, scale in ((first, 2), (second, 3)):
            assert [r[0] for r in results] == [0, 1, 2]
            for _, _, x, threads, _ in results:
                assert torch.equal(x, torch.full((3,), 6.0 * scale))
                assert threads == 1
        assert [r[1] for r in first] == [r[1] for r in second]
        assert len({r[1] for r in first}) == 3

        with pytest.raises(RankError, match=r"1 of 3 ranks failed\n--- rank 1: (.|\n)*broken on purpose, 1") as failure:
            pool.run(_raise_on, 1)
        assert [o.result for o in failure.value.outcomes] == [0, None, 2]
        assert "_raise_on" in failure.value.outcomes[1].error  # a traceback, not only a message

        monkeypatch.setenv("SEQPAR_ATTN_PROBE", "seen")  # the fork server is older than this
        again = pool.run(_sum_of_ranks, 1)
        assert {r[4] for r in again} == {"seen"} and {r[4] for r in first} == {None}
        assert not {r[1] for r in again} & {r[1] for r in first}


def test_single_rank():
    assert run_ranks(_raise_on, 1, -1, timeout=120) == [0]


def test_death_of_a_rank_is_reported():
    outcomes = run_ranks_outcomes(_die_on, 2, 0, timeout=120)
    assert outcomes[0].error is not None and "exit code 7" in outcomes[0].error
    assert outcomes[1].error is None and outcomes[1].result == 1


def test_hang_is_killed_within_the_timeout():
    with RankPool(2, timeout=120) as pool:
        pool.run(_raise_on, -1)
        start = time.monotonic()
        outcomes = pool.outcomes(_hang_on, 1, timeout=2)
        assert time.monotonic() - start < 10
    assert outcomes[0].result == 0
    assert "no answer within 2 s" in outcomes[1].error
    assert "_sleep_here" in outcomes[1].error  # says where it hangs


def test_a_rank_that_raised_does_not_leave_its_peers_waiting():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0: (.|\n)*I leave(.|\n)*rank 1: ") as failure:
        run_ranks(_wait_for_a_rank_that_raised, 2, timeout=100)
    assert time.monotonic() - start < 60
    assert "barrier" in failure.value.outcomes[1].error


def test_error_report_finds_the_worst_element():
    truth = torch.randn(4, 5, dtype=torch.float64)
    truth[2, 3] = 1.0
    actual = truth.clone()
    actual[2, 3] += 0.5
    report = error_report(actual, truth, name="out")
    assert report.worst == (2, 3)
    assert report.max_abs == pytest.approx(0.5) and report.relative == pytest.approx(0.5 / truth.norm().item())
    assert "out: max abs 5.000e-01" in str(report) and "[2, 3]: 1.5, truth 1" in str(report)


def test_infinities_that_belong_there_are_no_error():
    truth = torch.tensor([float("-inf"), 1.0], dtype=torch.float64)
    assert error_report(truth.clone(), truth).max_abs == 0
    assert not error_report(torch.tensor([0.0, 1.0]), truth).finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(dtype):
    truth = torch.randn(64, 64, dtype=torch.float64)
    baseline = truth.to(dtype)
    assert_error_rule(baseline, truth, baseline)
    with pytest.raises(AssertionError, match=r"relative error above 1.1 x"):
        assert_error_rule(truth + 1.2 * (baseline - truth), truth, baseline)
    spike = baseline.clone()
    spike[5, 6] += 10 * (baseline - truth).abs().max()
    with pytest.raises(AssertionError, match=r"\[5, 6\]"):
        assert_error_rule(spike, truth, baseline, factor=3)
    for bad in (float("nan"), float("inf")):
        broken = baseline.clone()
        broken[7, 8] = bad
        with pytest.raises(AssertionError, match=r"not finite where the truth is.*\[7, 8\]"):
            assert_error_rule(broken, truth, baseline)


def test_error_rule_refuses_what_cannot_be_compared():
    truth = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected result of shape"):
        assert_error_rule(torch.ones(3), truth, torch.ones(2))
    with pytest.raises(ValueError, match="in float64"):
        assert_error_rule(torch.ones(2), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="expected a baseline that is finite"):
        assert_error_rule(torch.ones(2), truth, torch.tensor([1.0, float("nan")]))


def test_stand_ins_for_communicators_are_whole():
    """Those that no test plays, because they need a GPU, are the benchmarks' and made of this one."""
    wanted = {*Communicator.__annotations__, *(name for name in vars(Communicator) if not name.startswith("_"))}
    assert wanted >= {"exchange", "open", "agree", "arena", "world_size"}
    assert not [name for name in wanted if not hasattr(Still(4, [1]), name)]
    assert issubclass(one_rank.OneRank, Still)
