"""What methods are handed, checked and in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from dycoke.core.method import VideoContext
from dycoke.merging import check_features


def in_float32(features: Tensor) -> Tensor:
    """A video's features (F, N, D) in float32.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or shape, and for NaN or infinite values.
    """
    check_features(features)
    return _finite("features", features.float())


def vision_of(context: VideoContext, features: Tensor) -> tuple[Tensor, Tensor]:
    """What the vision encoder says of the tokens ``features`` (F, N, D).

    Returns
    -------
    scores : Tensor, float32, shape (F, N)
    keys : Tensor, float32, shape (F, N, C)

    Raises
    ------
    ValueError
        Where the context lacks them, or they have another shape or NaN or infinite values.
    """
    scores = _beside("scores", context.scores, features, 2)
    return scores, _beside("keys", context.keys, features, 3)


def _beside(name: str, values: Tensor | None, features: Tensor, dims: int) -> Tensor:
    """Values of each token, on the device of the features."""
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
    return _finite(f"context.{name}", values.to(features.device, torch.float32))


def _finite(name: str, values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} contain NaN or infinite values, so nothing can be compared")
    return values
