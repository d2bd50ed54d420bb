"""Run a function on N ranks: N processes of this machine, over gloo, or over NCCL on its GPUs.

The processes come from multiprocessing's *forkserver* with torch preloaded: four ranks start in about two seconds,
where ``spawn`` and torchrun take ten and plain ``fork`` hangs in the child's autograd threads. Ranks meet through a
file in a temporary folder, so nothing depends on a free port.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_LEAVE_AFTER_S = 5.0
"""How long a rank that raised stays, so that its peers can find the same fault on their own; then their collectives
with it fail at once rather than time out."""


@dataclass(frozen=True)
class RankOutcome:
    """What became of one rank: its result, or the error (a traceback, or how the process ended)."""

    rank: int
    result: Any = None
    error: str | None = None


class RankError(RuntimeError):
    """Some ranks failed. ``outcomes``: what became of every rank."""

    def __init__(self, outcomes: list[RankOutcome]) -> None:
        self.outcomes = outcomes
        failed = [o for o in outcomes if o.error is not None]
        parts = [f"{len(failed)} of {len(outcomes)} ranks failed"]
        super().__init__("\n".join(parts + [f"--- rank {o.rank}: {o.error}" for o in failed]))


class RankPool:
    """``world_size`` processes that run one function after another, all on one group.

    ``backend`` is "gloo", or "nccl", for which the processes share the machine's GPUs out; each has its own as the
    current device. Where there are fewer GPUs than ranks, every rank tells NCCL that it is a host of its own: NCCL
    then goes through sockets, far slower than any link, but with its own streams, kernels and order of operations.

    The processes start at the first :meth:`run` and again after any failure, which leaves the group in an unknown
    state. Use it as a context manager, or call :meth:`close`. ``timeout`` (seconds) bounds every run, the start of
    the processes included; what has not answered by then is killed.
    """

    def __init__(self, world_size: int, *, timeout: float = 60.0, backend: str = "gloo") -> None:
        if world_size < 1:
            raise ValueError(f"expected world_size >= 1, got {world_size}")
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"expected backend 'gloo' or 'nccl', got {backend!r}")
        if backend == "nccl" and not torch.cuda.is_available():
            raise ValueError("expected a GPU for backend 'nccl', got none")
        self.backend = backend
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """``[fn(rank, world_size, *args) for every rank]``, each in its own process, in rank order.

        ``fn`` is a function of a module's top level; arguments and results travel by pickle. Raises
        :class:`RankError` with every failed rank's traceback.
        """
        outcomes = self.outcomes(fn, *args, timeout=timeout)
        if any(o.error is not None for o in outcomes):
            raise RankError(outcomes)
        return [o.result for o in outcomes]

    def outcomes(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[RankOutcome]:
        """Like :meth:`run`, but failures are data: for tests of what happens when ranks fail, hang or die."""
        call = pickle.dumps((fn, args))
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not self._processes:
            self._start()
        done: dict[int, RankOutcome] = {}
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # the rank died: its end of file is read below
                pipe.send_bytes(call)
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for answered in ready:
                assert isinstance(answered, Connection)
                rank = waiting.pop(answered)
                done[rank] = self._receive(rank, answered)
        for rank in waiting.values():
            where = self._stack(rank)
            done[rank] = RankOutcome(rank, error=f"no answer within {timeout:g} s, killed; it was at\n{where}")
        if any(o.error is not None for o in done.values()):
            self.close()
        return [done[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes. The pool starts new ones if it is used again."""
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for work reads the end of file and leaves
        for process in self._processes:
            process.join(1.0)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # An operator's first call imports torch._dynamo, which takes longer than all else.
        context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", __name__])
        self._folder = Path(tempfile.mkdtemp(prefix="seqpar_attn_ranks_"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, str(self._folder), self.timeout, self.backend, theirs, dict(os.environ))
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank{rank}")
            process.start()
            theirs.close()  # so that a dead rank is an end of file here
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int, pipe: Connection) -> RankOutcome:
        try:
            ok, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(5.0)
            return RankOutcome(rank, error=f"the process ended with exit code {process.exitcode}")
        return RankOutcome(rank, result=value) if ok else RankOutcome(rank, error=value)

    def _stack(self, rank: int) -> str:
        """Where a rank that does not answer is, as it says itself."""
        assert self._folder is not None
        file, pid = self._folder / f"stack{rank}", self._processes[rank].pid
        if not file.exists() or pid is None or not hasattr(signal, "SIGUSR1"):
            return "(its start)"
        os.kill(pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            if text := file.read_text():
                return text
        return "(unknown)"


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """``[fn(rank, world_size, *args) for every rank]`` on fresh processes; see :meth:`RankPool.run`."""
    with RankPool(world_size, timeout=timeout) as pool:
        return pool.run(fn, *args)


def run_ranks_outcomes(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[RankOutcome]:
    """Like :func:`run_ranks`, but failures, hangs and deaths of ranks are returned; see :class:`RankOutcome`."""
    with RankPool(world_size, timeout=timeout) as pool:
        return pool.outcomes(fn, *args)


def _serve(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    backend: str,
    pipe: Connection,
    environ: dict[str, str],
) -> None:
    """The life of one rank: meet the others, then answer calls until the pipe ends."""
    os.environ.clear()  # the fork server's environment is as old as the first pool
    os.environ.update(environ)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
    torch.set_num_threads(1)
    stack = open(Path(folder) / f"stack{rank}", "w")  # noqa: SIM115 (open as long as the process lives)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stack)
    ok = True
    while ok:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            break
        try:
            if not dist.is_initialized():
                rendezvous = f"file://{folder}/rendezvous"
                if backend == "nccl":
                    _take_gpu(rank, world_size)
                dist.init_process_group(
                    backend, rendezvous, timedelta(seconds=timeout), rank=rank, world_size=world_size
                )
            fn, args = pickle.loads(call)
            answer = pickle.dumps((True, fn(rank, world_size, *args)))
        except BaseException:
            ok, answer = False, pickle.dumps((False, traceback.format_exc()))
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:
            break
    if not ok:
        pipe.poll(_LEAVE_AFTER_S)  # returns early when the pool closes its end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no destructors: they may wait for ranks that are gone


def _take_gpu(rank: int, world_size: int) -> None:
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if gpus < world_size:  # NCCL refuses two ranks of one host on one GPU
        os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_NET="Socket")
