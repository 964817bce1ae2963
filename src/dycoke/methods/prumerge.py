"""LLaVA-PruMerge, adapted to video: attended tokens take in their neighbours.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
https://arxiv.org/abs/2403.15388. Source: https://github.com/42Shawn/LLaVA-PruMerge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.merging import retained_count
from dycoke.methods.base import Reducer

NEIGHBOURS = 32


def prune_and_merge(
    features: Tensor, scores: Tensor, keys: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Keep the ``count - 1`` most attended tokens of each frame and one for the rest.

    A kept token becomes itself plus the attention-weighted sum of its 32 nearest tokens (all
    others, where there are fewer), kept or not, by cosine of keys. The rest token is the
    attention-weighted sum of what is not kept. Weights are shares of the frame's attention.

    Parameters
    ----------
    features : Tensor, float32 or float64, shape (F, N, D)
    scores : Tensor, shape (F, N), not negative
    keys : Tensor, shape (F, N, C)
    count : int, 1 to N

    Returns
    -------
    features : Tensor, shape (F, N, D)
        Merged tokens at the places that stay; the others are unchanged.
    keep : Tensor, bool, shape (F, N)
        ``count`` in each frame. The rest token stands where the most attended of the rest does: it
        weighs most in the sum, and has a true place in the picture.
    """
    frames, tokens, _ = features.shape
    # Pooling changes the sum of a frame's scores; as published, attention sums to 1.
    weights = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    places = weights.sort(dim=1, descending=True, stable=True).indices[:, :count]
    kept = places[:, :-1, None]

    unit = F.normalize(keys, dim=-1)
    similarity = unit.gather(1, kept.expand(-1, -1, unit.shape[2])) @ unit.mT
    similarity.scatter_(2, kept, -torch.inf)  # not its own neighbour
    order = similarity.sort(dim=2, descending=True, stable=True).indices
    near = order[..., : min(NEIGHBOURS, tokens - 1)]

    # Row by row what a new token is made of: (F, count, N).
    parts = weights.new_zeros(frames, count, tokens)
    parts[:, :-1].scatter_(2, near, weights[:, None].expand_as(order).gather(2, near))
    parts[:, :-1].scatter_(2, kept, 1.0)
    parts[:, -1] = weights.scatter(1, places[:, :-1], 0.0)
    merged = parts @ features
    keep = torch.zeros_like(weights, dtype=torch.bool).scatter(1, places, True)
    return features.scatter(1, places[..., None].expand_as(merged), merged), keep


@dataclass(frozen=True)
class LLaVAPruMerge(Reducer):
    """An adaptation of LLaVA-PruMerge (https://arxiv.org/abs/2403.15388) to a set budget.

    Published for single images of CLIP: outliers of the class token's attention are kept, so that
    the count depends on the image, and merging precedes the projector. Here each frame keeps
    ``int((1 - ratio) * N)`` tokens, at least one, by the mean attention that a token got, and
    merging follows projector and pooling; keys are means over heads. See `prune_and_merge`.
    """

    needs_vision: ClassVar[bool] = True

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        count = max(1, retained_count(features.shape[1], self.ratio))
        return prune_and_merge(features, *video.encoder_attention, count)
