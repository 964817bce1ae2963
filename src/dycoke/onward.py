"""What `generate` asks of the model before its first forward, where DyCoke has the answer.

Replaced on the one model object, and given back by `restore`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from dycoke.cache import DycokeCache
from dycoke.errors import UnsupportedError

# Where generate works out the positions of a prompt, the part that is cached already included.
POSITIONS = "_prepare_position_ids_for_generation"
# What generate_batch and its managers begin with.
BATCHING = "init_continuous_batching"


class Onward:
    """Positions of text that goes on with one of our caches; no continuous batching."""

    def __init__(self, model: Any, idle: bool) -> None:
        self._model = model
        if (inner := getattr(model, POSITIONS, None)) is not None:
            setattr(model, POSITIONS, _positions_by_cache(inner))
        if not idle and hasattr(model, BATCHING):
            setattr(model, BATCHING, _refuse_batching)

    def restore(self) -> None:
        for name in (POSITIONS, BATCHING):
            vars(self._model).pop(name, None)


def _positions_by_cache(inner: Any) -> Any:
    @functools.wraps(inner)
    def prepare(inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        cache, mask = (model_kwargs.get(k) for k in ("past_key_values", "attention_mask"))
        if isinstance(cache, DycokeCache) and mask is not None:
            ids = model_kwargs.get("input_ids")
            cache.check_prompt(inputs_tensor if ids is None or not ids.numel() else ids, mask)
        positions = positions_after(model_kwargs)
        return inner(inputs_tensor, model_kwargs) if positions is None else positions

    return prepare


def _refuse_batching(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(
        "continuous batching (generate_batch) takes token ids alone, without a video, and keeps a "
        "paged cache of its own; use generate() with a padded batch, or leave the block first"
    )


def positions_after(inputs: dict[str, Any]) -> Tensor | None:
    """Positions of prompt and text that goes on with a cache of ours; else None.

    Images that come later have positions of their own, which transformers works out.
    """
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    if not isinstance(cache, DycokeCache):
        return None
    if any(value is not None and "pixel" in name for name, value in inputs.items()):
        return None
    given = inputs.get("input_ids") if mask is None else mask
    if given is None:
        return None
    cached = cache.generation.length
    length = cached + given.shape[1] if mask is None else given.shape[1]
    return cache.generation.lead.positions(mask, length, length - cached, len(given))


def place(inputs: dict[str, Any]) -> None:
    """State the positions of a bare forward that goes on with a cache of ours."""
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("position_ids") is not None:
        return
    if (positions := positions_after(inputs)) is not None:
        positions = positions[..., -ids.shape[1] :]
        inputs["position_ids"] = positions.expand(3, -1, -1) if positions.ndim == 3 else positions
