"""What a method may do to a video's tokens, and when. Defaults keep everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

EncoderAttention = tuple[Tensor, Tensor]
"""What the vision encoder's attention says of a video: scores (F, N) and keys (F, N, C)."""


@dataclass(frozen=True, eq=False)
class VideoContext:
    """What a method may know of a video beside its features.

    Attributes
    ----------
    scores : Tensor, shape (F, N), or None
        Attention that each token received in the vision encoder, a mean over heads and over the
        queries of its frame, pooled to tokens; where the method asks for it (``needs_vision``).
        Where the encoder has a class token, the attention of that token alone.
    keys : Tensor, shape (F, N, C), or None
        The tokens' keys there as the attention takes them (after RoPE), a mean over heads, pooled
        alike.
    tokens : tuple of int
        Visual tokens of each video of the sample, this one included; () for this one alone.
    index : int
        Which of them this is.
    grid : (int, int) or None
        Height and width of a frame in tokens, N of them in raster order; None where not known.
    encoded : Tensor, bool, shape (F, N), or None
        Which tokens the vision encoder computed, where some were left out: the others have the
        features of their counterparts.
    """

    scores: Tensor | None = None
    keys: Tensor | None = None
    tokens: tuple[int, ...] = ()
    index: int = 0
    grid: tuple[int, int] | None = None
    encoded: Tensor | None = None

    @property
    def encoder_attention(self) -> EncoderAttention:
        """Scores and keys, for a method that ``needs_vision``."""
        if self.scores is None or self.keys is None:
            raise ValueError(
                "the context has no attention of the vision encoder; a method that uses it says "
                "needs_vision = True"
            )
        return self.scores, self.keys


NO_CONTEXT = VideoContext()


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens that entered the LLM, and which of them are active; only the cache writes.

    V is the largest number of them in a sample; token v of a sample is its v-th in raster order,
    over all its videos.

    Attributes
    ----------
    valid : Tensor, bool, (B, V): False for padding.
    counts : Tensor, long, (B,): how many tokens a decode step attends to.
    active : Tensor, bool, (B, V): the tokens that it attends to now.
    previous : Tensor or None, (B, V): attention in the step before.
    padded : whether there may be padding.
    """

    valid: Tensor
    counts: Tensor
    active: Tensor
    previous: Tensor | None = None
    padded: bool = True


class Method(ABC):
    """Settings and formulas; no state. The engine asks at up to three moments of a generation.

    Attributes
    ----------
    prune_ratio : share of the visual tokens that a decode step does not attend to; above 0
        `select_tokens` is asked.
    prune_layer : the first decoder layer that this holds for.
    positions : "original" or "compact", see `DyCoke`.
    score_layer : the decoder layer whose attention selects, or a share of the layers; None for
        the one below ``prune_layer``.
    echo : share of the decoder's layers, from the first on, in which the frames of a prompt still
        see what was merged away, see `dycoke.core.echo`.
    echo_exact : the first of these layers that compute it instead of guessing it.
    skip_ratio : share of the cells of every frame but anchors that the vision encoder leaves out,
        see `dycoke.vision.skip`.
    skip_layer : the first block of the encoder without them; None for an eighth of its depth.
    window : frames that share one anchor.
    needs_vision : whether `merge_tokens` wants the vision encoder's scores and keys.
    """

    prune_ratio: float = 0.0
    prune_layer: int = 1
    positions: str = "original"
    score_layer: int | float | None = None
    echo: float = 0.0
    echo_exact: int = 0
    skip_ratio: float = 0.0
    skip_layer: int | None = None
    window: int = 4
    needs_vision: ClassVar[bool] = False

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True where the settings ask for no compression at all."""

    @property
    def drops(self) -> bool:
        """Whether it drops tokens inside the LLM, see `drop_layer`."""
        return type(self).drop_layer is not Method.drop_layer

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        """Before the LLM: which visual tokens of a video enter it.

        Parameters
        ----------
        features : Tensor, shape (F, N, D)
        context : VideoContext
            What else is known of the video.

        Returns
        -------
        features : Tensor, shape (F, N, D)
            What goes on at the places that stay; the input itself where nothing is averaged.
        keep : Tensor, bool, shape (F, N)
        """
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    def drop_layer(self, layers: int) -> int | None:
        """The first decoder layer of ``layers`` without the tokens that are dropped inside.

        None where none are, or, asked of a method that ``drops``, where its settings keep all.
        """
        return None

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        """Inside the LLM, at prefill: which of a sample's visual tokens go on at `drop_layer`.

        Parameters
        ----------
        scores : Tensor, shape (V,)
            Attention of the prompt's last token in the layer below, a mean over heads, to the
            sample's visual tokens (all its videos, in prompt order).
        states : Tensor, shape (V, D)
            Their hidden states as they enter the layer.
        below : float
            Share of the decoder's layers that still hold all V tokens.

        Returns
        -------
        states : Tensor, shape (V, D)
            What goes on at the places that stay; the input itself where nothing is averaged.
        keep : Tensor, bool, shape (V,)
            At least one where V > 0.
        """
        return states, torch.ones_like(scores, dtype=torch.bool)

    def select_tokens(self, scores: Tensor, visual: VisualTokens) -> tuple[Tensor, Tensor]:
        """At a decode step: which visual tokens it attends to.

        Parameters
        ----------
        scores : Tensor, shape (B, V)
            Attention of the newest token in the scoring layer; 0 for padding.
        visual : VisualTokens
            Counts, the active set, and the attention of the step before.

        Returns
        -------
        active : Tensor, bool, shape (B, V)
            ``visual.counts[b]`` tokens of each sample; ``visual.active`` itself where all stays as
            it is, and then nothing is exchanged or counted.
        refreshed : Tensor, bool, shape (B,)
        """
        return visual.active, torch.zeros_like(visual.counts, dtype=torch.bool)
