"""Cut merged rows out of what the decoder is about to receive at prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dycoke.core.cache import Generation, RowMap
from dycoke.core.layers import Kind
from dycoke.core.method import Method, VideoContext, VisualTokens
from dycoke.core.positions import PositionOffset
from dycoke.core.records import Record
from dycoke.errors import UnsupportedError
from dycoke.merging import retained_count
from dycoke.models import VideoSpan

# What `shorten` takes care of, whatever its length.
DONE = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "per_layer_inputs",
    "visual_pos_masks",
)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A prompt cut down to the rows that stay.

    Attributes
    ----------
    source : Tensor, long, (B, R): prompt position of each row; of a padding row, any position.
    dropped : Tensor, long, (B, S): tokens merged away before (and at) each prompt position.
    lower, upper : row maps of the lower and of the upper layers, as in `Generation`.
    visual : the visual tokens.
    lower_rows, upper_rows : Tensor, long, (B, V): the row of each; 0 for padding.
    """

    source: Tensor
    dropped: Tensor
    lower: RowMap
    upper: RowMap
    visual: VisualTokens
    lower_rows: Tensor
    upper_rows: Tensor


def arrange(
    keep: Tensor, visual: Tensor, attention_mask: Tensor | None, prune_ratio: float
) -> Arrangement:
    """Lay out the rows of a prompt from which tokens have been merged away.

    Parameters
    ----------
    keep : Tensor, bool, (B, S): False for tokens merged away.
    visual : Tensor, bool, (B, S): True for visual tokens that stay.
    attention_mask : Tensor, (B, S), or None: 0 for padding.
    prune_ratio : share of a sample's visual tokens that a decode step does not attend to; 0 keeps
        one row order for all layers.

    Returns
    -------
    Arrangement
        Samples are right-aligned; leading padding beyond what the longest sample needs is gone.
    """
    device = keep.device
    stays = keep
    if attention_mask is not None:
        stays = keep & (attention_mask.to(device).cumsum(1) > 0)
    # One wait for the device: the sizes below are needed as Python numbers.
    lengths, kept = torch.stack([stays.sum(1), visual.sum(1)]).tolist()
    longest, most = max(lengths), max(kept)
    source = stays.byte().sort(dim=1, stable=True).indices[:, -longest:]
    real = stays.gather(1, source)
    everything = torch.zeros(len(lengths), dtype=torch.long, device=device)
    padded = min(lengths) < longest
    lower = RowMap(torch.where(real, source, -1), everything, 0, padded=padded)

    shown = visual.gather(1, source) & real
    valid, rows = shown.byte().sort(dim=1, descending=True, stable=True)
    valid, rows = valid[:, :most].bool(), rows[:, :most]
    rows = torch.where(valid, rows, 0)
    upper, slots, active = lower, rows, valid
    counts = [retained_count(n, prune_ratio) for n in kept]
    if prune_ratio > 0:
        # The first decode step selects; until then the last tokens stand in for the active set.
        number = torch.arange(most, device=device).expand_as(rows)
        bank = torch.tensor([n - m for n, m in zip(kept, counts, strict=True)], device=device)
        active = valid & (number >= bank[:, None])
        # Rows sorted by what they are: padding 0, bank 1, active 2, text 3.
        part = torch.where(real, torch.where(shown, 1, 3), 0)
        # The padding of `rows` points at row 0, where nothing may be added.
        part.scatter_add_(1, rows, active.long())
        order = part.sort(dim=1, stable=True).indices
        first = [longest - n + k - m for n, k, m in zip(lengths, kept, counts, strict=True)]
        upper = row_map(lower.index.gather(1, order), first, padded, order)
        slots = torch.where(valid, order.argsort(dim=1).gather(1, rows), 0)

    return Arrangement(
        source=source,
        dropped=(~keep).cumsum(1),
        lower=lower,
        upper=upper,
        visual=VisualTokens(
            valid,
            torch.tensor(counts, device=device),
            active,
            padded=min(kept) < max(1, most),
        ),
        lower_rows=rows,
        upper_rows=slots,
    )


def row_map(index: Tensor, first: list[int], padded: bool, order: Tensor | None = None) -> RowMap:
    """A row map from the first row of each sample's decode view."""
    start = min(first)
    starts = torch.tensor(first, device=index.device)
    return RowMap(index, starts, start, order, padded, uneven=max(first) > start)


def shorten(
    inputs: dict[str, Any],
    spans: Sequence[VideoSpan],
    method: Method,
    cached: bool,
    contexts: Sequence[VideoContext],
) -> tuple[Arrangement, list[Tensor]]:
    """Merge each video's tokens and keep only the rows that stay.

    Parameters
    ----------
    inputs : the decoder's arguments, changed in place: inputs_embeds (B, S, D) becomes (B, R, D),
        position_ids (..., B, S) becomes (..., B, R), attention_mask (B, S) becomes (B, R) or None,
        per_layer_inputs and deepstack features keep the rows of the tokens that stay.
    spans : where the videos are.
    method : what decides.
    cached : whether the decoder will have a cache.
    contexts : what else is known of each video.

    Returns
    -------
    rows : Arrangement
    masks : list of Tensor, bool, (F, N): per span, the tokens that stayed.
    """
    embeds, mask = inputs["inputs_embeds"], inputs.get("attention_mask")
    batch, length, _ = embeds.shape
    device = embeds.device
    keep = torch.ones(batch, length, dtype=torch.bool, device=device)
    visual = torch.zeros_like(keep)
    masks = []
    for i, span in enumerate(spans):
        places = span.positions.to(device)
        features = embeds[span.sample, places]
        merged, kept = method.merge_tokens(features, contexts[i])
        if merged is not features:
            embeds = embeds.clone() if embeds is inputs["inputs_embeds"] else embeds
            embeds[span.sample, places] = merged
        keep[span.sample, places.flatten()] = kept.flatten()
        visual[span.sample, places.flatten()] = kept.flatten()
        masks.append(kept)
    rows = arrange(keep, visual, mask, method.prune_ratio)

    position_ids = inputs.get("position_ids")
    if position_ids is None:
        # Stated, since the decoder would number the shortened prompt through.
        position_ids = torch.arange(length, device=device)[None]
    inputs["position_ids"] = _positions(position_ids, rows, method.positions == "compact")
    inputs["inputs_embeds"] = _gather(embeds, rows)
    if inputs.get("per_layer_inputs") is not None:  # what each layer is told of a token's id
        inputs["per_layer_inputs"] = _gather(inputs["per_layer_inputs"], rows)
    key_mask = rows.lower.key_mask(mask, rows.source.shape[1], device, decode=False)
    if key_mask is None and not cached:
        # Gaps in the positions of a prompt without mask and cache read as packed sequences.
        key_mask = torch.ones_like(rows.source)
    inputs["attention_mask"] = key_mask
    _deepstack(inputs, rows)
    _check_rest(inputs, batch, length)
    return rows, masks


def start(
    rows: Arrangement,
    method: Method,
    kind: Kind,
    prompt: Tensor,
    offset: PositionOffset,
    record: Record,
) -> Generation:
    """The generation that begins with a shortened prompt, (B, S) token ids as in `prompt_of`."""
    return Generation(
        method=method,
        kind=kind,
        prompt=prompt,
        prompt_length=prompt.shape[1],
        length=0,
        lower=rows.lower,
        upper=rows.upper,
        visual=rows.visual,
        lower_rows=rows.lower_rows,
        upper_rows=rows.upper_rows,
        dropped=rows.dropped[:, -1],
        offset=offset,
        record=record,
    )


def _gather(values: Tensor, rows: Arrangement) -> Tensor:
    """The rows that stay: (B, S, ...) -> (B, R, ...)."""
    source = rows.source.to(values.device)
    return values[torch.arange(len(source), device=values.device)[:, None], source]


def _deepstack(inputs: dict[str, Any], rows: Arrangement) -> None:
    """Features that early layers add to visual tokens: those of the tokens that stay, in place.

    ``visual_pos_masks`` (B, S) says which tokens get one, ``deepstack_visual_embeds`` has a
    (visual tokens, D) per layer, in the order of the mask.
    """
    visual, layers = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds")
    if visual is None or layers is None:
        return
    source, real = (x.to(visual.device) for x in (rows.source, rows.lower.index >= 0))
    shown = visual.gather(1, source) & real
    number = (visual.flatten().cumsum(0) - 1).view_as(visual)
    stay = number.gather(1, source)[shown]
    inputs["visual_pos_masks"] = shown
    inputs["deepstack_visual_embeds"] = [x[stay.to(x.device)] for x in layers]


def _check_rest(inputs: dict[str, Any], batch: int, length: int) -> None:
    """Refuse what has still a row per token of the whole prompt."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == (batch, length) and name not in DONE:
            raise UnsupportedError(
                f"the decoder is handed {name!r}, with a row per token, which DyCoke does not know "
                "how to shorten; use a model of a known family, or leave the input out"
            )


def _positions(position_ids: Tensor, rows: Arrangement, compact: bool) -> Tensor:
    """Positions of the rows that stay: (..., B or 1, S) -> (..., B, R)."""
    position_ids = position_ids.expand(*position_ids.shape[:-2], len(rows.source), -1)
    if compact:
        if position_ids.ndim > 2:
            raise UnsupportedError(
                "positions='compact' renumbers 1-D positions, and this model has "
                f"{position_ids.shape[0]} rows of them; use positions='original'"
            )
        position_ids = position_ids - rows.dropped.to(position_ids.device)
    source = rows.source.to(position_ids.device)
    return position_ids.gather(-1, source.expand(*position_ids.shape[:-1], -1))
