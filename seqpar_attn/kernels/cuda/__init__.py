"""Block kernels in CUDA C++ (csrc/): Hopper. Importing this package loads no library and does not touch CUDA."""

from __future__ import annotations

import torch

from ...mask import MaskKind
from ..base import BlockMask, PlainKernel, accumulator_dtype, backward_without_pairs, forward_without_keys
from ..device import architecture, on_device_of
from . import building, library
from .launch import Plan, launch, make_plan, strides
from .structs import Accumulate, Backward, Delta, FinishDq, Forward, Merge, Problem, RowStrides

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_MASKS = {MaskKind.FULL: 0, MaskKind.CAUSAL: 1, MaskKind.INTERVAL: 2}
_ARCHITECTURES = {90: "90a"}
"""Compute capabilities with kernels, and the name under which they are built."""


def _problem(
    q: torch.Tensor, k: torch.Tensor, mask: BlockMask, softmax_scale: float, softcap: float | None, variant: int
) -> Problem:
    *parts, batch, seqlen_k, nheads_kv, headdim = k.shape
    return Problem(
        batch=batch, seqlen_q=q.shape[1], seqlen_k=seqlen_k, parts=parts[0] if parts else 1, nheads=q.shape[2],
        nheads_kv=nheads_kv, headdim=headdim, dtype=_DTYPES[q.dtype], mask=_MASKS[mask.kind], offset=mask.offset,
        softmax_scale=softmax_scale, softcap=softcap or 0.0, variant=variant,
    )  # fmt: skip


def _rows(x: torch.Tensor) -> RowStrides:
    assert x.stride(2) == 1 or x.shape[2] == 1
    return RowStrides(x.stride(0), x.stride(1))


class CudaKernel(PlainKernel):
    """See :class:`seqpar_attn.kernels.base.Kernel`."""

    name = "cuda"

    def __init__(self, variant: int = 0) -> None:
        """``variant``: 0 lets the library choose between its tile shapes, other numbers are for measurements."""
        self._variant = variant
        self._failed: str | None = None

    @property
    def recordable(self) -> bool:
        return True

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no NVIDIA GPU"
        return self._failed or library.unavailable()

    def prepare(self) -> None:
        """Compile the library where there is none and nvcc is."""
        if not torch.cuda.is_available():
            return
        arch = _ARCHITECTURES.get(architecture(torch.device("cuda", torch.cuda.current_device())))
        if arch is None or library.unavailable(arch=arch) is None:
            return
        try:
            library.load(build=True, arch=arch)
        except (library.LibraryError, building.BuildError) as error:
            self._failed = str(error)  # which is then why the backend cannot serve

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        if dtype not in _DTYPES:
            return f"expected bfloat16 or float16, got {dtype}"
        if headdim % 8 or not 8 <= headdim <= 256:
            return f"expected a head dimension that is a multiple of 8 and at most 256, got {headdim}"
        if device.type != "cuda":
            return f"expected CUDA tensors, got {device}"
        found = architecture(
            torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        )
        if found not in _ARCHITECTURES:
            return f"expected compute capability 9.0, got {found / 10}"
        built = library.architectures()
        if _ARCHITECTURES[found] not in built:
            return f"expected a library built for {_ARCHITECTURES[found]}, got one for {', '.join(built)}"
        return None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        out_acc: torch.Tensor | None,
        out: torch.Tensor | None,
        mask: BlockMask,
        *,
        softmax_scale: float,
        softcap: float | None,
        carry: bool,
        keep: bool = True,
    ) -> None:
        if q.numel() == 0:
            return
        if k.numel() == 0:
            forward_without_keys(lse, out_acc, out, carry)
            return
        keep = keep and out_acc is not None

        def plan() -> Plan:
            struct = Forward(
                problem=_problem(q, k, mask, softmax_scale, softcap, self._variant), carry=carry, keep=keep,
                q_strides=strides(q), k_strides=strides(k), v_strides=strides(v), acc_strides=strides(out_acc),
                out_strides=strides(out), lse_strides=_rows(lse),
            )  # fmt: skip
            fields = ("q", "k", "v", "lse", "out_acc", "out", "problem.key_lo", "problem.key_hi")
            return make_plan("forward", struct, fields, counters="forward")

        options = (mask.kind, mask.offset, softmax_scale, softcap, carry, keep, self._variant)
        with on_device_of(q):
            launch("forward", options, (q, k, v, lse, out_acc, out, mask.key_lo, mask.key_hi), plan)

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        mask: BlockMask,
        *,
        softmax_scale: float,
        softcap: float | None,
        carry_dq: bool,
        carry_dkv: bool,
        deterministic: bool,
    ) -> None:
        if q.numel() == 0 or k.numel() == 0:
            backward_without_pairs(dq, dk, dv, carry_dq, carry_dkv)
            return

        def plan() -> Plan:
            struct = Backward(
                problem=_problem(q, k, mask, softmax_scale, softcap, self._variant), carry_dq=carry_dq,
                carry_dkv=carry_dkv, round_dkv=dk.dtype == q.dtype, deterministic=deterministic,
                q_strides=strides(q), k_strides=strides(k), v_strides=strides(v),
                dout_strides=strides(dout), dq_strides=strides(dq), dk_strides=strides(dk), dv_strides=strides(dv),
                lse_strides=_rows(lse), delta_strides=_rows(delta),
            )  # fmt: skip
            fields = ("q", "k", "v", "dout", "lse", "delta", "dq", "dk", "dv")
            bounds = tuple(f"problem.{name}" for name in ("query_lo", "query_hi"))
            counters = "backward in order" if deterministic else "backward"
            return make_plan("backward", struct, fields + bounds, counters)

        arrays = (q, k, v, dout, lse, delta, dq, dk, dv, mask.query_lo, mask.query_hi)
        flags = (carry_dq, carry_dkv, deterministic, dk.dtype)
        options = (mask.kind, mask.offset, softmax_scale, softcap, *flags, self._variant)
        with on_device_of(q):
            launch("backward", options, arrays, plan)

    def delta(self, out: torch.Tensor, dout: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        batch, seqlen, nheads, headdim = out.shape
        delta = into
        if delta is None:
            delta = torch.empty(batch, nheads, seqlen, dtype=accumulator_dtype(out.dtype), device=out.device)
        if out.numel() == 0:
            return delta

        def plan() -> Plan:
            struct = Delta(
                batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, dtype=_DTYPES[out.dtype],
                out_strides=strides(out), dout_strides=strides(dout), delta_strides=_rows(delta),
            )  # fmt: skip
            return make_plan("delta", struct, ("out", "dout", "delta"))

        with on_device_of(out):
            launch("delta", None, (out, dout, delta), plan)
        return delta

    def finish_dq(self, dq: torch.Tensor, grad: torch.Tensor, softmax_scale: float) -> None:
        if dq.numel() == 0:
            return

        def plan() -> Plan:
            batch, seqlen, nheads, headdim = dq.shape
            struct = FinishDq(
                batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, dtype=_DTYPES[grad.dtype],
                softmax_scale=softmax_scale, dq_strides=strides(dq), grad_strides=strides(grad),
            )  # fmt: skip
            return make_plan("finish_dq", struct, ("dq", "grad"))

        with on_device_of(dq):
            launch("finish_dq", (softmax_scale, grad.dtype), (dq, grad), plan)

    def merge(
        self,
        lse: torch.Tensor,
        out_acc: torch.Tensor,
        lse_part: torch.Tensor,
        out_part: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        if out_acc.numel() == 0:
            return
        dtype = out_part.dtype if out is None else out.dtype

        def plan() -> Plan:
            batch, seqlen, nheads, headdim = out_acc.shape
            struct = Merge(
                batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, dtype=_DTYPES.get(dtype, 0),
                part_fp32=out_part.dtype == torch.float32, acc_strides=strides(out_acc),
                part_strides=strides(out_part), out_strides=strides(out), lse_strides=_rows(lse),
                lse_part_strides=_rows(lse_part),
            )  # fmt: skip
            return make_plan("merge", struct, ("lse", "out_acc", "lse_part", "out_part", "out"))

        with on_device_of(out_acc):
            launch("merge", (out_part.dtype, dtype), (lse, out_acc, lse_part, out_part, out), plan)

    def accumulate(self, target: torch.Tensor, parts: torch.Tensor) -> None:
        if target.numel() == 0 or parts.numel() == 0:
            return

        def plan() -> Plan:
            batch, seqlen, nheads, headdim = target.shape
            dense = (nheads * headdim, headdim, 1)
            assert target.stride()[1:] == parts.stride()[-3:] == dense, f"{target.stride()}, {parts.stride()}"
            count, part_stride = (parts.shape[0], parts.stride(0)) if parts.ndim > target.ndim else (1, 0)
            struct = Accumulate(
                batch=batch, count=count, elements=seqlen * nheads * headdim, target_batch_stride=target.stride(0),
                part_stride=part_stride, part_batch_stride=parts.stride(-4),
            )  # fmt: skip
            return make_plan("accumulate", struct, ("target", "parts"))

        with on_device_of(target):
            launch("accumulate", None, (target, parts), plan)
