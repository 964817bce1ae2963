"""FastVID: salient tokens of every frame, and density peaks of every segment.

Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
https://arxiv.org/abs/2503.11187. Source: https://github.com/LunarShen/FastVID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.errors import check_between, check_count
from dycoke.merging import retained_count
from dycoke.methods.base import Reducer, check_settings
from dycoke.methods.clustering import (
    distances,
    group_means,
    highest,
    peak_scores,
    segment_lengths,
)


@dataclass(frozen=True)
class FastVID(Reducer):
    """Dynamic density pruning (https://arxiv.org/abs/2503.11187).

    The paper takes attention and frame features from SigLIP's pooling head, which models such as
    LLaVA-OneVision leave out. Here they are the vision encoder's own attention, as for the other
    methods, and the mean of a frame's tokens.

    Parameters
    ----------
    ratio, positions : see `OneShot`. Exactly ``F * max(1, int((1 - ratio) * N + 1e-6))`` tokens
        stay.
    segments : int, at least 1
        Least number of segments (c).
    threshold : float in [-1, 1]
        Adjacent frames less similar than this are in different segments (tau).
    context : float in [0, 1]
        Share of the budget that goes to density peaks; the rest goes to salient tokens (d).
    stride : int, at least 1
        Every so many frames of a segment one holds its peaks (p); fewer where they would not fit.
    neighbours : int, at least 1
        Tokens that a density is taken over.
    centre_weight : float in [0, 1]
        Least weight of a peak in the mean with what joins it (beta).
    """

    needs_vision: ClassVar[bool] = True

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    stride: int = 4
    neighbours: int = 4
    centre_weight: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, check_count, "segments", "stride", "neighbours")
        check_settings(self, check_between, "threshold", low=-1, high=1)
        check_settings(self, check_between, "context", "centre_weight", low=0, high=1)

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        scores, _ = video.encoder_attention
        count = max(1, retained_count(features.shape[1], self.ratio))
        peaks = int(self.context * count + 1e-6)

        salient = highest(scores, count - peaks)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, salient, True)
        if peaks == 0:
            return features, keep
        rest = highest((~keep).float(), keep.shape[1] - salient.shape[1])  # all others
        tokens = features.gather(1, rest[..., None].expand(-1, -1, features.shape[2]))
        peak = peak_scores(distances(tokens), self.neighbours)

        merged = features.clone()
        start = 0
        for length in segment_lengths(features, self.segments, self.threshold):
            segment = tokens[start : start + length].flatten(0, 1)
            for place, number in anchor_counts(length, peaks, rest.shape[1], self.stride):
                frame = start + place
                chosen = highest(peak[frame], number)
                kept = rest[frame, chosen]
                centres = tokens[frame, chosen]
                merged[frame, kept] = with_joined(centres, segment, self.centre_weight)
                keep[frame, kept] = True
            start += length
        return merged, keep


def anchor_counts(length: int, peaks: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Which frames of a segment hold its peaks, and how many.

    Parameters
    ----------
    length : frames of the segment.
    peaks : peaks of the segment per frame.
    room : tokens that a frame can hold, at least ``peaks``.
    stride : every so many frames, counted back from the last; fewer where the room asks for it.

    Returns
    -------
    list of (frame, count), the counts together exactly ``length * peaks``; the published code
        rounds each of them down.
    """
    stride = min(stride, room // peaks)
    frames = sorted(range(length - 1, -1, -stride))
    count, more = divmod(length * peaks, len(frames))
    return [(frame, count + (i < more)) for i, frame in enumerate(frames)]


def with_joined(centres: Tensor, tokens: Tensor, centre_weight: float) -> Tensor:
    """Let every token (M, D) join the centre (C, D) that it resembles most.

    Returns
    -------
    Tensor, shape (C, D)
        ``w * centre + (1 - w) * mean`` of the tokens that joined, the centre itself among them;
        ``w = max(centre_weight, 1 / (joined + 1))``.
    """
    similarity = F.normalize(tokens, dim=-1) @ F.normalize(centres, dim=-1).T
    means, sizes = group_means(tokens, similarity.argmax(-1), len(centres))
    weight = (1 / (sizes + 1)).clamp(min=centre_weight)
    return weight * centres + (1 - weight) * means
