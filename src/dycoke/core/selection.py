"""Stage 2: which visual tokens a decode step attends to, on pure tensors.

Source: DyCoke, https://arxiv.org/abs/2411.15024, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[b]`` best-scored tokens of each sample.

    Parameters
    ----------
    scores : Tensor, shape (B, V)
        Larger is better. Padding must hold ``-inf``.
    counts : Tensor, long, shape (B,)
        How many to choose, between 0 and the sample's number of real tokens.

    Returns
    -------
    Tensor, bool, shape (B, V)
        Ties go to the lowest index.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def needs_refresh(scores: Tensor, previous: Tensor | None, threshold: float) -> Tensor:
    """Where the attention has moved so far that the selection must be made anew.

    Parameters
    ----------
    scores, previous : Tensor, shape (B, V)
        Attention over the visual tokens in this step and in the one before (padding 0);
        ``None`` where there was none.
    threshold : float
        Cosine similarity under which a sample refreshes.

    Returns
    -------
    Tensor, bool, shape (B,)
    """
    if previous is None:
        return torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    return F.cosine_similarity(scores, previous, dim=1) < threshold


def swap_pairs(active: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Pair the tokens that leave the active set with those that enter it.

    ``active`` and ``chosen`` are the set before and after, bool (B, V), equally large in each
    sample. Returns samples and token indices (samples, leaving, entering), each (n,), n the number
    of changes in all; None where nothing changes. Waits for the device.
    """
    _, samples, tokens = torch.stack([active & ~chosen, chosen & ~active]).nonzero().unbind(1)
    if not len(tokens):
        return None
    # Both halves are in the order of the samples, and have as many tokens of each.
    leaving, entering = tokens.chunk(2)
    return samples[: len(leaving)], leaving, entering
