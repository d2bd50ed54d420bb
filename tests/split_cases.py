"""Sums in a bfloat16 tensor and its missing low bits, against plain float32: on a GPU and under the interpreter."""

from __future__ import annotations

import unittest.mock

import torch

from seqpar_attn.loss import products
from seqpar_attn.loss.products import WeightSum
from seqpar_attn.loss.triton import add_split, finish_split


def check_split(device: str) -> None:
    addends = [torch.randn(37, 129).to(device) for _ in range(5)]
    addends[0][0, 0] = addends[1][0, 1] = float("nan")
    addends[2][0, 2], addends[3][0, 3] = float("inf"), float("-inf")
    addends[4][0, 4:8] = 0.0
    total = addends[0].clone()
    for x in addends[1:]:
        total += x
    factor = torch.tensor(0.7, device=device)
    for low_dtype in (torch.int16, torch.uint8):
        high = torch.full((37, 129), 77, dtype=torch.int16, device=device)
        low = torch.full((37, 129), 77, dtype=low_dtype, device=device)
        for n, x in enumerate(addends):
            add_split(high, low, x, n == 0)
        finish_split(high, low, factor)
        got, expected = high.view(torch.bfloat16), (total * factor).bfloat16()
        if low_dtype == torch.int16:  # all of float32
            assert torch.equal(got.nan_to_num(1e9), expected.nan_to_num(1e9))
        else:
            assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
            # 16 bits at each addition, of partial sums that may be larger than the last; then 8.
            partial = torch.stack(addends).cumsum(0).abs().amax(0)
            bound = (total * factor).abs() * 2.0**-8 + 5 * 2.0**-16 * partial
            error = (got.float() - total * factor).abs()
            assert (error <= bound * 1.001)[expected.isfinite()].all()
            finite = expected.isfinite()
            assert (got == expected)[finite].float().mean() > 0.97, "mostly the same bits as float32"
    # Rounding to nearest, exactly: a tie (away from zero; even where a factor is applied), just beside it, and a carry
    # into the exponent.
    tie, above = 1 + 2.0**-8, 1 + 2.0**-7
    for value, f, wanted in (
        (tie, 1, above), (-tie, 1, -above), (tie, 2, 2.0), (tie + 2.0**-15, 1, above), (tie - 2.0**-15, 1, 1.0),
        (2 - 2.0**-9, 1, 2.0), (float("nan"), 1, None), (float("-inf"), 1, float("-inf")),
    ):  # fmt: skip
        high, low = torch.empty(1, dtype=torch.int16, device=device), torch.empty(1, dtype=torch.uint8, device=device)
        add_split(high, low, torch.tensor([value], device=device), True)
        finish_split(high, low, torch.full((), float(f), device=device))
        result = high.view(torch.bfloat16).item()
        assert result == wanted or (wanted is None and result != result), (value, result)


def check_weight_sum(device: str, low_bits: int, chunks: int) -> None:
    """Many chunks, three blocks of rows: as good as one product, where a bfloat16 sum is lost."""
    vocab, width, tokens = 700, 64, chunks * 8
    g, h = (torch.rand(tokens, n).to(device, torch.bfloat16) for n in (vocab, width))
    total = WeightSum(torch.empty(vocab, width, dtype=torch.bfloat16, device=device), True, low_bits)
    with unittest.mock.patch.object(products, "SCRATCH_BYTES", 256 * width * 4):
        for start in range(0, tokens, 8):
            total.add(g[start : start + 8], h[start : start + 8])
    total.close()
    truth = g.double().t() @ h.double() / 3
    got = total.finish(torch.full((), 1 / 3, device=device))
    assert got.dtype == torch.bfloat16
    best = (truth.bfloat16().double() - truth).norm()
    assert (got.double() - truth).norm() < 1.05 * best
