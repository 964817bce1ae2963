"""VidCom2: frames and tokens that differ from the mean stay.

Paper: "Video Compression Commander", https://arxiv.org/abs/2505.14454.
Source: https://github.com/xuyang-liu16/VidCom2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.core.selection import top_mask
from dycoke.methods.base import Reducer

WIDTHS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01


def steady_channels(features: Tensor) -> Tensor:
    """The half of the channels that varies least over the video: (F, N, D) -> (F, N, D // 2).

    Of an odd number the smaller half, and at least one.
    """
    variance = features.flatten(0, 1).var(0, unbiased=False)
    return features[..., variance.sort(stable=True).indices[: max(1, len(variance) // 2)]]


def likeness(tokens: Tensor, centre: Tensor) -> Tensor:
    """A sum of Gaussians of the distance to a centre, at all `WIDTHS`.

    Parameters
    ----------
    tokens : Tensor, shape (F, N, D)
    centre : Tensor, shape (F, 1, D) or (1, 1, D)

    Returns
    -------
    Tensor, shape (F, N): at most ``len(WIDTHS)``, at the centre itself.
    """
    squared = (tokens - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in WIDTHS]).sum(0)


def frame_counts(to_video: Tensor, share: float) -> Tensor:
    """Tokens that each frame keeps: more, the less it is like the video's mean.

    Parameters
    ----------
    to_video : Tensor, shape (F, N)
        Likeness of the tokens to the video's mean.
    share : float in (0, 1]
        Kept share of the video.

    Returns
    -------
    Tensor, long, shape (F,): 1 to N each. Before they are rounded, and unless a frame is full, they
        come to ``share`` of the video.
    """
    frames, tokens = to_video.shape
    unique = torch.softmax(-to_video.mean(1) / TEMPERATURE, 0)
    scale = (share * (1 + unique - 1 / frames)).clamp(max=1)
    return (scale * tokens).round().long().clamp(min=1)


@dataclass(frozen=True)
class VidCom2(Reducer):
    """VidCom2 (https://arxiv.org/abs/2505.14454).

    A frame's share of the budget grows with its distance from the video's mean. In a frame those
    tokens stay that are least like the video's mean and the frame's. Nothing is averaged, and
    nothing but the features is looked at.
    """

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        tokens = F.normalize(steady_channels(features), dim=-1)
        to_video = likeness(tokens, tokens.mean((0, 1), keepdim=True))
        to_frame = likeness(tokens, tokens.mean(1, keepdim=True))
        counts = frame_counts(to_video, 1 - self.ratio)
        return features, top_mask(-(to_video + to_frame), counts)
