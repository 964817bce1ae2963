"""V-CAST: frames at a turn of the video keep more, and in a frame what stands out.

Paper: "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language
Models", https://arxiv.org/abs/2603.27650. Source: https://github.com/xinyouu/V-CAST.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.core.selection import top_mask
from dycoke.methods.base import Reducer

TEMPERATURE = 0.7


def curvature(centres: Tensor) -> Tensor:
    """How sharply a video turns at each frame: (F, D) -> (F,), 0 straight on to 2 back again.

    ``centres`` are the frames' mean features, of length 1. Both ends, and frames before or behind
    which nothing changes, have 1.
    """
    steps = centres.diff(dim=0)
    inner = 1 - F.cosine_similarity(steps[:-1], steps[1:], dim=-1)
    return F.pad(inner, (1, 1), value=1.0)[: len(centres)]


def frame_counts(bends: Tensor, tokens: int, budget: int) -> Tensor:
    """Tokens that each frame keeps: one, and of the rest more, the sharper the turn.

    Parameters
    ----------
    bends : Tensor, shape (F,)
    tokens : int
        Tokens of a frame, which is the most that it keeps.
    budget : int, F to F * tokens
        Tokens of all frames.

    Returns
    -------
    Tensor, long, shape (F,): together ``budget``. What rounding and full frames leave over goes to
        the frame with the largest fraction until it is full, then to the next, as published.
    """
    frames = len(bends)
    exact = torch.softmax(bends / TEMPERATURE, 0) * (budget - frames)
    counts = 1 + exact.long().clamp(max=tokens - 1)
    order = (exact - exact.floor()).sort(descending=True, stable=True).indices
    room = tokens - counts[order]
    spare = budget - counts.sum() - (room.cumsum(0) - room)
    return counts.index_add(0, order, torch.minimum(spare.clamp(min=0), room))


def outstanding(features: Tensor, centres: Tensor) -> Tensor:
    """How much a token stands out in its frame: (F, N, D) and (F, D) -> (F, N).

    Its distance in direction from the frame's mean, and its length between the frame's shortest (0)
    and longest (1).
    """
    apart = 1 - F.cosine_similarity(features, centres[:, None], dim=-1)
    length: Tensor = features.norm(dim=-1)
    low, high = length.amin(1, keepdim=True), length.amax(1, keepdim=True)
    return apart + (length - low) / (high - low + 1e-6)


@dataclass(frozen=True)
class VCast(Reducer):
    """V-CAST (https://arxiv.org/abs/2603.27650).

    A frame's share of the budget grows with the curvature of the video there: the angle between
    what changed since the frame before and what changes until the next one. In a frame those tokens
    stay that are least like its mean, and longest. Not fewer than one token of each frame stay,
    however large ``ratio`` is.
    """

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        frames, tokens = features.shape[:2]
        centres = F.normalize(features.mean(1), dim=-1)
        budget = max(frames, round((1 - self.ratio) * frames * tokens))
        counts = frame_counts(curvature(centres), tokens, budget)
        return features, top_mask(outstanding(features, centres), counts)
