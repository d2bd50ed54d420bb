"""Products of matrices with float32 results, and the sum of a weight's gradient over chunks of tokens."""

from __future__ import annotations

import torch

from ..kernels import accumulator_dtype

Tensor = torch.Tensor

SCRATCH_BYTES = 32 << 20
"""Float32 product of some rows of the weight's gradient, between the product and the addition: stays in the L2."""

LOW_BITS = 8
"""Bits kept beside bfloat16 between two chunks. 8: significands of 16 bits, whose rounding (2^-16 at each of a few
additions) is far below the last one's (2^-8), for half of the memory that all of float32's 16 would take."""


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` with float32 out of low-precision inputs, never rounded to their dtype on the way."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # cuBLAS; torch has it on GPUs only
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class WeightSum:
    """``sum(dlogits.T @ hidden)`` over chunks of tokens, in float32, then ``* factor`` in the weight's dtype.

    Of bfloat16 weights on the Triton backend the sum lives in the gradient's own memory and ``low_bits`` more per
    element (:mod:`seqpar_attn.loss.triton.split`); else in float32 (float64 for float64 weights).
    """

    def __init__(self, weight: Tensor, split: bool, low_bits: int | None = None) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.wide = accumulator_dtype(weight.dtype)
        self._empty = True
        self._low: Tensor | None = None
        self._scratch: Tensor | None = None
        if split:
            assert self.dtype == torch.bfloat16
            low_dtype = {8: torch.uint8, 16: torch.int16}[LOW_BITS if low_bits is None else low_bits]
            self._low = torch.empty(self.shape, dtype=low_dtype, device=self.device)
            self._sum = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            self._sum = torch.empty(self.shape, dtype=self.wide, device=self.device)

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """``dlogits: [tokens, vocab]``, ``hidden: [tokens, hidden]``."""
        first, self._empty = self._empty, False
        if self._low is None and dlogits.dtype == self.wide:
            if first:
                torch.mm(dlogits.t(), hidden, out=self._sum)
            else:
                torch.addmm(self._sum, dlogits.t(), hidden, out=self._sum)
            return
        if self._low is not None:
            from .triton import add_product

            if add_product(self._sum.view(torch.int16), self._low, dlogits, hidden, first):
                return
        vocab, width = self.shape
        rows = max(128, SCRATCH_BYTES // (4 * max(width, 1)) // 128 * 128)
        if self._scratch is None:
            self._scratch = torch.empty(min(rows, vocab), width, dtype=self.wide, device=self.device)
        for start in range(0, vocab, rows):
            part = slice(start, min(start + rows, vocab))
            if self._low is None and first:
                product(dlogits[:, part].t(), hidden, self._sum[part])
                continue
            addend = product(dlogits[:, part].t(), hidden, self._scratch[: part.stop - part.start])
            if self._low is None:
                self._sum[part] += addend
            else:
                from .triton import add_split

                add_split(self._sum[part].view(torch.int16), self._low[part], addend, first)

    def close(self) -> None:
        """No more chunks come: free what only they need."""
        self._scratch = None

    def finish(self, factor: Tensor) -> Tensor:
        """The gradient; ``factor`` is one number on the device. Once only."""
        if self._empty:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if self._low is None:
            return self._sum.mul_(factor).to(self.dtype)
        from .triton import finish_split

        finish_split(self._sum.view(torch.int16), self._low, factor)
        self._low = None
        return self._sum
