"""FlashVID: salient and diverse tokens of every frame, and trees of tokens over time.

Paper: "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal
Token Merging", https://arxiv.org/abs/2602.08024. Source: https://github.com/Fanziyang-v/FlashVID.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.core.selection import top_mask
from dycoke.errors import check_between, check_count
from dycoke.merging import share_budget
from dycoke.methods.base import TwoStage, check_settings
from dycoke.methods.clustering import (
    distances,
    group_means,
    highest,
    peak_scores,
    segment_lengths,
)


@dataclass(frozen=True)
class FlashVID(TwoStage):
    """Tree-based spatiotemporal token merging (https://arxiv.org/abs/2602.08024).

    Diversity is weighted with the vision encoder's attention alone; the published code knows a
    second weight, the relevance to the segment, which its configuration leaves out as well.

    Parameters
    ----------
    ratio, positions, inner : see `TwoStage`. ``F * ceil(N * outer)`` tokens enter the LLM.
    segments : int, at least 1
        Least number of segments.
    cut : float in [-1, 1]
        Adjacent frames less similar than this are in different segments.
    diverse : float in [0, 1]
        Share of the budget that goes to salient and diverse tokens; the rest goes to trees.
    threshold : float in [-1, 1]
        A token merges into its most similar one in the frame before above this cosine similarity.
    neighbours : int, at least 1
        Tokens that a density is taken over.
    """

    needs_vision: ClassVar[bool] = True
    LAYER: ClassVar[int] = 20
    INNER: ClassVar[float] = 0.3

    segments: int = 8
    cut: float = 0.9
    diverse: float = 0.7
    threshold: float = 0.8
    neighbours: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, check_count, "segments", "neighbours")
        check_settings(self, check_between, "cut", "threshold", low=-1, high=1)
        check_settings(self, check_between, "diverse", low=0, high=1)

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        scores, _ = video.encoder_attention
        count = ceil(features.shape[1] * self.outer - 1e-6)
        chosen = ceil(count * self.diverse - 1e-6)
        keep = diverse_mask(features, scores, chosen)
        if chosen == count:
            return features, keep

        merged = features.clone()
        start = 0
        for length in segment_lengths(features, self.segments, self.cut):
            frames = slice(start, start + length)
            means, roots = trees(features[frames], ~keep[frames], self.threshold, count - chosen)
            sizes = roots.sum(1).tolist()
            for frame, number in enumerate(share_budget((count - chosen) * length, sizes)):
                if number:
                    where = highest(roots[frame].float(), sizes[frame])
                    peaks, centres = clustered(means[frame, where], number, self.neighbours)
                    merged[start + frame, where[peaks]] = centres
                    keep[start + frame, where[peaks]] = True
            start += length
        return merged, keep

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        chosen = highest(scores, self.inner_count(len(scores), below))
        return states, torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)


def diverse_mask(tokens: Tensor, scores: Tensor, count: int) -> Tensor:
    """Tokens that got attention, and resemble no other chosen one, greedily.

    Parameters
    ----------
    tokens : Tensor, shape (F, N, D)
    scores : Tensor, shape (F, N)
    count : int
        How many of each frame.

    Returns
    -------
    Tensor, bool, shape (F, N)
        The first is the farthest from its nearest neighbour, each next one the farthest from all
        chosen so far; the distance to a token is (1 - cosine similarity) times its score.
    """
    unit = F.normalize(tokens, dim=-1)
    distance = (1 - unit @ unit.mT) * scores[:, None, :]
    frames, places = scores.shape
    keep = torch.zeros(frames, places, dtype=torch.bool, device=tokens.device)
    if count == 0:
        return keep
    # The nearest is the token itself.
    apart = distance.sort(dim=1).values[:, min(1, places - 1)]
    first = apart.argmax(-1, keepdim=True)
    keep.scatter_(1, first, True)
    apart = torch.full_like(apart, torch.inf)
    for _ in range(count - 1):
        row = distance.gather(1, first[..., None].expand(-1, -1, places))[:, 0]
        apart = torch.minimum(apart, row)
        first = apart.masked_fill(keep, -torch.inf).argmax(-1, keepdim=True)
        keep.scatter_(1, first, True)
    return keep


def trees(tokens: Tensor, free: Tensor, threshold: float, least: int) -> tuple[Tensor, Tensor]:
    """Let tokens of a segment merge into the most similar one of the frame before.

    Parameters
    ----------
    tokens : Tensor, shape (F, N, D)
    free : Tensor, bool, shape (F, N)
        The tokens that take part, equally many in each frame.
    threshold : float
        A token merges above this cosine similarity.
    least : int
        Tokens per frame that remain at least, a mean over frames; the most similar merge first.

    Returns
    -------
    means : Tensor, shape (F, N, D)
        At roots the mean of all that came to them, through other tokens, too.
    roots : Tensor, bool, shape (F, N)
        The free tokens that did not merge.
    """
    unit = F.normalize(tokens, dim=-1)
    similarity = unit[1:] @ unit[:-1].mT
    both = free[1:, :, None] & free[:-1, None, :]
    best, parent = similarity.masked_fill(~both, -torch.inf).max(-1)
    most = free.sum() - least * len(tokens)
    linked = (best > threshold) & top_mask(best.view(1, -1), most[None]).view_as(best)

    total, count = tokens.clone(), torch.ones_like(tokens[..., :1])
    for frame in range(len(tokens) - 1, 0, -1):
        goes = linked[frame - 1][:, None]
        total[frame - 1].index_add_(0, parent[frame - 1], total[frame] * goes)
        count[frame - 1].index_add_(0, parent[frame - 1], count[frame] * goes)
    return total / count, free & ~F.pad(linked, (0, 0, 1, 0))


def clustered(tokens: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """The means of ``count`` clusters of tokens (M, D), and which tokens are their peaks.

    Returns
    -------
    chosen : Tensor, long, shape (count,), ascending
    means : Tensor, shape (count, D)
    """
    distance = distances(tokens)
    chosen = highest(peak_scores(distance, min(neighbours, count)), count)
    nearest = distance[:, chosen].argmin(-1)
    nearest[chosen] = torch.arange(count, device=tokens.device)  # equal tokens, too
    return chosen, group_means(tokens, nearest, count)[0]
