"""EasyContext's throughput table: what it reports for Llama-2-7B on 8 A100 of 80 GB, and the rows we put beside it."""

from __future__ import annotations

from dataclasses import dataclass

THEIR_GPUS, THEIR_PEAK = 8, 312.0
"""Its GPUs, and the dense bf16 TFLOP/s of each that its MFU is a share of."""


@dataclass(frozen=True)
class Row:
    name: str
    tokens: int
    """Per GPU."""
    data_parallel: bool = False
    theirs: tuple[int, float] | None = None
    """tokens/s and MFU of EasyContext on 8 A100 of 80 GB."""

    def context(self, gpus: int) -> int:
        return self.tokens if self.data_parallel else self.tokens * gpus


ROWS = (
    Row("64K-data-parallel", 64 << 10, True, (10240, 0.374)),
    Row("64K", 8 << 10, False, (7816, 0.286)),
    Row("128K", 16 << 10, False, (4266, 0.244)),
    Row("512K", 64 << 10, False, (2133, 0.386)),
    Row("700K", 700 << 7, False, (1603, 0.387)),
    Row("1M", 128 << 10),
)
