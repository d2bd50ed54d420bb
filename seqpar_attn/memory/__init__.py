"""Training longer sequences in the same memory: what a model keeps, offloads and computes again.

``apply`` puts activation checkpointing around every block of a decoder that never computes attention twice: its results
are saved, on the device or in host memory, and the recomputation takes them from there, kernels and communication
included. Block inputs can wait in host memory, too, and MLPs can work on one tile of the sequence at a time.
"""

from .apply import Applied, apply
from .checkpoint import Policy
from .offload import available_host_memory
from .tiling import tiled

__all__ = ["Applied", "Policy", "apply", "available_host_memory", "tiled"]
