"""Two hosts: network namespaces joined by a veth pair, with two ranks each, over gloo.

A namespace has interfaces, routes and a loopback of its own, so what crosses the pair is what would cross a cable, and
the pair can be cut.
"""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "hosts_script.py"
PORT = 29500  # nobody else is in the namespace
WIRE = "veth0"


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _unable() -> str | None:
    """Why there can be no hosts here."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and `ip` (iproute2) for network namespaces"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    return None


pytestmark = pytest.mark.skipif(_unable() is not None, reason=str(_unable()))


class Hosts:
    """Two namespaces and what runs in them."""

    def __init__(self, folder: Path):
        suffix = secrets.token_hex(4)
        self.names = [f"seqpar-{suffix}-{i}" for i in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def make(self) -> None:
        try:
            for name in self.names:
                ip("netns", "add", name)
            ends = [("netns", name) for name in self.names]
            ip("link", "add", WIRE, *ends[0], "type", "veth", "peer", "name", WIRE, *ends[1])
        except RuntimeError as cause:  # root of a container may not be allowed to
            pytest.skip(f"needs to make network namespaces: {cause}")
        for name, address in zip(self.names, self.addresses):
            ip("-n", name, "address", "add", f"{address}/24", "dev", WIRE)
            for device in ("lo", WIRE):
                ip("-n", name, "link", "set", device, "up")

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen:
        """Start a command on a host. Its output goes to a file, so that no full pipe can hold it up."""
        known = dict(PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME=WIRE, OMP_NUM_THREADS="1")
        known |= dict(MASTER_ADDR=self.addresses[0], MASTER_PORT=str(PORT))
        with open(self.folder / f"output{len(self.started)}", "wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                env=os.environ | known | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def output(self, number: int) -> str:
        return (self.folder / f"output{number}").read_text()

    def cut(self) -> None:
        """Unplug: nothing arrives any more, and nobody is told (no connection is closed)."""
        ip("-n", self.names[0], "link", "set", WIRE, "down")

    def wait(self, seconds: float) -> list[float | None]:
        """When each process ended, in seconds from now; None for those that did not. They say where they are."""
        start = time.monotonic()
        ends: list[float | None] = [None] * len(self.started)
        while None in ends and time.monotonic() - start < seconds:
            for i, process in enumerate(self.started):
                if ends[i] is None and process.poll() is not None:
                    ends[i] = time.monotonic() - start
            time.sleep(0.02)
        if None in ends:
            self.send(signal.SIGUSR1)
            time.sleep(0.5)
        return ends

    def send(self, number: signal.Signals) -> bool:
        """A signal to all that run here (torchrun's workers have sessions of their own); whether there were any."""
        pids = [int(pid) for name in self.names for pid in ip("netns", "pids", name, check=False).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)

    def close(self) -> None:
        for _ in range(50):  # a process that was just being started may come late
            if not self.send(signal.SIGKILL):
                break
            time.sleep(0.05)
        for process in self.started:
            process.kill()
            process.wait(5)
        for name in self.names:
            ip("-n", name, "link", "delete", WIRE, check=False)
            ip("netns", "delete", name, check=False)


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.close()


@pytest.mark.timeout(150)
def test_torchrun_on_two_hosts(hosts):
    """Outputs and gradients of all three methods, causal and packed, are those of one device."""
    seed = random.getrandbits(31)
    for host in range(2):
        hosts.start(
            host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host),
            "--nproc-per-node", "2", "--master-addr", hosts.addresses[0], "--master-port", str(PORT),
            str(SCRIPT), "parity", str(seed),
        )  # fmt: skip
    ends = hosts.wait(100)
    for host, process in enumerate(hosts.started):
        output = hosts.output(host)
        assert ends[host] is not None and process.returncode == 0, output
        for rank in (2 * host, 2 * host + 1):
            assert output.count(f"rank {rank} of 4: ") == 6, output


TIMEOUT = 4.0


@pytest.mark.timeout(150)
@pytest.mark.parametrize("where", ["forward", "backward", "between"])
def test_cut_link_ends_every_rank(hosts, where):
    """The link is cut in the middle of a pass, or before a call: four exceptions, in time.

    The ranks are plain processes, as Slurm starts them. (torchrun ends a host's other ranks when one has failed.)
    """
    for rank in range(4):
        hosts.start(
            rank // 2, sys.executable, str(SCRIPT), "cut", where, str(hosts.folder), str(TIMEOUT),
            RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank % 2),
        )  # fmt: skip
    deadline = time.monotonic() + 80
    while any(not (hosts.folder / f"waits{rank}").exists() for rank in range(4)):
        assert all(p.poll() is None for p in hosts.started), [hosts.output(rank) for rank in range(4)]
        assert time.monotonic() < deadline, [hosts.output(rank) for rank in range(4)]
        time.sleep(0.01)
    hosts.cut()
    cut = time.time()
    (hosts.folder / "cut").touch()
    ends = hosts.wait(TIMEOUT + 30)
    print(f"seconds from the cut to the end of ranks 0 to 3: {ends}")
    for rank, process in enumerate(hosts.started):
        output = hosts.output(rank)
        assert ends[rank] is not None and process.returncode == 1, output
        line = r"^raised at (\S+): \S+CommunicationError: (?:step .* pass: )?rank (\d): (.*)"
        raised = re.search(line, output, re.MULTILINE)
        assert raised is not None and int(raised[2]) == rank, output
        seconds = float(raised[1]) - cut
        print(f"rank {rank} after {seconds:.2f} s: {raised[3]}")
        assert seconds < TIMEOUT + 5, output
