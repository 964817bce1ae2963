"""What `generate` asks of the model object itself, answered for caches of ours; given back after."""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import Tensor

from dycoke.cache import DycokeCache
from dycoke.errors import UnsupportedError

# Called by generate on the model: once per call, before the first forward (positions of the whole
# prompt); before assisted or prompt-lookup decoding; by generate_batch and its managers.
POSITIONS = "_prepare_position_ids_for_generation"
CANDIDATES = "_get_candidate_generator"
BATCHING = "init_continuous_batching"


class GenerateHooks:
    """Positions after a cached prompt; candidates noticed or refused; no continuous batching.

    Parameters
    ----------
    chooses : whether the method attends to a part of the video, so that checking several
        candidates at once would give another answer.
    """

    def __init__(self, model: Any, idle: bool, chooses: bool) -> None:
        self._model, self._chooses, self._local = model, chooses, threading.local()
        for name, make in ((POSITIONS, self._positions), (CANDIDATES, self._candidates)):
            if (inner := getattr(model, name, None)) is not None:
                setattr(model, name, functools.wraps(inner)(make(inner)))
        if not idle and hasattr(model, BATCHING):
            setattr(model, BATCHING, _refuse_batching)

    @property
    def speculative(self) -> bool:
        """Whether this thread's generate checks several candidates in one forward."""
        return getattr(self._local, "speculative", False)

    def restore(self) -> None:
        for name in (POSITIONS, CANDIDATES, BATCHING):
            vars(self._model).pop(name, None)

    def _positions(self, inner: Any) -> Any:
        def prepare(inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
            self._local.speculative = False
            cache, mask = (model_kwargs.get(k) for k in ("past_key_values", "attention_mask"))
            if isinstance(cache, DycokeCache) and mask is not None:
                ids = model_kwargs.get("input_ids")
                cache.check_prompt(inputs_tensor if ids is None or not ids.numel() else ids, mask)
            positions = positions_after(model_kwargs)
            return inner(inputs_tensor, model_kwargs) if positions is None else positions

        return prepare

    def _candidates(self, inner: Any) -> Any:
        def candidates(*args: Any, **kwargs: Any) -> Any:
            if self._chooses:
                raise UnsupportedError(
                    "assisted and prompt-lookup decoding check several tokens in one forward, by "
                    "which a method would prune or drop others than in plain decoding: with "
                    "prune_ratio > 0, or tokens dropped inside the LLM, the answer would differ; "
                    "use prune_ratio=0, or decode plainly"
                )
            self._local.speculative = True
            return inner(*args, **kwargs)

        return candidates


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
