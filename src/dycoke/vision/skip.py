"""Which cells of a clip the vision encoder computes: pure tensors. No part of the paper.

A *cell* is the patches that become one token. Anchors are computed in full. In every other frame
the cells that changed least against its counterpart (`dycoke.merging.counterparts`) leave in front
of a block; what answers for them is the counterpart at their place, or where that left, too, its
own counterpart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dycoke.merging import counterparts, retained_count

CUT = 0.5
"""A frame that is so far from its counterpart stands behind a cut (docs/decisions.md, 30)."""


def square_cells(patches: int, tokens: int) -> Tensor:
    """The patches of each token where a square of patches is pooled to a square of tokens.

    Parameters
    ----------
    patches, tokens : sides of the squares.

    Returns
    -------
    Tensor, long, (tokens ** 2, M)
        Blocks where the sides divide; else those that a bilinear interpolation reads, so that
        cells share patches.
    """
    if patches % tokens == 0:
        step = patches // tokens
        along = torch.arange(tokens)[:, None] * step + torch.arange(step)
    else:
        place = (torch.arange(tokens) + 0.5) * (patches / tokens) - 0.5
        low = place.floor().long()
        along = torch.stack([low, low + 1], 1).clamp(0, patches - 1)
    both = along[:, None, :, None] * patches + along[None, :, None, :]
    return both.reshape(tokens**2, -1)


def computed_cells(states: Tensor, members: Tensor, ratio: float, window: int) -> Tensor:
    """Which cells are computed.

    Parameters
    ----------
    states : Tensor, (F, P, D)
        Patches of one video as they enter a block of the encoder; P without a class token.
    members : Tensor, long, (C, M)
        The patches of each cell.
    ratio : float in [0, 1)
        Share of the cells that leave; ``int((1 - ratio) * C + 1e-6)`` of a frame stay.
    window : frames that share one anchor.

    Returns
    -------
    Tensor, bool, (F, C)
        All of an anchor, and of a frame behind a cut: its mean squared distance to its counterpart
        is more than `CUT` of what two frames that have nothing in common are apart. In the others
        those whose mean squared distance is largest; of equals the highest index stays.
    """
    frames = len(states)
    counterpart = counterparts(frames, window, states.device)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    apart = (states - states[counterpart]).square().sum(-1)  # (F, P)
    spread = (states - states.mean(1, keepdim=True)).square().sum(-1).mean(1)
    strange = apart.mean(1) > CUT * (spread + spread[counterpart])
    change = apart[:, members.to(states.device)].mean(-1)
    cells = change.shape[1]
    least = change.sort(dim=1, stable=True).indices[:, : cells - retained_count(cells, ratio)]
    keep = torch.ones_like(change, dtype=torch.bool).scatter_(1, least, False)
    anchors = counterpart == torch.arange(frames, device=states.device)
    return keep | (anchors | strange)[:, None]


def answering(keep: Tensor, window: int) -> Tensor:
    """The frame that answers for each place: (F, P) bool -> long.

    A place that is computed answers for itself; anchors must be.
    """
    frames = len(keep)
    frame = torch.arange(frames, device=keep.device)[:, None].expand_as(keep)
    counterpart = counterparts(frames, window, keep.device)[:, None].expand_as(keep)
    root = torch.where(keep, frame, counterpart)
    # A counterpart is an anchor, or has one for its own.
    return root.gather(0, root)
