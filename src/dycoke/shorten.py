"""Drop merged rows from what the decoder is about to receive at prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dycoke.clip import Clip, Seen
from dycoke.errors import UnsupportedError
from dycoke.method import Method
from dycoke.models import VideoSpan
from dycoke.rows import Arrangement, arrange

# What `shorten` takes care of, whatever its length.
DONE = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "per_layer_inputs",
    "visual_pos_masks",
)


def clips_of(spans: Sequence[VideoSpan], seen: Sequence[Seen] | None = None) -> list[Clip]:
    """What each video's method may know of it: the sizes of its sample's videos, and ``seen``."""
    sizes: dict[int, list[int]] = {}
    places = []
    for span in spans:
        videos = sizes.setdefault(span.sample, [])
        places.append(len(videos))
        videos.append(span.positions.numel())
    known = [(None, None)] * len(spans) if seen is None else seen
    return [
        Clip(scores, keys, tuple(sizes[span.sample]), place)
        for span, place, (scores, keys) in zip(spans, places, known, strict=True)
    ]


def shorten(
    inputs: dict[str, Any],
    spans: Sequence[VideoSpan],
    method: Method,
    cached: bool,
    clips: Sequence[Clip],
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
    clips : what else is known of each video.

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
        merged, kept = method.merge_tokens(features, clips[i])
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
    key_mask = rows.plain.key_mask(mask, rows.source.shape[1], device, decode=False)
    if key_mask is None and not cached:
        # Gaps in the positions of a prompt without mask and cache read as packed sequences.
        key_mask = torch.ones_like(rows.source)
    inputs["attention_mask"] = key_mask
    _deepstack(inputs, rows)
    _check_rest(inputs, batch, length)
    return rows, masks


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
    source, real = (x.to(visual.device) for x in (rows.source, rows.plain.index >= 0))
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
