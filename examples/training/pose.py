"""PoSE: positions of a long context inside a short training window.

A window of S tokens is cut into chunks at random; before every chunk but the first the positions skip ahead by a random
amount, so that they spread over a context of L > S. Attention stays exact and as short as the window: only the rotary
embedding sees distances up to L. Skip-wise training: Zhu et al. 2023, arXiv 2309.10400. The chunks' text is one
contiguous piece, which that paper finds to matter little.
"""

from __future__ import annotations

import torch


def positions(seqlen: int, context: int, chunks: int, seed: int) -> torch.Tensor:
    """``[seqlen]`` int64: increasing positions below ``context``, in ``chunks`` runs that begin at 0 and at random.

    The same for the same ``seed``. Lengths of the runs are uniform over all ways to cut the window, the skips' sum is
    uniform in ``[0, context - seqlen]`` for two chunks, and skips never go back.

    Raises:
        ValueError: ``1 <= chunks <= seqlen <= context`` does not hold.
    """
    if not 1 <= chunks <= seqlen <= context:
        raise ValueError(
            f"expected 1 <= chunks <= seqlen <= context, got chunks={chunks}, seqlen={seqlen}, context={context}"
        )
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(seqlen - 1, generator=generator)[: chunks - 1].sort().values + 1
    skips = torch.zeros(chunks, dtype=torch.int64)
    for i in range(1, chunks):
        least = int(skips[i - 1])
        skips[i] = torch.randint(least, context - seqlen + 1, (), generator=generator)
    run = torch.searchsorted(cuts, torch.arange(seqlen), right=True)
    return torch.arange(seqlen) + skips[run]
