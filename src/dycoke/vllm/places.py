"""Positions of what was kept: they travel as columns of the features, and are put in place.

vLLM computes a prompt's positions before the encoder has run, and has a way for a model to correct
them when the features come (`recompute_mrope_positions`). Its own use of it has three faults that
are not repeated here. Numbers in bfloat16 are exact to 256 only: here each number has three columns
of a byte. The text after a video is placed while the video is, so that a prompt whose video comes
from the prefix cache keeps wrong positions there: here the text's positions follow from shapes, at
once (`whole_positions`), and features correct those of the video alone. And fractions of seconds
are dropped: here a frame's time is what the model's own positions say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DIGITS = 3
"""Columns of a number, a byte each: exact in bfloat16, to 16,777,215."""
CHANNELS = 5 * DIGITS
"""Columns that `tag` adds: the row's number, the lead, and three position axes."""


def encode(numbers: Tensor) -> Tensor:
    """Whole numbers as bytes: (R, C) -> (R, C * DIGITS), the highest byte first.

    Raises
    ------
    ValueError
        For a number below 0 or above what the bytes hold.
    """
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < 256**DIGITS:
        raise ValueError(
            f"positions must lie in 0 to {256**DIGITS - 1}, got {int(numbers.min())} to "
            f"{int(numbers.max())}; send a shorter video"
        )
    shifts = torch.arange(DIGITS - 1, -1, -1, device=numbers.device) * 8
    return ((numbers.long()[..., None] >> shifts) & 255).flatten(1)


def decode(columns: Tensor) -> Tensor:
    """The inverse of `encode`, from any number format: (R, C * DIGITS) -> long (R, C)."""
    digits = columns.round().long().view(len(columns), -1, DIGITS)
    shifts = torch.arange(DIGITS - 1, -1, -1, device=columns.device) * 8
    return (digits << shifts).sum(-1)


def columns(offsets: Tensor, lead: int = 0) -> Tensor:
    """What `tag` adds to features.

    Parameters
    ----------
    offsets : Tensor, shape (R, 3)
        Position of each row on the three axes, from the first position after what stands before
        the media.
    lead : rows that stand before the media's first placeholder token.

    Returns
    -------
    Tensor, long, shape (R, CHANNELS)
    """
    rows = torch.arange(len(offsets), device=offsets.device)
    return encode(torch.cat([torch.stack([rows, torch.full_like(rows, lead)], 1), offsets], 1))


def tag(features: Tensor, offsets: Tensor) -> Tensor:
    """Features with their positions: (R, D) and (R, 3) -> (R, D + CHANNELS)."""
    return torch.cat([features, columns(offsets.to(features.device)).to(features.dtype)], 1)


def put(
    tokens: Sequence[int] | Tensor,
    media: Iterable[int],
    pieces: Sequence[Tensor],
    positions: Tensor,
    computed: int,
) -> tuple[list[Tensor], Tensor, int]:
    """Take the columns off, and write the positions where the rows stand in the prompt.

    Parameters
    ----------
    tokens : the prompt's ids, T of them.
    media : ids that stand for rows of a media.
    pieces : Tensors of shape (R, D + CHANNELS): what of the prompt's media is computed now, in
        order; the first may be the rest of one of which earlier rows are computed already.
    positions : Tensor, long, shape (3, T)
    computed : tokens of the prompt that are computed already.

    Returns
    -------
    pieces : Tensors of shape (R, D)
    positions : Tensor, long, shape (3, T)
        Right for the rows of ``pieces`` whatever ``positions`` had there, so that a request that
        is computed again has them again.
    delta : int
        What the position of a token after the prompt is above its number.
    """
    positions = positions.clone()
    ids = torch.as_tensor(tokens).to(positions.device)
    places = torch.isin(ids, torch.tensor(list(media), device=positions.device)).nonzero().flatten()
    cursor = computed
    for piece in pieces:
        if len(piece) == 0:
            continue
        numbers = decode(piece[:, -CHANNELS:]).to(positions.device)
        row, lead = numbers[0, :2].tolist()
        start = cursor if row else int(places[places >= cursor][0]) - lead
        before = start - row - 1
        base = int(positions[:, before].max()) + 1 if before >= 0 else 0
        positions[:, start : start + len(piece)] = base + numbers[:, 2:].T
        cursor = start + len(piece)
    delta = int(positions.max()) + 1 - len(ids)
    return [piece[:, :-CHANNELS] for piece in pieces], positions, delta


@dataclass(frozen=True)
class Media:
    """A media's place in a prompt: its first token, how many it has, and its ids when whole."""

    offset: int
    length: int
    whole: list[int]


def whole_positions(
    tokens: Sequence[int], media: Sequence[Media], ask: Callable[[list[int], list[int]], Tensor]
) -> tuple[Tensor, int]:
    """Positions of a prompt as if no token had left, without those that did.

    Parameters
    ----------
    tokens : the prompt's ids, T of them.
    media : in the prompt's order.
    ask : from the ids of the whole prompt and the offset of each media in it to their positions,
        (3, W): the model's own rule.

    Returns
    -------
    positions : Tensor, long, shape (3, T)
        Final for text, and for a media's last row where that one stays (another media may follow
        at once); its other rows have some positions of the media until `put` corrects them.
    delta : int
        What the position of a token after the prompt is above its number.
    """
    whole: list[int] = []
    offsets: list[int] = []
    stays: list[int] = []
    end = 0
    for item in media:
        before, start = len(whole), len(whole) + item.offset - end
        whole += [*tokens[end : item.offset], *item.whole]
        offsets.append(start)
        stays += [*range(before, start + item.length - 1), len(whole) - 1]
        end = item.offset + item.length
    stays += range(len(whole), len(whole) + len(tokens) - end)
    whole += tokens[end:]
    positions = ask(whole, offsets)
    delta = int(positions.max()) + 1 - len(tokens)
    return positions[:, stays].contiguous(), delta


class Placing:
    """What a model class of vLLM does with positions; stands before the stock class."""

    def media_ids(self) -> tuple[int, ...]:
        """Ids that stand for rows of an image or a video."""
        config: Any = self.config  # type: ignore[attr-defined]
        return config.image_token_id, config.video_token_id

    def media_of(self, tokens: list[int], feature: Any) -> Media:
        """Where a prompt has a media, and what it is when whole; ``feature`` is vLLM's spec."""
        raise NotImplementedError

    def whole_rule(self, tokens: list[int], features: list[Any]) -> Tensor:
        """Positions (3, W) of a prompt of which nothing left: the stock class's own."""
        positions: Tensor = super().get_mrope_input_positions(tokens, features)[0]  # type: ignore[misc]
        return positions.long()

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)

        def ask(tokens: list[int], offsets: list[int]) -> Tensor:
            moved = [
                replace(feature, mm_position=replace(feature.mm_position, offset=offset))
                for feature, offset in zip(features, offsets, strict=True)
            ]
            return self.whole_rule(tokens, moved)

        media = [self.media_of(input_tokens, feature) for feature in features]
        return whole_positions(input_tokens, media, ask)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        ids = self.media_ids()
        return put(input_ids, ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
