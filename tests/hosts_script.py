"""What the ranks of test_hosts.py run: ``hosts_script.py parity SEED`` or ``hosts_script.py cut WHERE FOLDER TIMEOUT``.

Ranks find each other by torchrun's environment variables.
"""

import faulthandler
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from attention_cases import METHODS, NAMES, check_exact, make_inputs, run, truth

from seqpar_attn.kernels.reference import ReferenceKernel
from seqpar_attn.layout import get_layout

# Shards are taken one by one: otherwise shards as short as these would all be fetched in one step.
ZIGZAG = next(m for m in METHODS if m.name == "zigzag-pull-by-1")
CHECKED = {
    "ring_attention": (ZIGZAG, {}),
    "dist_flash_attention": (next(m for m in METHODS if m.name == "dist_flash-pull"), {}),
    # Hosts are told apart by torchrun's variable.
    "double ring": (next(m for m in METHODS if m.name == "zigzag-double-2-hosts-by-1"), {"ranks_per_host": None}),
}


def parity(seed: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, (method, more) in CHECKED.items():
        layout = get_layout(method.layout, world_size)
        for mask in ("causal", "packed"):
            torch.manual_seed(seed)  # the same whole sequence on every rank
            x = make_inputs(2 * world_size * 6, mask, batch=2)
            expected = {
                key: layout.shard(value, rank, 2 if key == "lse" else 1).contiguous() for key, value in truth(x).items()
            }
            results = run(x, method, world_size, rank, **more)
            check_exact(results, expected)
            worst = max((results[key] - expected[key]).abs().max().item() for key in NAMES)
            print(f"rank {rank} of {world_size}: {name} {mask}: {worst:.1e}", flush=True)


def cut(where: str, folder: Path) -> None:
    """Wait for the link to be cut at some point of a call, then go on with it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = make_inputs(2 * world_size * 32)
    run(x, ZIGZAG, world_size, rank, backend="reference")  # all connections are there

    def wait() -> None:
        if (folder / f"waits{rank}").exists():
            return
        (folder / f"waits{rank}").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)

    if where == "between":
        wait()
    else:
        usual = getattr(ReferenceKernel, where)

        def slow(*args, **kwargs):
            wait()
            return usual(*args, **kwargs)

        setattr(ReferenceKernel, where, slow)
    run(x, ZIGZAG, world_size, rank, backend="reference")
    print(f"rank {rank}: no error", flush=True)


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    timeout = float(arguments[2]) if what == "cut" else 30.0
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        parity(int(arguments[0])) if what == "parity" else cut(arguments[0], Path(arguments[1]))
    except Exception:
        print(f"raised at {time.time():.2f}: {traceback.format_exc().splitlines()[-1]}", flush=True)
        raise
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
