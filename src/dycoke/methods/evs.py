"""EVS: tokens that are like the same place in the frame before leave.

Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
https://arxiv.org/abs/2510.14624. Source: https://github.com/vllm-project/vllm, which serves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.core.method import VideoContext
from dycoke.core.selection import top_mask
from dycoke.merging import retained_count
from dycoke.methods.base import Reducer


@dataclass(frozen=True)
class EVS(Reducer):
    """Efficient Video Sampling (https://arxiv.org/abs/2510.14624).

    The first frame stays whole. Of the others those tokens stay whose features are least like, by
    cosine similarity, those of the same place in the frame before; how many a frame keeps follows
    from that. Not fewer than one frame's tokens stay in all, however large ``ratio`` is.
    """

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        frames, tokens = features.shape[:2]
        change = 1 - F.cosine_similarity(features[1:], features[:-1], dim=-1)
        first = change.new_full((1, tokens), torch.inf)
        count = max(tokens, retained_count(frames * tokens, self.ratio))
        counts = torch.tensor([count], device=features.device)
        keep = top_mask(torch.cat([first, change]).reshape(1, -1), counts)
        return features, keep.view(frames, tokens)
