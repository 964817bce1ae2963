"""How the positions of text go on after a shortened prompt, kept with the generation.

Transformers keeps the offset between a text token's index and its 3-D position on the model
(`rope_deltas`), where the next video overwrites it, and numbers a padded prompt in two ways, with
its padding in a bare forward and without it in `generate`. A cache that is asked about later,
beside others, or row by row needs its own offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class PositionOffset:
    """How far the positions of text that follows are ahead of its index among real tokens.

    Attributes
    ----------
    now : Tensor, long, (B, 1)
        For what goes on without a break: right after the last token, as if prefilled in one go.
    turn : Tensor, long, (B, 1)
        After an answer: from the highest 3-D position of the prompt on, as transformers counts.
    spatial : bool
        Whether positions are 3-D.
    answered : bool
        Whether a token was decoded, so that several new ones are a turn.
    """

    now: Tensor
    turn: Tensor
    spatial: bool
    answered: bool = False

    def positions(self, mask: Tensor | None, length: int, new: int, batch: int) -> Tensor:
        """Positions of ``length`` tokens, the last ``new`` not cached yet.

        ``mask`` is (batch, length), 0 for padding. The offset may have several rows per sample: a
        cache that was repeated for beams before the prompt is. Returns (batch, length), or
        (1, batch, length) where positions are 3-D.
        """
        ahead = self.turn if self.answered and new > 1 else self.now
        if mask is None:
            index = torch.arange(length, device=ahead.device).expand(batch, -1)
        else:
            index = (mask.long().cumsum(-1) - 1).clamp(min=0)
        ahead = ahead[:: max(1, len(ahead) // batch)]
        index = index + ahead.to(index.device)
        return index[None] if self.spatial else index


def offset_after(
    position_ids: Tensor | None, mask: Tensor | None, embeds: Tensor
) -> PositionOffset:
    """The offset after a prompt.

    Parameters
    ----------
    position_ids : Tensor or None, (B or 1, S), or (3 or 4, B, S) where positions are 3-D; None
        numbers all tokens, padding included.
    mask : Tensor or None, (B, S), 0 for padding.
    embeds : Tensor, (B, S, D).
    """
    batch, length, _ = embeds.shape
    spatial = position_ids is not None and position_ids.ndim == 3
    if position_ids is None:
        position_ids = torch.arange(length, device=embeds.device)[None]
    real = torch.full((batch,), length, device=position_ids.device)
    if mask is not None:
        mask = mask.to(position_ids.device)
        real = mask.long().sum(1)
    if not spatial:
        now = (position_ids[:, -1] + 1 - real)[:, None]
        return PositionOffset(now, now, spatial)
    # Text goes on from a frame's height and width; its time may have run far ahead.
    last = position_ids[-2:, :, -1].amax(0)
    seen = position_ids[-3:] if mask is None else position_ids[-3:] * mask.bool()
    return PositionOffset(
        (last + 1 - real)[:, None], (seen.amax((0, 2)) + 1 - real)[:, None], spatial
    )


def compacted(inputs: Mapping[str, Any], begin: int, new: int, dropped: Tensor) -> Tensor:
    """Positions of ``new`` tokens from ``begin`` on, less the tokens ``dropped`` before, (B,)."""
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        device = inputs["inputs_embeds"].device
        position_ids = torch.arange(begin, begin + new, device=device)[None]
    positions: Tensor = position_ids - dropped.to(position_ids.device)[:, None]
    return positions
