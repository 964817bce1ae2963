"""DyCoke: repeated tokens merge over time, and decode steps attend to those that matter now.

Paper: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
https://arxiv.org/abs/2411.15024. Source: https://github.com/KD-TAO/DyCoke.

The formulas are in `dycoke.merging` and `dycoke.core.selection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dycoke.compressor import Compressor
from dycoke.core.method import NO_CONTEXT, VideoContext, VisualTokens
from dycoke.core.selection import needs_refresh, top_mask
from dycoke.errors import (
    check_between,
    check_budget,
    check_count,
    check_layer,
    check_one_of,
    check_ratio,
    check_retention,
)
from dycoke.merging import budget_mask, merge_mask, merge_mean, video_budget
from dycoke.methods.base import check_positions, check_settings

ECHO: dict[str, Any] = {"echo": 0.5, "echo_exact": 1}
"""Echoes as DyCoke+ has them."""
PLUS: dict[str, Any] = {**ECHO, "score_layer": 0.6}
"""Settings of DyCoke+ beside the paper's; chosen in docs/decisions.md, 29."""


@dataclass(frozen=True)
class DyCoke(Compressor):
    """Dynamic compression of video tokens (https://arxiv.org/abs/2411.15024).

    Parameters
    ----------
    merge_ratio : float in [0, 1)
        Share of a non-anchor frame's tokens that is merged away before the LLM (K).
    prune_ratio : float in [0, 1)
        Share of the remaining visual tokens that a decode step does not attend to (P).
    prune_layer : int, at least 1
        Decoder layers with this index and above attend to the active set (L).
    window : int, at least 1
        Frames that share one anchor.
    refresh_threshold : float in [0, 1]
        The active set is chosen anew where the attention's cosine similarity to the step before
        is below this. 0 chooses once.
    merge : "keep" or "mean"
        What stands for a merged token: its counterpart as it is, or the mean of both.
    positions : "original" or "compact"
        Kept tokens keep their positions, or are numbered through (1-D RoPE only).
    token_budget : int, float or None
        How many visual tokens enter the LLM, instead of ``merge_ratio``: an int is tokens per
        sample, shared over its videos; a float in (0, 1] is the share that each video keeps, so
        that 1 is one token and 1.0 is all. May be below one frame in each window, see
        `dycoke.merging.budget_mask`. Not the paper's.
    score_layer : int, float or None
        The layer whose attention chooses the active set: None is the one below ``prune_layer``, as
        in the paper; a float in [0, 1) is a share of the layers. A layer that is pruned may score,
        too: those above it attend to its choice at once, it and those below it from the next step
        on (at first to that of the prompt's end). Not the paper's.
    skip_ratio : float in [0, merge_ratio]
        Share of a non-anchor frame's tokens that the vision encoder does not compute
        (`dycoke.vision.skip`): those that changed least, which merging then takes first. Not the
        paper's.
    skip_layer : int or None
        The first block of the encoder that leaves them out; None is an eighth of its depth.

    Notes
    -----
    Ratio 0 for both is the identity: generate runs untouched. So is a budget of 1.0 with
    ``prune_ratio=0``.
    """

    merge_ratio: float = 0.7
    prune_ratio: float = 0.7
    prune_layer: int = 3
    window: int = 4
    refresh_threshold: float = 0.9
    merge: Literal["keep", "mean"] = "keep"
    positions: Literal["original", "compact"] = "original"
    token_budget: int | float | None = None
    score_layer: int | float | None = None
    skip_ratio: float = 0.0
    skip_layer: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, check_ratio, "merge_ratio", "prune_ratio")
        check_settings(self, check_count, "prune_layer", "window")
        check_settings(self, check_between, "refresh_threshold", low=0, high=1)
        check_one_of("merge", self.merge, ("keep", "mean"))
        check_positions(self.positions)
        if self.score_layer is not None:
            check_settings(self, check_layer, "score_layer")
        self._check_skip()
        super().__post_init__()
        if self.token_budget is not None:
            check_settings(self, check_budget, "token_budget")
            if self.merge_ratio != type(self).merge_ratio:
                raise ValueError(
                    f"merge_ratio={self.merge_ratio} and token_budget={self.token_budget} both say "
                    "how many tokens stay; give one of them"
                )

    def _check_skip(self) -> None:
        check_settings(self, check_ratio, "skip_ratio")
        if self.skip_layer is not None:
            check_settings(self, check_count, "skip_layer", least=0)
        if self.skip_ratio == 0:
            return
        if self.token_budget is not None or self.merge == "mean":
            other = "merge='mean'" if self.token_budget is None else "a token_budget"
            raise ValueError(
                f"skip_ratio={self.skip_ratio:g} leaves out what merge_ratio drops, and {other} "
                "needs the features of all tokens; use merge_ratio and merge='keep', or "
                "skip_ratio=0"
            )
        if self.skip_ratio > self.merge_ratio:
            raise ValueError(
                f"skip_ratio={self.skip_ratio:g} must not be above "
                f"merge_ratio={self.merge_ratio:g}: what is not encoded has nothing to say, and "
                "has to leave"
            )

    @classmethod
    def plus(cls, **settings: Any) -> Self:
        """DyCoke with what this library adds to it: echoes, and a layer in the middle that scores.

        ``settings`` are those of DyCoke; what they leave out are the paper's defaults and `PLUS`.
        """
        return cls(**{**PLUS, **settings})

    @classmethod
    def at_retention(cls, retention: float, **settings: Any) -> Self:
        return cls(token_budget=check_retention("retention", retention), **settings)

    @property
    def idle(self) -> bool:
        budget = self.token_budget
        whole = (
            self.merge_ratio == 0 if budget is None else isinstance(budget, float) and budget == 1
        )
        return whole and self.prune_ratio == 0

    def keep_mask(self, features: Tensor, context: VideoContext = NO_CONTEXT) -> Tensor:
        """Which visual tokens of a video stay: (F, N, D) -> bool (F, N)."""
        if self.token_budget is None:
            return merge_mask(features, self.merge_ratio, self.window, context.encoded)
        tokens = features.shape[:2].numel()
        count = video_budget(self.token_budget, tokens, context.tokens, context.index)
        return budget_mask(features, count, self.window)

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep_mask(features, context)
        if self.merge == "mean":
            features = merge_mean(features, keep, self.window)
        return features, keep

    def select_tokens(self, scores: Tensor, visual: VisualTokens) -> tuple[Tensor, Tensor]:
        refreshed = needs_refresh(scores, visual.previous, self.refresh_threshold)
        if visual.padded:
            refreshed = refreshed & visual.valid.any(1)
            scores = scores.masked_fill(~visual.valid, -torch.inf)
        if not refreshed.any():  # a wait for the device, which saves all that follows
            return visual.active, refreshed
        chosen = top_mask(scores, visual.counts)
        return torch.where(refreshed[:, None], chosen, visual.active), refreshed
