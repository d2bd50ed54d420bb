"""Every kernel of csrc once, on small blocks, for compute-sanitizer (make gpu-sanitize): nothing is compared here.

    compute-sanitizer --tool TOOL python3 tests/sanitize.py GROUP

Without torch's caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING=1) every tensor has bounds of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from kernel_cases import Case

from seqpar_attn.kernels.cuda import CudaKernel

FORWARD = [
    Case("cut", 700, 3000),
    Case("cut-packed", 331, 2500, nheads=4, nheads_kv=2, batch=2),
    Case("parts", 331, 1333, nheads=4, parts=2),
    Case("causal", 331, 331, "causal", nheads=4),
    Case("window", 331, 552, "window", offset=200),
    Case("softcap", 331, 552, softcap=2.0),
]
BACKWARD = [
    Case("full", 331, 552, nheads=4, batch=2),
    Case("causal", 700, 700, "causal", nheads=4),
    Case("parts", 331, 552, parts=2),
    Case("window", 331, 552, "window", offset=200, nheads=4),
    Case("waves", 1500, 1500, "causal", nheads=12, nheads_kv=12),
    Case("softcap", 131, 252, softcap=2.0),
    Case("one-query", 1, 77),
    Case("cut", 1100, 600, nheads=4),
]
SMALL = [  # for the tools that follow every access to shared memory
    Case("causal", 260, 260, "causal"),
    Case("full", 200, 300),
    Case("window", 150, 200, "window", offset=50),
    Case("cut", 600, 200),
]
GROUPS = {"forward": FORWARD, "backward": BACKWARD, "small": SMALL}


def run(case: Case, kernel: CudaKernel, dtype: torch.dtype, backward: bool) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    parts = (case.parts,) if case.parts > 1 else ()
    q, dout = (normal(case.batch, case.seqlen_q, case.nheads, case.headdim) for _ in range(2))
    k, v = (normal(*parts, case.batch, case.seqlen_k, case.nheads_kv, case.headdim) for _ in range(2))
    mask = case.block_mask("cuda")
    options = {"softmax_scale": case.headdim**-0.5, "softcap": case.softcap}
    lse = torch.empty(case.batch, case.nheads, case.seqlen_q, device="cuda")
    # initcheck does not see what the copy engine writes, which delta reads.
    out_acc, out = torch.empty(q.shape, device="cuda"), torch.zeros_like(q)
    kernel.forward(q, k, v, lse, out_acc, None, mask, carry=False, **options)
    kernel.forward(q, k, v, lse, out_acc, None, mask, carry=True, **options)
    kernel.forward(q, k, v, lse, out_acc, out, mask, carry=True, keep=False, **options)
    if not backward:
        return
    delta = kernel.delta(out, dout)
    for deterministic in (False, True):
        dq, dk, dv = (torch.empty(x.shape, device="cuda") for x in (q, k, v))
        fixed = {**options, "deterministic": deterministic}
        for carry in (False, True):
            kernel.backward(
                q, k, v, dout, lse, delta, dq, dk, dv, mask, carry_dq=carry, carry_dkv=carry, **fixed
            )  # fmt: skip
        kernel.finish_dq(dq, torch.empty_like(q), 1.0)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        kernel.backward(q, k, v, dout, lse, delta, dq, dk, dv, mask, carry_dq=False, carry_dkv=False, **fixed)


def main() -> None:
    group = sys.argv[1]
    for dtype in (torch.bfloat16, torch.float16) if group != "small" else (torch.bfloat16,):
        for headdim in (64, 128, 192, 256) if group != "small" else (64, 128, 256):
            for case in GROUPS[group]:
                for variant in (1, 2) if headdim == 128 and group == "forward" else (0,):
                    chosen = dataclasses.replace(case, headdim=headdim)
                    run(chosen, CudaKernel(variant), dtype, group != "forward")
                    torch.cuda.synchronize()
                    print(group, case, headdim, dtype, flush=True)


if __name__ == "__main__":
    main()
