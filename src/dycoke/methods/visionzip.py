"""VisionZip: the tokens that the vision encoder attends to, and means of the others.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
https://arxiv.org/abs/2412.04467. Source: https://github.com/dvlab-research/VisionZip. The counts
for LLaVA-OneVision are those that HoliTom (https://arxiv.org/abs/2505.21334) compares with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.core.selection import top_mask
from dycoke.methods.base import Reducer

DOMINANT = 54 / 64
PUBLISHED = {(0.75, 196): 50, (0.9, 196): 20}  # (ratio, N) -> tokens per frame


def frame_count(tokens: int, ratio: float) -> int:
    """Tokens that a frame of ``tokens`` keeps: the published number, else the nearest one."""
    return PUBLISHED.get((ratio, tokens), max(1, round((1 - ratio) * tokens)))


def zip_frames(features: Tensor, scores: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keep dominant tokens as they are, and let contextual ones take in the rest.

    Of ``count`` tokens per frame, ``int(count * 54 / 64)`` are dominant, those with the highest
    score. Of the rest, evenly stepped ones are contextual, and every other token joins the one
    whose key is most similar.

    Parameters
    ----------
    features : Tensor, float32 or float64, shape (F, N, D)
    scores : Tensor, shape (F, N)
    keys : Tensor, shape (F, N, C)
    count : int, 1 to N

    Returns
    -------
    features : Tensor, shape (F, N, D)
        A contextual token plus the mean of those that joined it, as published: the sum is about
        twice as large as a token. Other places are unchanged.
    keep : Tensor, bool, shape (F, N)
        ``count`` in each frame.
    """
    frames, tokens, _ = features.shape
    top = int(count * DOMINANT)
    keep = top_mask(scores, torch.full((frames,), top, device=scores.device))
    rest = keep.byte().sort(dim=1, stable=True).indices[:, : tokens - top]  # in raster order
    step = (tokens - top) // (count - top)
    chosen = torch.zeros(tokens - top, dtype=torch.bool, device=rest.device)
    chosen[: step * (count - top) : step] = True
    target, joining = rest[:, chosen], rest[:, ~chosen]

    unit = F.normalize(keys, dim=-1)
    similarity = _rows(unit, joining) @ _rows(unit, target).mT
    joins = F.one_hot(similarity.argmax(2), count - top).mT.to(features.dtype)  # (F, target, other)
    mean = joins @ _rows(features, joining) / joins.sum(2, keepdim=True).clamp(min=1)
    places = target[..., None].expand_as(mean)
    return features.scatter_add(1, places, mean), keep.scatter(1, target, True)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Tokens of each frame: (F, N, D) at (F, n) -> (F, n, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


@dataclass(frozen=True)
class VisionZip(Reducer):
    """VisionZip (https://arxiv.org/abs/2412.04467), after projector and pooling.

    Each frame keeps as many tokens as any other, see `frame_count` and `zip_frames`. Contextual
    tokens stay at their own places, where the published code puts them behind the dominant ones.
    """

    needs_vision: ClassVar[bool] = True

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        count = frame_count(features.shape[1], self.ratio)
        return zip_frames(features, *video.encoder_attention, count)
