"""Cross-entropy over tokens that are split over ranks, and over logits that never exist whole."""

from .cross_entropy import cross_entropy
from .linear import linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
