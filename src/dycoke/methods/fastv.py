"""FastV: later layers keep the visual tokens that the prompt's end attends to.

Paper: "An Image is Worth 1/2 Tokens After Layer 2", https://arxiv.org/abs/2403.06764, published
for LLaVA-1.5. Source: https://github.com/pkunlp-icler/FastV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke.core.selection import top_mask
from dycoke.errors import check_one_of
from dycoke.methods.base import OneShot, scaled_layer


def later_count(total: int, ratio: float, below: float) -> int:
    """Tokens that later layers hold so that the mean over all layers is ``1 - ratio``.

    Parameters
    ----------
    total : visual tokens in the layers below.
    ratio : share removed in the mean, in [0, 1).
    below : share of the layers that hold all tokens.

    Returns
    -------
    int : at least one where there are any. Just one where ``below >= 1 - ratio``: the layers below
        alone hold as much, or more, and the mean stays above the budget.
    """
    share = (1 - ratio - below) / (1 - below) if below < 1 - ratio else 0.0
    return min(total, max(1, int(share * total + 1e-6)))


@dataclass(frozen=True)
class FastV(OneShot):
    """FastV (https://arxiv.org/abs/2403.06764).

    The first 2 layers of 28 (as many in proportion elsewhere) hold all visual tokens. From the
    next one on there are only those that the prompt's last token attends to most in the layer
    before, a mean over heads. Chosen once, at prefill.

    Parameters
    ----------
    ratio : float in [0, 1)
        Share of the visual tokens that is removed, as a mean over all layers; see `later_count`.
    positions : "original"
        A token keeps its position in all layers.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("positions", self.positions, ("original",))

    def drop_layer(self, layers: int) -> int | None:
        return scaled_layer(2, layers)

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        count = later_count(len(scores), self.ratio, below)
        counts = torch.tensor([count], device=scores.device)
        return states, top_mask(scores[None], counts)[0]
