"""What happens inside the decoder's layers: scores, rows that leave, masks that follow.

One layer's attention scores the visual tokens. The layers above attend to other rows than those
below: to a selection that changes while decoding, or to what a method left at prefill.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dycoke.attention import Override, attention_of, native_mask, query_scores
from dycoke.cache import DycokeCache
from dycoke.drop import Dropper, door, drop_rows, last_token_scores, shorten_layer
from dycoke.errors import UnsupportedError
from dycoke.layers import plan
from dycoke.rows import Visual
from dycoke.tally import Tally

Hook = Callable[[nn.Module, Any, Any], None]
"""Registers what runs before and after a module's forward."""


class Within(Dropper, Protocol):
    """The part of a method that works inside the LLM."""

    prune_ratio: float
    prune_layer: int

    @property
    def idle(self) -> bool:
        """True where the settings ask for no compression at all."""
        ...

    def select_tokens(self, scores: Tensor, visual: Visual) -> tuple[Tensor, Tensor]:
        """At a decode step: attention (B, V) -> active set (B, V), refreshed (B,)."""
        ...


class Step:
    """One forward of the decoder.

    Attributes
    ----------
    length : tokens that come in, before any are dropped.
    tally : where it is counted; ``counts`` says whether as a decode step.
    cache : the cache, where it is one of ours; ``prefill`` says whether it is new.
    attention_mask : the user's, (B, logical length), or None.
    plain_mask : which keys the layers that are not pruned may see, (B, rows), or None.
    pruned_masks : per device, what the layers with rows of their own hand to their attention
        function.
    scores : attention of each prompt's last token, (B, rows), where a method drops by it.
    source : rows that were not dropped, (B, rows left), once they are known.
    """

    tally: Tally

    def __init__(self, length: int) -> None:
        self.length = length
        self.counts = False
        self.cache: DycokeCache | None = None
        self.prefill = False
        self.attention_mask: Tensor | None = None
        self.plain_mask: Tensor | None = None
        self.pruned_masks: dict[torch.device, Any] = {}
        self.scores: Tensor | None = None
        self.source: Tensor | None = None

    @property
    def decode(self) -> bool:
        return self.length == 1 and not self.prefill


class Inside:
    """One method inside one decoder, from `install` to `restore`.

    Parameters
    ----------
    levels : first layers behind which features are added to visual tokens.
    trace : whether scores are wanted even where nothing is pruned.

    Attributes
    ----------
    door : the first layer without the rows that are dropped at prefill; None where none are.
    step : the forward that runs now.
    """

    def __init__(self, decoder: Any, method: Within, levels: int, trace: bool) -> None:
        self.decoder, self.method, self.trace = decoder, method, trace
        self.implementation = decoder.config._attn_implementation
        self.plan = plan(decoder.config, method.prune_layer)
        self.door = None if method.idle else door(method, decoder.config, levels)
        if self.door is not None and method.prune_ratio > 0:
            raise UnsupportedError(
                f"{type(method).__name__} drops tokens inside the LLM and selects while decoding: "
                "a method does one or the other; use prune_ratio=0"
            )
        self.step: Step | None = None
        self._overrides: list[Override] = []

    def install(self, hook: Hook) -> None:
        """Score in one layer, other rows in those above it; other layers are free."""
        prunes = self.method.prune_ratio > 0
        scoring = self.plan.scoring if self.door is None else self.door - 1
        for i, layer in enumerate(self.decoder.layers):
            # A trace wants the scores even where nothing is pruned.
            if i == scoring and (prunes or self.door or self.trace):
                self._overrides.append(Override(attention_of(layer), self._scoring))
            elif i in self.upper:
                self._overrides.append(Override(attention_of(layer), self._pruning))
        if self.door is not None:
            for layer in self.decoder.layers[self.door :]:
                hook(layer, self._enter_layer, None)

    def restore(self) -> None:
        """Undo `install`, but for the hooks. Harmless when called twice."""
        for override in self._overrides:
            override.restore()
        self._overrides = []

    @property
    def installed(self) -> bool:
        """Whether attention is overridden anywhere."""
        return bool(self._overrides)

    @property
    def below(self) -> float | None:
        """Share of the layers below the door, which hold all rows."""
        return None if self.door is None else self.door / len(self.decoder.layers)

    @property
    def upper(self) -> Container[int]:
        """The layers whose rows are not those of the layers below."""
        if self.door is not None:
            return range(self.door, len(self.decoder.layers))
        return self.plan.pruned if self.method.prune_ratio > 0 else ()

    def _scoring(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The layer below the pruned ones: its attention says which tokens they attend to."""
        output = inner(module, *args, **kwargs)
        step = self.step
        if step is not None and step.cache is not None:
            query, keys, scaling = args[0], args[1], kwargs.get("scaling")
            mask = step.plain_mask
            mask = mask if mask is None else mask.to(query.device)
            if step.decode:
                self._select(step.cache, query_scores(query, keys, scaling, mask))
            elif step.prefill and self.door is not None:
                step.scores = last_token_scores(query, keys, scaling, mask)
        return output

    def _enter_layer(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """A layer above the door, at prefill: the first drops rows, all go on without them."""
        step = self.step
        if step is None or step.cache is None or not step.prefill:
            return None
        inputs, generation = dict(named(module, args, kwargs)), step.cache.generation
        if step.source is None:
            assert step.scores is not None and self.below is not None
            hidden = inputs["hidden_states"]
            hidden, step.source, rows = drop_rows(
                self.method,
                hidden,
                step.scores,
                generation.plain,
                generation.visual,
                self.below,
            )
            generation.pruned.become(rows)
            inputs["hidden_states"] = hidden.gather(
                1, step.source[..., None].expand(-1, -1, hidden.shape[-1])
            )
        shorten_layer(inputs, step.source, generation.plain.index.shape[1])
        return (), inputs

    def _select(self, cache: DycokeCache, attention: Tensor) -> None:
        generation = cache.generation
        visual = generation.visual
        scores = attention.to(visual.rows.device).gather(1, visual.rows)
        scores = scores.masked_fill(~visual.valid, 0)
        if generation.prunes:
            first = visual.previous is None
            chosen, refreshed = self.method.select_tokens(scores, visual)
            recalled = cache.select(chosen)
            if not first:
                visual.refreshes += refreshed
                visual.recalled += recalled
        visual.previous = scores
        if generation.tally.trace is not None:
            generation.tally.trace.add(visual, scores)

    def _pruning(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The layers with rows of their own: the mask must follow these."""
        step = self.step
        own = step is not None and (not step.prefill or step.source is not None)
        if own and step is not None and step.cache is not None:
            mask = self._pruned_mask(step, step.cache, args[0])
            if len(args) > 3:
                args[3] = mask
            else:
                kwargs["attention_mask"] = mask
        return inner(module, *args, **kwargs)

    def _pruned_mask(self, step: Step, cache: DycokeCache, query: Tensor) -> Any:
        """What the attention function wants as a mask over a pruned layer's rows."""
        if query.device not in step.pruned_masks:
            generation = cache.generation
            rows = generation.pruned
            # Rows of prompt and answer, the new ones included: the layers below have them already.
            later = cache.row_count - generation.plain.index.shape[1]
            total = rows.index.shape[1] + later
            keys = rows.key_mask(step.attention_mask, total, query.device, step.decode)
            length = total - rows.start if step.decode else total
            new = total if step.prefill else step.length
            step.pruned_masks[query.device] = native_mask(
                self.implementation, self.decoder.config, query, new, length, keys
            )
        mask = step.pruned_masks[query.device]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # Layers that share keys may be asked for the newest tokens only.
            mask = mask[:, :, -query.shape[2] :]
        return mask


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
