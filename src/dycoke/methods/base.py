"""What methods share: a base for each kind of them, and the checks of what they are handed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dycoke.compressor import Compressor
from dycoke.core.method import NO_CONTEXT, VideoContext
from dycoke.core.selection import top_mask
from dycoke.errors import check_one_of, check_ratio, check_retention
from dycoke.merging import check_features, retained_count


@dataclass(frozen=True)
class OneShot(Compressor):
    """A method that removes visual tokens once, at prefill.

    Parameters
    ----------
    ratio : float in [0, 1)
        Share of the visual tokens that is removed; 0 is the identity.
    positions : "original" or "compact"
        Kept tokens keep their positions, or are numbered through (1-D RoPE only).
    """

    ratio: float = 0.75
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        check_settings(self, check_ratio, "ratio")
        check_positions(self.positions)
        super().__post_init__()

    @classmethod
    def at_retention(cls, retention: float, **settings: Any) -> Self:
        removed = round(
            1 - check_retention("retention", retention), 12
        )  # .9, not .8999999999999999
        return cls(ratio=removed, **settings)

    @property
    def idle(self) -> bool:
        return self.ratio == 0


@dataclass(frozen=True)
class Reducer(OneShot):
    """A method that removes tokens before the LLM: its formula is `reduce`."""

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        if self.idle:
            return super().merge_tokens(features, context)
        tokens = in_full_precision(features)
        video = with_attention(context, tokens) if self.needs_vision else context
        reduced, keep = self.reduce(tokens, video)
        return features if reduced is tokens else reduced.to(features.dtype), keep

    @abstractmethod
    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        """Which tokens of a video stay, and what they are then.

        Parameters
        ----------
        features : Tensor, shape (F, N, D)
            Finite; float32, or float64 where the model computes in float64. Not to be changed in
            place.
        video : VideoContext
            Where the method ``needs_vision``, `VideoContext.encoder_attention` fits the features
            in shape, dtype and device.

        Returns
        -------
        features : Tensor, shape (F, N, D)
            What goes on at the places that stay; the input itself where nothing is averaged.
        keep : Tensor, bool, shape (F, N)
        """


@dataclass(frozen=True)
class ScoreBased(Reducer):
    """A method that keeps the tokens of a video with the highest `score`.

    ``int((1 - ratio) * F * N + 1e-6)`` of them stay, at least one; among equal scores those with
    the lowest raster index.
    """

    @abstractmethod
    def score(self, features: Tensor, video: VideoContext) -> Tensor:
        """How much each token matters: (F, N, D) -> (F, N), as handed to `Reducer.reduce`."""

    def reduce(self, features: Tensor, video: VideoContext) -> tuple[Tensor, Tensor]:
        scores, shape = self.score(features, video), tuple(features.shape[:2])
        if tuple(scores.shape) != shape:
            raise ValueError(
                f"{type(self).__name__}.score must give a score per token, of shape {shape}, "
                f"got {tuple(scores.shape)}"
            )
        if scores.isnan().any():
            raise ValueError(f"{type(self).__name__}.score gives NaN, which has no rank")
        count = max(1, retained_count(scores.numel(), self.ratio))
        counts = torch.tensor([count], device=scores.device)
        return features, top_mask(scores.reshape(1, -1), counts).view(shape)


@dataclass(frozen=True)
class TwoStage(Reducer):
    """A method that removes tokens before the LLM and inside it.

    ``ratio`` holds for the mean over the layers: before the LLM the method keeps `outer`; what it
    keeps inside follows from the depth, so that layers hold a share of ``1 - ratio`` on average. At
    the published depth of 28 layers that is the published share, `INNER`, wherever `outer` is
    below 1.

    Parameters
    ----------
    ratio, positions : see `OneShot`.
    inner : bool
        Whether tokens leave inside the LLM, too. Without, the first stage removes all of ``ratio``.
    """

    LAYER: ClassVar[int]  # the first one, of 28, that goes on with fewer tokens
    INNER: ClassVar[float]  # the share of the tokens that it goes on with

    inner: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, bool):
            raise TypeError(f"inner must be True or False, got {self.inner!r}")

    @property
    def drops(self) -> bool:
        return self.inner

    @property
    def outer(self) -> float:
        """Share of the visual tokens that enters the LLM."""
        if not self.inner:
            return 1 - self.ratio
        below = self.LAYER / 28
        return min(1.0, (1 - self.ratio) / (below + (1 - below) * self.INNER))

    def drop_layer(self, layers: int) -> int | None:
        layer = scaled_layer(self.LAYER, layers)
        return layer if self.inner and layer < layers else None

    def inner_count(self, tokens: int, below: float) -> int:
        """How many of ``tokens`` go on where a share ``below`` of the layers holds them all."""
        share = ((1 - self.ratio) / self.outer - below) / (1 - below)
        return min(tokens, max(1, round(share * tokens)))


def scaled_layer(layer: int, layers: int) -> int:
    """A layer index stated for 28 layers, as papers on 7B models do, in a decoder of ``layers``."""
    return max(1, round(layer * layers / 28))


def check_settings(
    method: Compressor, check: Callable[..., Any], *names: str, **limits: float
) -> None:
    """Check settings of a method by one of `dycoke.errors`, and set them to what it returns."""
    for name in names:
        value = check(name, getattr(method, name), **limits)
        object.__setattr__(method, name, value)  # the only way into a frozen dataclass


def check_positions(value: object) -> None:
    """Refuse anything but the two ways to number kept tokens."""
    check_one_of("positions", value, ("original", "compact"))


def in_full_precision(features: Tensor) -> Tensor:
    """A video's features (F, N, D) in float32, or as they are in float64.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or shape, and for NaN or infinite values.
    """
    check_features(features)
    return _finite("features", features.to(torch.promote_types(features.dtype, torch.float32)))


def with_attention(context: VideoContext, features: Tensor) -> VideoContext:
    """The context with scores (F, N) and keys (F, N, C) that fit the features (F, N, D).

    Raises
    ------
    ValueError
        Where the context lacks them, or they have another shape or NaN or infinite values.
    """
    scores = _beside("scores", context.scores, features, 2)
    return replace(context, scores=scores, keys=_beside("keys", context.keys, features, 3))


def _beside(name: str, values: Tensor | None, features: Tensor, dims: int) -> Tensor:
    """Values of each token, on the device of the features and in their dtype."""
    shape = tuple(features.shape[:2])
    if values is None:
        raise ValueError(
            f"this method needs the vision encoder's {name} of the video's {shape[0]} x {shape[1]} "
            f"tokens; pass a VideoContext that has {name}"
        )
    if values.ndim != dims or values.shape[:2] != shape:
        raise ValueError(
            f"context.{name} must have {dims} dimensions and begin with {shape}, "
            f"got {tuple(values.shape)}"
        )
    return _finite(f"context.{name}", values.to(features.device, features.dtype))


def _finite(name: str, values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} contain NaN or infinite values, so nothing can be compared")
    return values
