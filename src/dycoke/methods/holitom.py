"""HoliTom: what stands still is one token, the rest competes; once more inside the LLM.

Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models",
https://arxiv.org/abs/2505.21334. Source: https://github.com/cokeshao/HoliTom.
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
from dycoke.methods.base import TwoStage, check_settings
from dycoke.methods.clustering import distances, group_means, highest, peak_scores


@dataclass(frozen=True)
class HoliTom(TwoStage):
    """Holistic token merging (https://arxiv.org/abs/2505.21334).

    A video is cut into the segments in which most tokens stand still. Of those, one mean per
    position remains, in the segment's first frame; density peaks thin them out, attention thins
    out the moving ones. Inside the LLM half of the tokens is merged into the other half.

    Parameters
    ----------
    ratio, positions, inner : see `TwoStage`. The published 25 % and 10 % before the LLM are
        ``1 - ratio`` = 20.5 % and 8.2 % here, the mean over the layers; the published positions
        are "compact". Where standing still alone removes more than ``ratio``, less remains.
    threshold : float in [-1, 1], or None
        A position stands still where its cosine similarity to the next frame is above this (tau).
        None: the published 0.65 where less than 12.5 % enters the LLM (published for 10 %), else
        0.8 (published for 15, 20 and 25 %).
    max_segment : int, at least 1
        Frames of the longest segment.
    neighbours : int, at least 1
        Tokens that a density is taken over.
    centre_weight : float in [0, 1]
        Weight of a peak in the mean with what joins it.
    """

    needs_vision: ClassVar[bool] = True
    LAYER: ClassVar[int] = 18
    INNER: ClassVar[float] = 0.5

    threshold: float | None = None
    max_segment: int = 1024
    neighbours: int = 7
    centre_weight: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_settings(self, check_between, "threshold", low=-1, high=1)
        check_settings(self, check_count, "max_segment", "neighbours")
        check_settings(self, check_between, "centre_weight", low=0, high=1)

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        scores, _ = video.encoder_attention
        threshold = self.threshold
        if threshold is None:
            threshold = 0.65 if self.outer < 0.125 else 0.8
        still = still_for(features, threshold)
        lengths = still_segments(still, self.max_segment)

        ends = torch.tensor(lengths).cumsum(0).to(still.device) - 1
        frames = torch.tensor(lengths, device=still.device)
        # Of each segment, the positions that stand still through all of it; one frame has none.
        static = (still[ends] >= frames[:, None] - 1) & (frames[:, None] > 1)
        sizes = static.sum(1).tolist()
        places, total = scores.shape[1], scores.numel()
        saved = sum(size * (length - 1) for size, length in zip(sizes, lengths, strict=True))
        share = min(1.0, self.outer * total / (total - saved))

        # What moves: the same number in each frame of a segment, by attention.
        moving = torch.tensor([ceil((places - size) * share - 1e-6) for size in sizes])
        scores = scores.masked_fill(static.repeat_interleave(frames, 0), -torch.inf)
        keep = top_mask(scores, moving.to(still.device).repeat_interleave(frames))

        # What stands still: peaks among its means.
        merged = features.clone()
        start = 0
        for segment, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            # Nothing moves in some segments; none of them leaves without a token.
            count = max(round(size * share), int(size == places))
            if count:
                where = highest(static[segment].float(), size)
                means = features[start : start + length, where].mean(0)
                chosen, means = condensed(means, count, self.neighbours, self.centre_weight)
                merged[start, where[chosen]] = means
                keep[start, where[chosen]] = True
            start += length
        return merged, keep

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        chosen = highest(scores, self.inner_count(len(scores), below))
        keep = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)
        return absorbed(states, keep), keep


def still_for(tokens: Tensor, threshold: float) -> Tensor:
    """For how many steps back each position has been standing still.

    Parameters
    ----------
    tokens : Tensor, shape (F, N, D)
    threshold : float
        A step is still where the cosine similarity of both tokens is above this.

    Returns
    -------
    Tensor, long, shape (F, N)
        0 in the first frame, and where a position has just moved.
    """
    unit = F.normalize(tokens, dim=-1)
    moved = (unit[1:] * unit[:-1]).sum(-1) <= threshold
    frame = torch.arange(len(tokens), device=tokens.device)[:, None]
    since = torch.where(F.pad(moved, (0, 0, 1, 0), value=True), frame, 0).cummax(0).values
    return frame - since


def still_segments(still: Tensor, max_segment: int) -> list[int]:
    """The cut of a video that lets most tokens merge over time, by dynamic programming.

    A segment saves (positions that stand still through all of it) x (its frames - 1) tokens.

    Parameters
    ----------
    still : Tensor, long, shape (F, N)
        From `still_for`.
    max_segment : int
        Frames of the longest segment.

    Returns
    -------
    list of int: the frames of each segment. Where cuts save the same, the last segment is the
        shortest of them, and so on to the front.
    """
    frames = len(still)
    steps = torch.arange(frames, device=still.device)
    # (F, F): positions that are still for exactly, then for at least, so many steps at a frame.
    count = torch.zeros(frames, frames, dtype=torch.long, device=still.device)
    count.scatter_add_(1, still, torch.ones_like(still))
    saved = (count.flip(1).cumsum(1).flip(1) * steps).cpu()
    # best[f]: tokens saved by the best cut of the first f frames, of which the last segment is
    # length[f - 1] frames long.
    best = torch.zeros(frames + 1, dtype=torch.long)
    length = []
    for end in range(frames):
        most = min(end + 1, max_segment)
        options = best[end + 1 - most : end + 1].flip(0) + saved[end, :most]
        best[end + 1], step = options.max(0)  # the first of equals
        length.append(int(step) + 1)
    lengths: list[int] = []
    while frames > 0:
        lengths.insert(0, length[frames - 1])
        frames -= lengths[0]
    return lengths


def condensed(
    tokens: Tensor, count: int, neighbours: int, centre_weight: float
) -> tuple[Tensor, Tensor]:
    """Let tokens join the nearest of ``count`` density peaks.

    Parameters
    ----------
    tokens : Tensor, shape (M, D)
    count : int, 1 to M
    neighbours : int
        Tokens that a density is taken over; not more than ``count``.
    centre_weight : float

    Returns
    -------
    chosen : Tensor, long, shape (count,), ascending
    tokens : Tensor, shape (count, D)
        ``centre_weight * peak + (1 - centre_weight) * mean`` of what joined it, or the peak alone.
    """
    distance = distances(tokens)
    chosen = highest(peak_scores(distance, min(neighbours, count)), count)
    other = torch.ones_like(distance[0], dtype=torch.bool).index_fill_(0, chosen, False)
    others = highest(other.float(), len(tokens) - count)
    nearest = distance[others][:, chosen].argmin(-1)
    means, sizes = group_means(tokens[others], nearest, count)
    peaks = tokens[chosen]
    return chosen, torch.where(
        sizes > 0, centre_weight * peaks + (1 - centre_weight) * means, peaks
    )


def absorbed(states: Tensor, keep: Tensor) -> Tensor:
    """Merge dropped states one after another, in order, into the most similar kept one.

    Each time the kept one becomes ``(kept + dropped) / 2``; similarity (cosine) is that of before.

    Parameters
    ----------
    states : Tensor, shape (V, D)
    keep : Tensor, bool, shape (V,)

    Returns
    -------
    Tensor, shape (V, D): means at kept places, taken in float32 or float64; other places are as
        they were.
    """
    kept, dropped = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    if len(dropped) == 0:
        return states
    values = states.to(torch.promote_types(states.dtype, torch.float32))
    unit = F.normalize(values, dim=-1)
    target = (unit[dropped] @ unit[kept].T).argmax(-1)
    # A state that comes in is halved by itself and by each one that comes in after it.
    order = target.sort(stable=True).indices
    sizes = torch.zeros_like(kept).index_add_(0, target, torch.ones_like(target))
    after = sizes.cumsum(0)[target[order]] - torch.arange(len(order), device=order.device)
    total = values[kept] * torch.exp2(-sizes.float())[:, None]
    coming = values[dropped[order]] * torch.exp2(-after.float())[:, None]
    total.index_add_(0, target[order], coming)
    merged = states.clone()
    merged[kept] = total.to(states.dtype)
    return merged
