"""What notices that a stream waits for a peer in vain, with a stand-in for the stream."""

import subprocess
import sys
import threading
import time

import pytest

from seqpar_attn.comm import CommunicationError
from seqpar_attn.comm.watch import Patience, raise_in, watch


def test_patience_counts_from_when_an_exchange_was_seen_to_begin():
    patience = Patience(2.0)
    assert patience.look(0, 0, 0.0) == 0
    assert patience.look(1, 0, 10.0) == 0
    assert patience.look(1, 0, 12.0) == 1
    assert patience.look(1, 0, 12.5) == 1.25
    assert patience.look(2, 1, 12.5) == 0, "another one has begun since"
    assert patience.look(2, 2, 20.0) == 0
    assert patience.look(2, 1, 21.0) == 0, "it had ended in between"
    assert patience.look(2, 1, 24.0) == 1.5


def wait_for_it():
    for _ in range(500):
        time.sleep(0.01)


def test_the_error_comes_in_the_thread_that_is_meant():
    timer = threading.Timer(0.1, raise_in, (threading.get_ident(), "rank 3 is gone"))
    timer.start()
    with pytest.raises(CommunicationError, match=r"^rank 3 is gone$"):
        wait_for_it()
    timer.join()


class Stream:
    def __init__(self, begun, done, failed=None):
        self.state, self.failed, self.reasons = (begun, done), failed, []

    def progress(self):
        return self.state

    def failed_peer(self):
        return self.failed

    def explain(self, exchange):
        return f"rank 1 in exchange {exchange}"

    def give_up(self, why):
        self.reasons.append(why)


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (Stream(7, 6), "rank 1 in exchange 7 did not come within 0.3 s"),
        (Stream(7, 7, failed=2), "rank 2 has given up"),
        (Stream(7, 6, failed=2), "rank 2 has given up; rank 1 in exchange 7 had not come"),
    ],
    ids=["stuck", "told", "told while stuck"],
)
def test_it_gives_up_once_and_says_why(stream, why):
    with pytest.raises(CommunicationError, match=why):
        watch(stream, 0.3)
        wait_for_it()
    time.sleep(0.2)
    assert stream.reasons == [why]


def test_what_was_waited_for_until_just_now_is_said():
    """A peer that gave up has let its stream go on, and so ended this rank's wait."""
    stream = Stream(7, 6)
    for later in (
        threading.Timer(0.8, setattr, (stream, "state", (8, 8))),
        threading.Timer(0.8, setattr, (stream, "failed", 2)),
    ):
        later.start()
    with pytest.raises(CommunicationError, match="rank 2 has given up; rank 1 in exchange 7 had not come"):
        watch(stream, 1.2)
        wait_for_it()


IN_TORCH = """
import torch
from seqpar_attn.comm.watch import watch
class Stream:
    values = torch.zeros(2, dtype=torch.int32)
    def progress(self):
        for _ in range(50):
            begun, done = (x.item() for x in self.values)
        return begun, done
    def failed_peer(self):
        return None
stream = Stream()
for _ in range(4):
    watch(stream, 1e-4)
"""


def test_threads_inside_of_torch_do_not_outlive_the_interpreter():
    """Coming back from there into what has ended would be std::terminate."""
    done = subprocess.run([sys.executable, "-c", IN_TORCH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_goes_on_is_left_alone_and_nothing_is_kept_alive():
    stream = Stream(0, 0)
    before = threading.active_count()
    watch(stream, 0.3)
    for number in range(1, 8):
        stream.state = (number, number - 1)
        time.sleep(0.1)
    assert not stream.reasons
    del stream
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("the thread lives on")
