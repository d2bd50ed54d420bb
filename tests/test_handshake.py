"""The handshake by itself: ranks are threads on one store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from seqpar_attn.comm import handshake
from seqpar_attn.comm.base import CommunicationError, compare


def ranks(count, name, store, **settings):
    settings = {"timeout": timedelta(seconds=3), "every_call": False} | settings
    return [handshake.Handshake(store, name, rank, count, **settings) for rank in range(count)]


def call(handshakes, descriptions, errors=None):
    """Every rank's answer or exception."""
    answers = [None] * len(handshakes)
    # Calls are counted per process; threads of one process share the count, so each rank gets the same number.
    counts = handshakes[0]._calls
    start = counts[handshakes[0].name]

    def one(rank):
        try:
            answers[rank] = handshakes[rank].agree(descriptions[rank], errors and errors[rank])
        except Exception as error:
            answers[rank] = error

    class Same(dict):
        def __getitem__(self, key):
            return start

        def __setitem__(self, key, value):
            pass

    for each in handshakes:
        each._calls = Same()
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(handshakes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    finally:
        for each in handshakes:
            each._calls = counts
        counts[handshakes[0].name] = start + 1
    return answers


@pytest.fixture
def store():
    return dist.HashStore()


def test_new_descriptions_talk_and_known_ones_do_not(store):
    group = ranks(3, "known", store)
    assert call(group, [{"dtype": "a"}] * 3) == [True] * 3
    assert call(group, [{"dtype": "a"}] * 3) == [False] * 3
    assert call(group, [{"dtype": "b"}] * 3) == [True] * 3
    assert call(group, [{"dtype": "a"}] * 3) == [False] * 3


def test_every_call_talks_on_cpu(store):
    group = ranks(2, "cpu", store, every_call=True)
    for _ in range(3):
        assert call(group, [{"dtype": "a"}] * 2) == [True] * 2


def test_difference_is_the_same_error_everywhere(store):
    answers = call(ranks(3, "differ", store), [{"dtype": "a"}, {"dtype": "a"}, {"dtype": "b"}])
    assert all(isinstance(answer, ValueError) for answer in answers)
    assert {str(answer) for answer in answers} == {
        "expected the same dtype on every rank, got 'a' on rank 0 and 'b' on rank 2"
    }


def test_a_complaint_reaches_everybody(store):
    answers = call(ranks(3, "complain", store), [{}] * 3, [None, ValueError("expected x, got y"), None])
    assert [str(answer) for answer in answers] == ["rank 1: expected x, got y"] * 3
    assert all(isinstance(answer, ValueError) for answer in answers)


def test_a_rank_that_knows_the_call_is_named_by_the_one_that_does_not(store):
    group = ranks(2, "later", store)
    call(group, [{"dtype": "a"}] * 2)
    answers = call(group, [{"dtype": "a"}, {"dtype": "b"}])
    assert answers[0] is False
    assert isinstance(answers[1], CommunicationError) and "ranks [0] did not join" in str(answers[1])


def test_memory_is_bounded_alike_on_all_ranks(store, monkeypatch):
    monkeypatch.setattr(handshake, "REMEMBERED", 2)
    group = ranks(2, "bounded", store)
    for name in "abc":
        assert call(group, [{"dtype": name}] * 2) == [True, True]
    assert call(group, [{"dtype": "a"}] * 2) == [True, True]
    assert call(group, [{"dtype": "c"}] * 2) == [False, False]
    assert all(len(one._agreed) == 2 for one in group)


def test_who_talks_on_every_call_remembers_nothing(store):
    group = ranks(2, "cpu memory", store, every_call=True)
    call(group, [{"dtype": "a"}] * 2)
    assert not any(one._agreed for one in group)


def test_old_keys_are_removed(store):
    group = ranks(2, "keys", store, every_call=True)
    before = store.num_keys()
    for _ in range(20):
        call(group, [{"dtype": "a"}] * 2)
    assert store.num_keys() - before <= 4


class Silent(dist.HashStore):
    """The store of a host that has become unreachable: what would have to come from there does not come."""

    def wait(self, *_):
        time.sleep(60)


def test_a_store_that_does_not_answer_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(handshake, "_GRACE_S", 0.1)
    start, store = time.monotonic(), Silent()  # a handshake does not keep its store alive
    answers = call(ranks(2, "silent", store, timeout=timedelta(seconds=0.2)), [{}] * 2)
    assert time.monotonic() - start < 5
    for answer in answers:
        assert isinstance(answer, CommunicationError) and "the group's store did not answer" in str(answer)


def test_compare_names_a_missing_field():
    with pytest.raises(ValueError, match="same window on every rank, got None on rank 0 and 4 on rank 1"):
        compare([{}, {"window": "4"}], [None, None])


def test_what_a_rank_does_not_know_is_not_compared():
    compare([{"call": "unknown"}, {"call": "4"}, {"call": "unknown"}, {"call": "4"}], [None] * 4)
    with pytest.raises(ValueError, match="same call on every rank, got 4 on rank 1 and 5 on rank 3"):
        compare([{"call": "unknown"}, {"call": "4"}, {"call": "unknown"}, {"call": "5"}], [None] * 4)
