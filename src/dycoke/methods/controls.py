"""Controls: what DyCoke must beat at the same counts to show that its choices matter."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke.core.method import NO_CONTEXT, VideoContext
from dycoke.methods.dycoke import DyCoke
from dycoke.video import sample_indices


@dataclass(frozen=True)
class RandomTokens(DyCoke):
    """As many tokens of a video as DyCoke keeps, but any of them.

    The choice follows from ``seed`` and the video's own features: another video has another one,
    the same video the same.
    """

    seed: int = 0

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep_mask(features, context)
        mark = zlib.crc32(features[0, 0].float().cpu().numpy().tobytes(), self.seed)
        order = torch.randperm(keep.numel(), generator=torch.Generator().manual_seed(mark))
        chosen = torch.zeros(keep.numel(), dtype=torch.bool)
        chosen[order[: int(keep.sum())]] = True
        return features, chosen.view(keep.shape).to(keep.device)


@dataclass(frozen=True)
class FewerFrames(DyCoke):
    """Whole frames, evenly spaced, not more tokens than DyCoke keeps, and at least one frame."""

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep_mask(features, context)
        frames, tokens = keep.shape
        count = max(1, int(keep.sum()) // tokens)
        keep = torch.zeros_like(keep)
        keep[sample_indices(frames, count)] = True
        return features, keep
