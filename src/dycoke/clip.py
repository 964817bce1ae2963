"""What a method may know of a video beside its features, and how a budget is shared; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Seen = tuple[Tensor, Tensor]
"""What the vision encoder's attention says of a video: scores (F, N) and keys (F, N, C)."""


@dataclass(frozen=True, eq=False)
class Clip:
    """One video of a prompt.

    Attributes
    ----------
    scores : Tensor, shape (F, N), or None
        Attention that each token got in the vision encoder, a mean over heads and over the queries
        of its frame, pooled to tokens; where the method asks for it (`Compressor.needs_vision`).
        Where the encoder has a class token, the attention of that token alone.
    keys : Tensor, shape (F, N, C), or None
        The tokens' keys there as the attention takes them (after RoPE), a mean over heads, pooled
        alike.
    tokens : tuple of int
        Visual tokens of each video of the sample, this one included; () for this one alone.
    place : int
        Which of them this is.
    """

    scores: Tensor | None = None
    keys: Tensor | None = None
    tokens: tuple[int, ...] = ()
    place: int = 0


CLIP = Clip()  # nothing more is known


def joined(parts: Sequence[Seen], frames: Sequence[int]) -> list[Seen]:
    """Cut what is known of frames anew: ``frames[i]`` for video i, in order."""
    scores = [frame for part, _ in parts for frame in part]
    keys = [frame for _, part in parts for frame in part]
    videos, start = [], 0
    for count in frames:
        own = slice(start, start + count)
        videos.append((torch.stack(scores[own]), torch.stack(keys[own])))
        start += count
    return videos


def shared(budget: int, tokens: Sequence[int]) -> list[int]:
    """Share a budget over videos by their tokens, by largest remainder.

    Parameters
    ----------
    budget : tokens for all of them; more than there are keeps all.
    tokens : visual tokens of each video.

    Returns
    -------
    list of int: per video, together exactly ``min(budget, sum(tokens))``; among equal remainders
        the first video comes first.
    """
    whole = sum(tokens)
    budget = min(budget, whole)
    counts = [budget * n // whole for n in tokens]
    remainders = [budget * n % whole for n in tokens]
    order = sorted(range(len(tokens)), key=lambda i: -remainders[i])
    for i in order[: budget - sum(counts)]:
        counts[i] += 1
    return counts


def video_budget(budget: int | float, tokens: int, clip: Clip = CLIP) -> int:
    """Tokens that a video keeps under a ``token_budget``.

    Parameters
    ----------
    budget : an int is tokens per sample, shared over its videos (`shared`); a float is the share
        that each video keeps.
    tokens : the video's visual tokens.
    clip : the sample's videos, and which of them this is.

    Returns
    -------
    int, at least 1: no video is lost. One that `shared` leaves with nothing takes a token from the
        video that has most; fewer tokens than videos become one for each, above the budget.
    """
    if isinstance(budget, float):
        return max(1, int(budget * tokens + 1e-6))
    counts = shared(budget, clip.tokens or (tokens,))
    for i, count in enumerate(counts):
        if count == 0:
            most = counts.index(max(counts))
            counts[most] = max(1, counts[most] - 1)
            counts[i] = 1
    return counts[clip.place]
