"""Stage 1: temporal token merging, on pure tensors.

Source: DyCoke, https://arxiv.org/abs/2411.15024, section 3.2.

Frames are cut into windows. The first frame of a window is its *anchor* and stays whole; every
other frame has a *counterpart* in the same window (odd frames the one before them, even ones the
anchor), and its tokens that resemble the counterpart's token at the same place most are merged
into it, that is, they leave.

That is a share of every frame but the anchors. A budget of tokens (`budget_mask`) is no part of the
paper: all tokens of the video compete, anchors too, so that it may be as small as one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dycoke.errors import check_count, check_ratio


def retained_count(total: int, ratio_removed: float) -> int:
    """Tokens that stay when a share of ``total`` leaves; the one rounding rule of the project.

    The small constant repairs binary fractions: ``int((1 - 0.9) * 10)`` is 0, and should be 1.
    """
    return int((1.0 - ratio_removed) * total + 1e-6)


def counterparts(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """The frame that each frame is compared with, and merged into: long, shape (F,).

    An anchor is its own counterpart.
    """
    frame = torch.arange(frames, device=device)
    place = frame % window
    return torch.where(place % 2 == 1, frame - 1, frame - place)


def compared_with(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """Where the tokens of a frame go once anchors may lose some, too: long, shape (F,).

    The `counterparts`, and for an anchor the anchor before it; the first one has only itself.
    """
    frame = torch.arange(frames, device=device)
    counterpart = counterparts(frames, window, device)
    return torch.where(counterpart == frame, (frame - window).clamp(min=0), counterpart)


def check_features(features: Tensor) -> None:
    """Refuse what is no floating point tensor of shape (F, N, D)."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor of shape (F, N, D), got {type(features)}")
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(
            f"features must have the shape (F, N, D) with no empty dimension, "
            f"got {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")


def _check_compared(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError("features contain NaN or infinite values, so nothing can be compared")


def merge_mask(
    features: Tensor, merge_ratio: float = 0.7, window: int = 4, encoded: Tensor | None = None
) -> Tensor:
    """Which visual tokens stay after temporal merging.

    Parameters
    ----------
    features : Tensor, shape (F, N, D)
        F frames of N tokens each, any floating dtype; similarity is taken in float32.
    merge_ratio : float in [0, 1)
        Share of a non-anchor frame's tokens that is merged away (the paper's K).
    window : int, at least 1
        Consecutive frames that share one anchor. The last window may be shorter.
    encoded : Tensor, bool, shape (F, N), or None
        False for tokens that the vision encoder did not compute: they leave before all others.
        Not the paper's, see `dycoke.vision.skip`.

    Returns
    -------
    Tensor, bool, shape (F, N)
        True where the token stays: every token of an anchor, and exactly
        ``int((1 - merge_ratio) * N + 1e-6)`` of any other frame. Among equally similar tokens
        the one with the lowest raster index is merged first.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, shape or range, and for features with NaN or infinite values.
    """
    check_features(features)
    merge_ratio = check_ratio("merge_ratio", merge_ratio)
    window = check_count("window", window)
    frames, tokens, _ = features.shape
    counterpart = counterparts(frames, window, features.device)

    unit = F.normalize(features.float(), dim=-1)
    similarity = (unit * unit[counterpart]).sum(-1)
    _check_compared(similarity)
    if encoded is not None:  # by mask: rounding may make a computed token as similar
        similarity = similarity.masked_fill(~encoded.to(similarity.device), torch.inf)

    # The most similar leave: the first `leaving` of a stable descending sort.
    leaving = tokens - retained_count(tokens, merge_ratio)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    keep = torch.ones(frames, tokens, dtype=torch.bool, device=features.device)
    keep.scatter_(1, order[:, :leaving], False)
    anchors = counterpart == torch.arange(frames, device=features.device)
    return keep | anchors[:, None]


def budget_mask(features: Tensor, count: int, window: int = 4) -> Tensor:
    """Which visual tokens stay where a video may keep ``count`` of them.

    No part of the paper. Tokens of all frames compete by how much they have to say: the cosine
    distance to the token that they are compared with (`compared_with`), plus that to the mean of
    all tokens at their place, over the whole video. The first says that something changed, the
    second that something is there; with the first alone what has moved in and stays is lost. The
    first frame has nothing before it, and is compared with its own mean.

    Two quarters of the budget are set apart. One is for the first frame (which may be smaller),
    since it shows what never changes. One goes round the frames, each giving its best token in
    turn, so that a cut or a fade does not take all of it.

    Parameters
    ----------
    features : Tensor, shape (F, N, D)
        F frames of N tokens each, any floating dtype; similarity is taken in float32.
    count : int, at least 1
        Tokens to keep; more than there are keeps all.
    window : int, at least 1
        Consecutive frames that share one anchor.

    Returns
    -------
    Tensor, bool, shape (F, N)
        Exactly ``min(count, F * N)`` are True; among equal tokens the one with the lowest raster
        index stays. A larger count keeps what a smaller one keeps, and more.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, shape or range, and for features with NaN or infinite values.
    """
    check_features(features)
    count = check_count("count", count)
    window = check_count("window", window)
    frames, tokens, _ = features.shape
    unit = F.normalize(features.float(), dim=-1)
    change = 1 - (unit * unit[compared_with(frames, window, features.device)]).sum(-1)
    change[0] = 1 - unit[0] @ F.normalize(unit[0].mean(0), dim=-1)
    presence = 1 - (unit * F.normalize(unit.mean(0), dim=-1)).sum(-1)
    value = change + presence
    _check_compared(value)
    first = change[0].sort(descending=True, stable=True).indices[: max(1, count // 4)]
    order = value.flatten().sort(descending=True, stable=True).indices
    rank = value.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)  # in its frame
    turns = order[rank.flatten()[order].sort(stable=True).indices]
    value = value.flatten()
    value[first] = torch.inf
    value[turns[: (count + 2) // 4]] = torch.inf  # never grows together with count // 4
    order = value.sort(descending=True, stable=True).indices
    keep = torch.zeros(frames * tokens, dtype=torch.bool, device=features.device)
    keep[order[:count]] = True
    return keep.view(frames, tokens)


def merge_mean(features: Tensor, keep: Tensor, window: int = 4) -> Tensor:
    """Let every kept token become the mean of itself and of all that was merged into it.

    A token merged into a merged counterpart goes on to where that one went (f3 -> f2 -> f0), and
    past an anchor's token that left (`budget_mask`) to the anchor before. Where no token before it
    at its place stays, nothing stands for it, and it leaves without a trace.

    Parameters
    ----------
    features : Tensor, shape (F, N, D)
    keep : Tensor, bool, shape (F, N)
        From `merge_mask` or `budget_mask` with the same window.
    window : int, at least 1

    Returns
    -------
    Tensor, shape (F, N, D), the dtype of ``features``
        Averages at kept places (unweighted, summed in float32); other places are unchanged.
    """
    check_features(features)
    if keep.shape != features.shape[:2] or keep.dtype != torch.bool:
        raise ValueError(
            f"keep must be bool of shape {tuple(features.shape[:2])}, "
            f"got {keep.dtype} of shape {tuple(keep.shape)}"
        )
    frames, tokens, _ = features.shape
    before = compared_with(frames, window, features.device)[:, None].expand(frames, tokens)
    itself = torch.arange(frames, device=features.device)[:, None].expand(frames, tokens)
    root = torch.where(keep, itself, before)
    for _ in range(frames.bit_length()):  # each round doubles the hops; fewer than F are needed
        root = root.gather(0, root)
    total = torch.zeros_like(features, dtype=torch.float32)
    total.scatter_add_(0, root[..., None].expand_as(features), features.float())
    count = torch.zeros(frames, tokens, device=features.device)
    count.scatter_add_(0, root, torch.ones_like(count))
    mean = (total / count.clamp(min=1.0)[..., None]).to(features.dtype)
    return torch.where(keep[..., None], mean, features)


def share_budget(budget: int, tokens: Sequence[int]) -> list[int]:
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


def video_budget(
    budget: int | float, tokens: int, sizes: Sequence[int] = (), index: int = 0
) -> int:
    """Tokens that a video keeps under a ``token_budget``.

    Parameters
    ----------
    budget : an int is tokens per sample, shared over its videos (`share_budget`); a float is the
        share that each video keeps.
    tokens : the video's visual tokens.
    sizes, index : visual tokens of each video of the sample, and which of them this is; without
        them it is the only one.

    Returns
    -------
    int, at least 1: no video is lost. One that `share_budget` leaves with nothing takes a token
        from the video that has most; fewer tokens than videos become one for each, above the
        budget.
    """
    if isinstance(budget, float):
        return max(1, int(budget * tokens + 1e-6))
    counts = share_budget(budget, sizes or (tokens,))
    for i, count in enumerate(counts):
        if count == 0:
            most = counts.index(max(counts))
            counts[most] = max(1, counts[most] - 1)
            counts[i] = 1
    return counts[index]
