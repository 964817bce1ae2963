"""What a cache of ours may be asked beside rows: to forget, to follow beams, to go on; or not."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dycoke.core.cache import Generation, RowMap, Table, VideoCache, VideoLayer
from dycoke.core.method import Method
from dycoke.errors import UnsupportedError

TABLE = 2**26  # bytes of a table, at most: while it grows, its rows are held twice

# Layers that stay as they are. Shared keys and values have a dummy layer, in newer versions.
STOCK = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)


class DycokeLayer(VideoLayer):
    """A layer of such a cache, and what it must not be asked."""

    def crop(self, tokens_to_remove: int) -> None:
        pass  # the cache crops its tables

    def reset(self) -> None:
        raise UnsupportedError("a DyCoke cache cannot be reset; pass a new DynamicCache()")

    def offload(self) -> None:
        raise UnsupportedError("a DyCoke cache cannot be offloaded; pass no cache_implementation")

    prefetch = offload


class DycokeCache(VideoCache):
    """The `DynamicCache` that generate made, grown into one with rows that move (`adopt`)."""

    # A linear layer asks first whether it has a state (5.17 so, later versions by the second).
    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        self._check_open()
        known: bool = super().has_previous_state(*args, **kwargs)
        return known

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._check_open()
        state: Tensor | None = super().get_conv_state(*args, **kwargs)
        return state

    def settle(self) -> None:
        """The prompt is read: put its rows into tables, with room for more."""
        like: dict[Any, list[tuple[VideoLayer, int]]] = {}
        at: dict[tuple[VideoLayer, int], tuple[Table, int]] = {}
        for layer in self.layers:
            if isinstance(layer, VideoLayer):
                for which, rows in layer.prompt.items():
                    kind = layer.upper, rows.shape, rows.dtype, rows.device
                    like.setdefault(kind, []).append((layer, which))
        for (upper, *_), places in like.items():
            layer, which = places[0]
            most = max(1, TABLE // max(1, layer.prompt[which].nbytes))
            for i in range(0, len(places), most):
                some = places[i : i + most]
                table = Table([layer.prompt.pop(which) for layer, which in some], upper)
                self.tables.append(table)
                at |= {rows: (table, place) for place, rows in enumerate(some)}
        for layer, _ in at:
            layer.at = (*at[layer, 0], *at[layer, 1])
        self.generation.inferred |= torch.is_inference_mode_enabled()

    def drop(self, rows: RowMap, active: Tensor) -> None:
        """At prefill: the upper layers hold ``rows``, and of the visual tokens ``active``."""
        generation, counts = self.generation, active.sum(1)
        generation.upper = rows
        generation.visual = replace(generation.visual, active=active, counts=counts)
        generation.record.attended = counts

    @property
    def is_croppable(self) -> bool:
        # A step that is undone may have changed the selection.
        return self.generation.kind != "select" and super().is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: as a stock cache, a negative number, or 0."""
        generation = self.generation
        count = -int(tokens_to_remove)
        if generation.kind != "none" and 0 < count < generation.newest:
            raise UnsupportedError(
                f"forgetting {count} of the {generation.newest} tokens that came at once is "
                "what assisted and prompt-lookup decoding do, and with prune_ratio > 0 the answer "
                "would differ; use prune_ratio=0, or decode plainly"
            )
        if count < 0:
            raise UnsupportedError(
                f"crop({int(tokens_to_remove)}) asks for a length; a DyCoke cache takes the "
                "number of newest tokens to forget, as a negative number"
            )
        self._check_stock_crop(count)
        left = generation.length - count
        if left < generation.prompt_length:
            self._crop_prompt(generation.prompt_length - left)
        generation.length = left
        if count:
            generation.visual = replace(generation.visual, previous=None)
        for table in self.tables:
            table.end -= count
        for layer in self.layers:
            # Layers that record what they would forget wait for a crop, be it by nothing.
            if count or getattr(layer, "record_past", False):
                layer.crop(-count)

    def _check_stock_crop(self, count: int) -> None:
        """Refuse to forget what a layer cannot, before any layer has forgotten something."""
        for layer in self.layers:
            if count and isinstance(layer, LinearAttentionLayer):
                raise UnsupportedError(
                    "linear attention layers cannot forget tokens; keep a copy of the cache "
                    "(copy.deepcopy) from before them"
                )
            if (
                count
                and isinstance(layer, DynamicSlidingWindowLayer)
                and not layer.record_past
                and layer.get_seq_length() >= layer.sliding_window
            ):
                raise UnsupportedError(
                    f"layers with a sliding window of {layer.sliding_window} have forgotten what "
                    "cropping would bring back; keep a copy of the cache (copy.deepcopy)"
                )

    def _crop_prompt(self, count: int) -> None:
        """Shorten the row maps by the prompt's last tokens, if those are rows of their own."""
        generation = self.generation
        left = generation.prompt_length - count
        tail = torch.arange(left, left + count, device=generation.lower.index.device)
        for rows in (generation.lower, generation.upper):
            if left <= 0 or not (rows.index[:, -count:] == tail).all():
                raise UnsupportedError(
                    f"cannot crop to {left} of the prompt's {generation.prompt_length} tokens: "
                    "that reaches into the video; crop less, or prefill anew"
                )
        for name in ("lower", "upper"):
            rows = getattr(generation, name)
            order = None if rows.order is None else rows.order[:, :-count]
            setattr(generation, name, replace(rows, index=rows.index[:, :-count], order=order))
        generation.prompt_length, generation.prompt = left, generation.prompt[:, :left]

    def check_prompt(self, ids: Tensor, mask: Tensor) -> None:
        """Refuse a prompt, (B, S) with its mask, that does not begin as the cached one.

        ``ids`` may be the new tokens alone, as generate allows: then there is nothing to compare.
        """
        held = self.generation.prompt
        if ids.shape != mask.shape:
            return
        held = held[:: max(1, len(held) // len(ids))].to(ids.device)  # one row per beam
        begins = prompt_of(ids, mask)[:, : held.shape[1]]
        if begins.shape != held.shape or not torch.equal(begins, held):
            raise ValueError(
                f"the prompt does not begin with the {held.shape[1]} tokens that this cache was "
                "made from; pass the whole prompt, unchanged, and then the question (shorter "
                "questions of a batch are padded between the two)"
            )
        if ids.shape[1] <= self.generation.length:
            raise ValueError(
                f"this cache holds {self.generation.length} tokens and the prompt has none after "
                "them; pass the whole prompt: what was prefilled, and then the question"
            )

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply ``pick`` to every tensor that has a row per sample."""
        generation = self.generation
        generation.record.map_batch(pick)
        for name, value in vars(generation).items():
            if name != "record":
                setattr(generation, name, map_tensors(value, pick))
        for table in self.tables:
            table.buffer, table.new, table.seen = pick(table.buffer).contiguous(), (), ()
        for layer in self.layers:
            if not isinstance(layer, VideoLayer):
                # Rows and states. Stock layers reorder by themselves, but linear ones do not copy.
                for name, value in vars(layer).items():
                    held = map_tensors(value, lambda x: pick(x) if x.ndim > 2 else x)
                    setattr(layer, name, held)
        generation.grown = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = torch.as_tensor(indices)
        self.map_batch(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        raise UnsupportedError("a DyCoke cache cannot be reset; pass a new DynamicCache()")


def prompt_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Token ids, (B, S), with -1 for padding."""
    return ids if mask is None else ids.masked_fill(mask.to(ids.device) == 0, -1)


def check_cache(cache: Any) -> None:
    """Refuse any cache but a plain `DynamicCache` of layers that are known."""
    if type(cache) is not DynamicCache or cache.offloading:
        offloading = getattr(cache, "offloading", False)
        kind = "an offloaded cache" if offloading else f"a {type(cache).__name__}"
        raise UnsupportedError(
            f"DyCoke takes over the DynamicCache that generate makes, and got {kind}; drop "
            "cache_implementation and compile settings, or pass past_key_values=DynamicCache()"
        )
    kinds = {type(layer) for layer in cache.layers}
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, *STOCK})
    if others:
        raise UnsupportedError(
            f"this decoder's cache has layers that DyCoke does not know ({', '.join(others)}); "
            "this model cannot be compressed yet"
        )


def adopt(
    cache: DynamicCache, generation: Generation, upper: Container[int], layers: int
) -> DycokeCache:
    """Turn an empty `DynamicCache` into ours, in place: generate holds a reference to it.

    ``upper`` are the layers with rows of their own. A cache made without a config has no layers
    yet; it gets ``layers`` of them.
    """
    cache.layers = [
        DycokeLayer(generation, i in upper) if type(layer) is DynamicLayer else layer
        for i, layer in enumerate(cache.layers or [DynamicLayer() for _ in range(layers)])
    ]
    generation.stock_layers = not all(isinstance(layer, VideoLayer) for layer in cache.layers)
    rows = (i for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer))
    generation.counting = next(rows)
    cache.layer_class_to_replicate = None
    cache.__class__ = DycokeCache
    adopted: Any = cache
    adopted.generation, adopted.tables = generation, []
    return adopted  # type: ignore[no-any-return]


def map_tensors(value: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``pick`` applied to every tensor in it; each has a row per sample.

    Lists, dictionaries and dataclasses are followed; these are made anew.
    """
    if isinstance(value, Tensor):
        return pick(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, pick) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, pick) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type | Method):
        held = {f.name: map_tensors(getattr(value, f.name), pick) for f in fields(value)}
        return replace(value, **held)
    return value
