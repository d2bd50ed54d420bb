"""Nothing ever hangs: whatever becomes of one rank, every other one raises in time, and can begin again.

Each test has a fault on one rank of four and repeats it SEQPAR_ATTN_REPEAT times, with another rank and another moment
each time. Afterwards those who live tear torch.distributed down and meet again, in the same processes and at the same
address, and must compute what one device does.
"""

import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attention_cases import Method, check_exact, make_inputs, run, truth, unshard

import seqpar_attn
from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.testing.distributed import RankPool
from seqpar_attn.testing.steps import ring_steps

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="stops processes and listens to the loopback device"),
    pytest.mark.timeout(600 + 60 * int(os.environ.get("SEQPAR_ATTN_REPEAT", "1"))),
]

# With these a group could not always be made again at once on its old address: under SEQPAR_ATTN_REPEAT only.
ON_DEMAND = ("SIGKILL", "SIGSTOP") if "SEQPAR_ATTN_REPEAT" in os.environ else ()
# What GPUs' copy engines do, here between processes of a CPU that map each other's files.
TRANSPORTS = ("p2p", "symmetric") if ON_DEMAND else ("p2p",)
REPEAT = int(os.environ.get("SEQPAR_ATTN_REPEAT", "1"))
RANKS = 4
TIMEOUT = 3.0  # long enough to meet on a machine that is busy, too: gloo knows only one
IN_TIME = TIMEOUT + 5
METHOD = Method("ring_attention", "zigzag", owners=1)
CALLS = {"forward": 4, "backward": 4}
"""Launches per pass: with one owner's keys at a time each rank has as many as there are ranks."""


@pytest.fixture(scope="module")
def pool():
    with RankPool(RANKS, timeout=120) as pool:
        yield pool


@pytest.fixture(params=range(REPEAT))
def folder(request, tmp_path):
    return tmp_path


@pytest.fixture(params=TRANSPORTS)
def transport(request, folder):
    (folder / "transport").write_text(request.param)
    return request.param


# What runs on the ranks ----------------------------------------------------------------------------------------------


def meet(rank, ranks, folder: Path, name: str, timeout=TIMEOUT):
    """Leave the group there is, and make one of ``ranks`` with a short timeout; ``rank`` is the number in the world.

    By way of a TCP store, at one address: ranks begin again as torchrun's and Slurm's environment lets them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    (folder / f"{name}{rank}").touch()
    wait_for([folder / f"{name}{other}" for other in ranks], 60)  # an old store must be gone before anyone looks for it
    address = f"tcp://127.0.0.1:{(folder / 'port').read_text()}"
    limit = timedelta(seconds=timeout)  # of meeting, too: gloo never looks at another one
    for attempt in range(21):
        try:
            dist.init_process_group("gloo", address, limit, rank=ranks.index(rank), world_size=len(ranks))
            return
        except dist.DistNetworkError as error:  # the socket of a killed rank may still be there
            if "EADDRINUSE" not in str(error) or attempt == 20:
                raise
            time.sleep(0.5)


def begin(rank, folder, x):
    run(x, METHOD, RANKS, rank)  # the first call imports a lot, which must not count
    meet(rank, list(range(RANKS)), folder, "begin")
    transport = (folder / "transport").read_text()
    if transport != "p2p":
        seqpar_attn.set_transport(None, transport)
        run(x, METHOD, RANKS, rank)  # sets up what the ranks share


def wait_for(files, seconds):
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, f"no {[file.name for file in files if not file.exists()]} in {seconds} s"
        time.sleep(0.01)


def plant(direction: str, call: int, fault: str):
    """Let the ``call``-th launch from now fail."""
    usual = getattr(ReferenceKernel, direction)
    launches = 0

    def faulty(*args, **kwargs):
        nonlocal launches
        launches += 1
        if launches == call:
            setattr(ReferenceKernel, direction, usual)
            if fault == "raise":
                raise ArithmeticError("planted")
            if fault == "sleep":
                time.sleep(2 * TIMEOUT)
            else:
                os.kill(os.getpid(), getattr(signal, fault))
        return usual(*args, **kwargs)

    setattr(ReferenceKernel, direction, faulty)


def end(pid):
    """Kill a process and see it dead: it may have the store's port."""
    os.kill(pid, signal.SIGKILL)
    status = Path(f"/proc/{pid}/status")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while not all(word in status.read_text() for word in ("State:\tZ", "Threads:\t1\n")):  # threads keep sockets
            time.sleep(0.01)


def shards(rank, x, layout):
    layout = seqpar_attn.get_layout(layout, dist.get_world_size())
    return [layout.shard(t, rank).requires_grad_() for t in (x.q, x.k, x.v)]


def caught(function):
    """What ``function`` raises, and after how many seconds."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error", "", time.monotonic() - start


def passes_until_error(rank, x):
    """Calls like those of a training loop. A rank that needs nothing of the faulty one's any more finishes its pass and
    finds out in the next one."""
    for _ in range(5):
        run(x, METHOD, RANKS, rank)


def kernel_fault(rank, world_size, folder: Path, odd: int, fault: str, direction: str, call: int, x, again):
    begin(rank, folder, x)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank == odd:
        plant(direction, call, fault)
    outcome = caught(lambda: passes_until_error(rank, x))
    gone = fault in ("SIGKILL", "SIGSTOP")
    alive = [r for r in range(RANKS) if r != odd or not gone]
    if fault == "SIGSTOP":
        (folder / f"raised{rank}").touch()
        wait_for([folder / f"raised{other}" for other in alive], IN_TIME)
        if rank == alive[0]:
            end(int((folder / f"pid{odd}").read_text()))
    return outcome, begin_again(rank, alive, folder, again)


def begin_again(rank, alive, folder, again):
    meet(rank, alive, folder, "again", 30)
    results = run(again[len(alive)], METHOD, len(alive), alive.index(rank))
    dist.barrier()
    return results


def disagreement(rank, world_size, folder: Path, odd: int, what: str, x, again):
    begin(rank, folder, x)
    passes = {
        "order": [("ring_attention", "contiguous", x), ("dist_flash_attention", "contiguous", x)],
        "backward order": [("ring_attention", "zigzag", x), ("ring_attention", "zigzag", again[RANKS])],
        "equal calls": [("ring_attention", "zigzag", x), ("ring_attention", "zigzag", x)],
        "length": [("ring_attention", "zigzag", x)],
    }[what]

    def forward(name, layout, x):
        inputs = shards(rank, x, layout)
        return getattr(seqpar_attn, name)(*inputs, layout=layout), inputs

    if what in ("backward order", "equal calls"):
        with ring_steps(1 << 20):
            made = [forward(*each) for each in passes]
        calls = [lambda out=out, inputs=inputs: torch.autograd.grad(out.sum(), inputs) for out, inputs in made]
    else:
        calls = [lambda each=each: forward(*each) for each in passes]
    if rank == odd:
        calls = calls[::-1] if len(calls) > 1 else [lambda: forward("ring_attention", "zigzag", again[RANKS])]
    return caught(lambda: [call() for call in calls]), begin_again(rank, list(range(RANKS)), folder, again)


def store_stops(rank, world_size, folder: Path, x):
    """Rank 0, which has the store, stops between two calls."""
    begin(rank, folder, x)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    run(x, METHOD, RANKS, rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    outcome = caught(lambda: run(x, METHOD, RANKS, rank))
    (folder / f"raised{rank}").touch()
    wait_for([folder / f"raised{other}" for other in range(1, RANKS)], IN_TIME)
    if rank == 1:
        end(int((folder / "pid0").read_text()))
    return outcome


# The tests -----------------------------------------------------------------------------------------------------------


_ports = itertools.cycle(range(1000))


def free_port():
    """One that no other worker of pytest-xdist takes, and no connection by itself."""
    first = 20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in (first + next(_ports) for _ in range(1000)):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def play(pool, function, folder, *args):
    (folder / "port").write_text(str(free_port()))
    return pool.outcomes(function, folder, *args, timeout=90)


def inputs():
    """Long enough that messages are under way when a rank ends; and what those who are left then compute."""
    return make_inputs(RANKS * 256), {count: make_inputs(24 * count) for count in (RANKS - 1, RANKS)}


def check_in_time(outcomes, odd, kind, words):
    for outcome in outcomes:
        if outcome.rank != odd:
            assert outcome.error is None, "\n".join(f"rank {o.rank}: {o.error}" for o in outcomes)
            (got, message, seconds), _ = outcome.result
            assert got == kind, f"rank {outcome.rank}: {got}: {message}"
            assert all(word in message for word in words(outcome.rank)), message
            assert seconds < IN_TIME


def check_again(outcomes, again):
    results = [outcome.result[1] for outcome in outcomes if outcome.result is not None]
    check_exact(unshard(results, METHOD), truth(again[len(results)]))


def words_of(transport):
    """Who waits for a flag knows whose it is, and no more; between calls it is the store that is waited for."""
    return lambda rank: [f"rank {rank}: ", *(["failed"] if transport == "p2p" else [])]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("fault", [*ON_DEMAND, "sleep", "raise"])
def test_kernel_fault(pool, folder, transport, fault, direction):
    odd, call, (x, again) = random.randrange(RANKS), random.randint(1, CALLS[direction]), inputs()
    print(f"rank {odd}, launch {call}")
    outcomes = play(pool, kernel_fault, folder, odd, fault, direction, call, x, again)
    check_in_time(outcomes, odd, "CommunicationError", words_of(transport))
    for outcome in outcomes:  # who was missing, unless the one that would know is
        message = outcome.result[0][1] if outcome.result is not None and outcome.rank != odd else "ranks "
        assert (
            "ranks " in message
            or (transport == "symmetric" and "did not come within" in message)
            or (fault == "SIGSTOP" and odd == 0 and "store did not answer" in message)
        ), message
    if fault in ("SIGKILL", "SIGSTOP"):
        assert "exit code -9" in outcomes[odd].error
    else:
        assert outcomes[odd].error is None, outcomes[odd].error
        kind, message, _ = outcomes[odd].result[0]
        assert (kind, message) == ("ArithmeticError", "planted") if fault == "raise" else kind == "CommunicationError"
    check_again(outcomes, again)
    assert sum(outcome.result is not None for outcome in outcomes) >= RANKS - 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_step_and_transfer_are_named(pool, folder, transport, direction):
    """Before the first launch is done no rank can end its pass, so all of them know the step."""
    odd, (x, again) = random.randrange(RANKS), inputs()
    outcomes = play(pool, kernel_fault, folder, odd, "raise", direction, 1, x, again)

    def words(rank):
        detail = ["exchange with ranks [", " bytes: "] if transport == "p2p" else [": rank "]
        return [f" of the {direction} pass: rank {rank}: ", "step ", " rank ", *detail]

    check_in_time(outcomes, odd, "CommunicationError", words)
    for outcome in outcomes if transport == "p2p" else ():
        message = outcome.result[0][1]
        assert outcome.rank == odd or "send to rank" in message or "receive from rank" in message


@pytest.mark.parametrize(
    "what, field",
    [("order", "method"), ("backward order", "q shape"), ("equal calls", "forward call"), ("length", "q shape")],
    ids=str,
)
def test_disagreement(pool, folder, transport, what, field):
    odd, (x, again) = random.randrange(1, RANKS), inputs()
    outcomes = play(pool, disagreement, folder, odd, what, x, again)
    check_in_time(outcomes, None, "ValueError", lambda _: [f"expected the same {field} on every rank", f"rank {odd}"])
    check_again(outcomes, again)


@pytest.mark.skipif(not ON_DEMAND, reason="under SEQPAR_ATTN_REPEAT only")
def test_stopped_store(pool, folder, transport):
    outcomes = play(pool, store_stops, folder, make_inputs(RANKS * 8))
    for outcome in outcomes[1:]:
        assert outcome.error is None, outcome.error
        kind, message, seconds = outcome.result
        assert kind == "CommunicationError" and f"rank {outcome.rank}: handshake" in message and "store" in message
        assert seconds < IN_TIME
