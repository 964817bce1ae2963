"""Groups of tokens that several methods form: segments in time, density peaks; pure tensors.

Tokens are float32 here, and ties go to the lowest index.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor
from torch.nn import functional as F


def highest(scores: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` highest scores of each row, ascending: long, (..., count)."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def segment_lengths(features: Tensor, segments: int, threshold: float) -> list[int]:
    """Cut a video where its frames change.

    Parameters
    ----------
    features : Tensor, shape (F, N, D)
    segments : int
        The ``segments - 1`` places where adjacent frames are least similar are cut, and
    threshold : float
        so are all where the cosine similarity of their mean tokens is below this.

    Returns
    -------
    list of int: the frames of each segment.
    """
    frame = F.normalize(features.mean(1), dim=-1)
    similarity = (frame[1:] * frame[:-1]).sum(-1)
    cut = similarity < threshold
    cut[similarity.sort(stable=True).indices[: segments - 1]] = True
    last = [-1, *cut.nonzero().flatten().tolist(), len(features) - 1]
    return [end - start for start, end in pairwise(last)]


def distances(tokens: Tensor) -> Tensor:
    """Euclidean distances between tokens (..., M, D), over sqrt(D): shape (..., M, M).

    A token is at exactly 0 of itself, and two are as far from one another: nearest neighbours of
    each other are equally dense, and such ties must not fall by rounding.
    """
    # Centred, so that what all tokens have in common takes no digits from the differences.
    centred = tokens - tokens.mean(-2, keepdim=True)
    product = centred @ centred.mT
    product = (product + product.mT) / 2
    square = product.diagonal(dim1=-2, dim2=-1)
    squares = square[..., :, None] + square[..., None, :] - 2 * product
    return (squares.clamp(min=0) / tokens.shape[-1]).sqrt()


def peak_scores(distance: Tensor, neighbours: int) -> Tensor:
    """How much a token is the centre of a cluster: dense, and far from all that is denser.

    Density peaks (Rodriguez and Laio, https://doi.org/10.1126/science.1242072) with the density
    taken over the nearest neighbours.

    Parameters
    ----------
    distance : Tensor, shape (..., M, M)
        See `distances`.
    neighbours : int
        Tokens that the density is a mean over, the token itself among them.

    Returns
    -------
    Tensor, shape (..., M)
        exp(-mean squared distance) times the distance to the nearest denser token; the largest
        distance of all where none is denser. Among equally dense tokens the first counts as denser.
    """
    near = distance.sort(dim=-1).values[..., :neighbours]
    density = (-near.square().mean(-1)).exp()
    rank = density.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    denser = rank[..., None, :] < rank[..., :, None]
    farthest = distance.amax((-2, -1), keepdim=True)
    return density * distance.where(denser, farthest).amin(-1)


def group_means(tokens: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The mean of each group of tokens (M, D), and its size.

    Returns
    -------
    means : Tensor, shape (groups, D); 0 where a group is empty.
    sizes : Tensor, shape (groups, 1)
    """
    sizes = tokens.new_zeros(groups, 1).index_add_(0, group, tokens.new_ones(len(tokens), 1))
    total = tokens.new_zeros(groups, tokens.shape[1]).index_add_(0, group, tokens)
    return total / sizes.clamp(min=1), sizes
