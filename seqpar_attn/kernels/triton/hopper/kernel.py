"""The Hopper kernels behind the protocol of a block kernel."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from ....mask import MaskKind
from ...base import BlockMask, backward_without_pairs, forward_without_keys
from ...device import multiprocessors, on_device_of
from .. import TritonKernel, check_scale
from . import backward_refuses, refuses
from .config import BACKWARD, BackwardConfig, ForwardConfig, choose_forward, padded


@functools.cache
def _launchers() -> Any:
    """What needs Gluon, imported once and late; an import statement costs host time at every launch."""
    from . import finish, launch

    return SimpleNamespace(
        launch_forward=launch.launch_forward,
        launch_backward=launch.launch_backward,
        launch_zero=finish.launch_zero,
        launch_finish=finish.launch_finish,
    )


class HopperForward(TritonKernel):
    """See :class:`seqpar_attn.kernels.base.Kernel`. The backward pass is the portable kernels'. Inputs and results
    begin at multiples of 16 bytes, and so do their rows."""

    def __init__(self, forward: ForwardConfig | None = None) -> None:
        """A configuration, for measurements; None: what ``config`` chooses."""
        super().__init__()
        self._forward = forward

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        return super().refuses(device, dtype, headdim, kinds, softcap) or refuses(device, dtype, headdim)

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
        check_scale(softmax_scale)
        if q.numel() == 0:
            return
        if k.numel() == 0:
            forward_without_keys(lse, out_acc, out, carry)
            return
        batch, seqlen_q, nheads, headdim = q.shape
        plain = mask.kind is not MaskKind.INTERVAL and softcap is None
        config = self._forward or choose_forward(headdim, plain, seqlen_q, batch * nheads, multiprocessors(q.device))
        launchers = _launchers()
        with on_device_of(q):
            launchers.launch_forward(config, q, k, v, lse, out_acc, out, mask, softmax_scale, softcap, carry, keep)


class HopperKernel(HopperForward):
    """The backward pass as well; ``dq`` holds 2^14 times its sums for bfloat16, with columns in the order of
    ``finish.dq_position``."""

    nondeterministic = "dq is added up in whatever order programs come to it"

    def __init__(self, forward: ForwardConfig | None = None, backward: BackwardConfig | None = None) -> None:
        super().__init__(forward)
        self._backward = backward

    def refuses(
        self, device: torch.device, dtype: torch.dtype, headdim: int, kinds: frozenset[MaskKind], softcap: float | None
    ) -> str | None:
        reason = super().refuses(device, dtype, headdim, kinds, softcap)
        return reason or backward_refuses(dtype, headdim, False)

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
        """ValueError: ``deterministic``, which the portable kernels are for."""
        check_scale(softmax_scale)
        if deterministic:
            raise ValueError(f"expected deterministic=False, got True ({self.nondeterministic})")
        if q.numel() == 0 or k.numel() == 0:
            backward_without_pairs(dq, dk, dv, carry_dq, carry_dkv)
            return
        config = self._backward or BACKWARD.get(padded(q.shape[3]))
        launchers = _launchers()
        with on_device_of(q):
            launchers.launch_backward(
                config, q, k, v, dout, lse, delta, dq, dk, dv, mask, softmax_scale, softcap, carry_dq, carry_dkv
            )

    def finish_dq(self, dq: torch.Tensor, grad: torch.Tensor, softmax_scale: float) -> None:
        if dq.numel() == 0:
            return
        launchers = _launchers()
        with on_device_of(dq):
            launchers.launch_finish(dq, grad, softmax_scale)
