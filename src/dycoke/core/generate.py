"""What `generate` asks of the model object itself, answered for caches of ours."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dycoke.compat import BATCHING, CANDIDATES, POSITIONS, cache_of
from dycoke.core.cache_rules import DycokeCache
from dycoke.core.layers import Kind
from dycoke.core.records import Records
from dycoke.errors import UnsupportedError
from dycoke.patching import Patches


class _Local(threading.local):
    """A thread's own: whether its generate checks several candidates in one forward."""

    speculative: bool = False


class GenerateHooks:
    """Positions after a cached prompt; candidates noticed or refused; no continuous batching.

    And who called: what ran in one call of generate belongs together, see `Records`. ``given`` is
    what the user passed, which may wrap ``model``.
    """

    def __init__(
        self, patches: Patches, model: Any, given: Any, records: Records, idle: bool, kind: Kind
    ) -> None:
        self._records, self._kind, self._local = records, kind, _Local()
        if not hasattr(type(model), "generate"):  # a bare base model
            return
        for name, make in ((POSITIONS, self._positions), (CANDIDATES, self._candidates)):
            inner = getattr(model, name)
            patches.replace(model, name, functools.wraps(inner)(make(inner)))
        if not idle and hasattr(model, BATCHING):
            patches.replace(model, BATCHING, _refuse_batching)
        for module in {id(m): m for m in (model, given)}.values():
            if callable(inner := getattr(module, "generate", None)):
                who = type(module).__name__
                patches.replace(module, "generate", functools.wraps(inner)(self._call(inner, who)))

    @property
    def speculative(self) -> bool:
        """Whether this thread's generate checks several candidates in one forward."""
        return self._local.speculative

    def _call(self, inner: Callable[..., Any], who: str) -> Callable[..., Any]:
        records = self._records

        def generate(*args: Any, **kwargs: Any) -> Any:
            before, self._local.speculative = self._local.speculative, False
            forwards, records.current = records.forwards, None
            try:
                with records.call():
                    output = inner(*args, **kwargs)
            finally:
                self._local.speculative = before
            if records.forwards == forwards:
                reason = f"{who}.generate() ran, and none of its forwards was of the hooked model"
                records.start(None, [], None, 0, reason)
            return output

        return generate

    def _positions(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
            cache, mask = cache_of(model_kwargs), model_kwargs.get("attention_mask")
            if isinstance(cache, DycokeCache) and mask is not None:
                ids = model_kwargs.get("input_ids")
                cache.check_prompt(inputs_tensor if ids is None or not ids.numel() else ids, mask)
            positions = positions_after(cache, model_kwargs)
            return inner(inputs_tensor, model_kwargs) if positions is None else positions

        return prepare

    def _candidates(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def candidates(*args: Any, **kwargs: Any) -> Any:
            if self._kind != "none":
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


def positions_after(cache: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Positions of prompt and text that goes on with a cache of ours; else None.

    Images that come later have positions of their own, which transformers works out.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(cache, DycokeCache):
        return None
    if any(value is not None and "pixel" in name for name, value in inputs.items()):
        return None
    given = inputs.get("input_ids") if mask is None else mask
    if given is None:
        return None
    cached = cache.generation.length
    length = cached + given.shape[1] if mask is None else given.shape[1]
    return cache.generation.offset.positions(mask, length, length - cached, len(given))


def state_positions(cache: Any, inputs: dict[str, Any]) -> None:
    """Give a bare forward that goes on with a cache of ours its positions, in place."""
    ids = inputs.get("input_ids")
    if ids is None:
        return
    if (positions := positions_after(cache, inputs)) is not None:
        positions = positions[..., -ids.shape[1] :]
        inputs["position_ids"] = positions.expand(3, -1, -1) if positions.ndim == 3 else positions
