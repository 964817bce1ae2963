"""Controls: what DyCoke must beat at the same counts to show that its choices matter."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dycoke.core.method import NO_CONTEXT, VideoContext
from dycoke.errors import UnsupportedError, check_count
from dycoke.methods.base import Reducer, check_settings
from dycoke.methods.dycoke import DyCoke
from dycoke.video import sample_indices


@dataclass(frozen=True)
class RandomTokens(DyCoke):
    """As many tokens of a video as DyCoke keeps, but any of them.

    The choice follows from ``seed`` and the video's own features: another video has another one,
    the same video the same.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, check_count, "seed", least=0)

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep_mask(features, context)
        mark = zlib.crc32(features[0, 0].float().cpu().numpy().tobytes(), self.seed & 0xFFFFFFFF)
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


@dataclass(frozen=True)
class Downsampled(Reducer):
    """The same number of tokens by a lower resolution: each frame's grid, pooled to a smaller one.

    Cells of the smaller grid are means of those that they cover, and stand where the token in
    their middle stood. The grid is `smaller_grid`'s, so that somewhat fewer tokens may stay than
    ``ratio`` asks for. (A clip that is scaled down before the encoder is another thing: it saves
    the encoder's time, too.)
    """

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        frames, tokens, width = features.shape
        if video.grid is None or video.grid[0] * video.grid[1] != tokens:
            raise UnsupportedError(
                f"the grid of a frame's {tokens} tokens is needed to pool it, and the context says "
                f"{video.grid}; pass a VideoContext that has grid=(height, width)"
            )
        height, across = video.grid
        rows, columns = smaller_grid(height, across, 1 - self.ratio)
        pooled = adaptive_avg_pool2d(
            features.transpose(1, 2).reshape(frames, width, height, across), (rows, columns)
        )
        down, right = (
            ((torch.arange(few, device=features.device) + 0.5) * many / few).long()
            for few, many in ((rows, height), (columns, across))
        )
        places = (down[:, None] * across + right).flatten()
        features = features.clone()
        features[:, places] = pooled.flatten(2).transpose(1, 2)
        keep = torch.zeros(frames, tokens, dtype=torch.bool, device=features.device)
        keep[:, places] = True
        return features, keep


def smaller_grid(height: int, width: int, share: float) -> tuple[int, int]:
    """The grid of at most ``share`` of the cells, and at least one, that is best in its place.

    That is the one with the most cells, divided by how much longer a cell has become in one
    direction than in the other; of equals the lowest.
    """
    budget = max(1, int(share * height * width + 1e-6))

    def worth(rows: int) -> float:
        columns = min(width, budget // rows)
        longer = (rows / height) / (columns / width)
        return rows * columns / max(longer, 1 / longer)

    rows = max(range(1, min(height, budget) + 1), key=worth)
    return rows, min(width, budget // rows)
