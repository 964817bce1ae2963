"""Intervals for accuracies and for their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964

# Correct and asked, of one story.
Count = tuple[int, int]


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % by default); (0, 1) where nothing was asked."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_difference(
    ours: Sequence[Count], theirs: Sequence[Count], draws: int = 5000, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of ``ours`` minus that of ``theirs``, with a 95 % bootstrap interval.

    Both are counts per story, over the same stories in the same order. Whole stories are drawn
    with replacement, the same ones for both sides, since the answers about one story hang
    together.

    Returns
    -------
    (difference, low, high)
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(f"need the same stories on both sides, got {a.shape} and {b.shape}")

    def difference(rows: np.ndarray) -> np.ndarray:
        left, right = a[rows].sum(-2), b[rows].sum(-2)
        result: np.ndarray = left[..., 0] / left[..., 1] - right[..., 0] / right[..., 1]
        return result

    drawn = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(difference(drawn), (0.025, 0.975))
    return float(difference(np.arange(len(a)))), float(low), float(high)
