"""The KV cache of one generation: every row once, in the order that decoding wants.

A layer that is pruned while decoding keeps, per sample, right-aligned::

    [ padding | bank | active | text and generated tokens ]

so that a decode step attends to one contiguous view, from the first active row on. Changing the
selection exchanges rows in place. Other layers keep their rows in prompt order; those with a
sliding window or linear attention stay what transformers made them. RoPE is in the keys already, so
the order of rows does not matter to attention.

To the outside (`generate` slices follow-up prompts by it) the cache has its *logical* length, the
tokens of the whole prompt and of the answer. To the masks it has its *physical* length, the rows
that are really there.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dycoke.errors import UnsupportedError
from dycoke.lead import Lead
from dycoke.rows import RowMap, Visual
from dycoke.selection import swap_pairs

# Layers that stay as they are. Shared keys and values have a dummy layer, in newer versions.
STOCK = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)
ROOM = 64  # rows allocated ahead, so that a token costs no copy of the whole buffer


class VideoLayer(DynamicLayer):
    """One decoder layer's keys and values, in a buffer with room to grow.

    ``keys`` and ``values`` are views of the filled part, (B, heads, T, D).
    """

    def __init__(self, rows: RowMap) -> None:
        super().__init__()
        self.rows = rows
        self.length = 0
        self.is_initialized = False
        self.buffers: list[Tensor] = []  # keys, values: (B, heads, capacity, D)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new, prefill = (key_states, value_states), not self.is_initialized
        count = key_states.shape[2]
        if prefill:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        if prefill or self.length + count > self.buffers[0].shape[2]:
            self._grow(new, self.length + count + ROOM)
        for buffer, states in zip(self.buffers, new, strict=True):
            if prefill and self.rows.order is not None:
                order = self.rows.order.to(states.device)[:, None, :, None]
                states = states.gather(2, order.expand_as(states))
            buffer[:, :, self.length : self.length + count] = states
        self._set_length(self.length + count)
        if prefill:
            return new
        start = self.rows.start if count == 1 else 0
        return self.keys[:, :, start:], self.values[:, :, start:]

    def _grow(self, like: tuple[Tensor, Tensor], capacity: int) -> None:
        for i, states in enumerate(like):
            batch, heads, _, width = states.shape
            buffer = states.new_empty(batch, heads, capacity, width)
            if self.length:
                buffer[:, :, : self.length] = self.buffers[i][:, :, : self.length]
                self.buffers[i] = buffer
            else:
                self.buffers.append(buffer)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def exchange(self, first: Tensor, second: Tensor) -> None:
        """Exchange rows ``first[b, i]`` and ``second[b, i]`` of sample b, all at once."""
        batch, heads, capacity, _ = self.buffers[0].shape
        # As rows of one long table, the exchange copies whole rows, several times faster than
        # gather and scatter, which go element by element.
        table = torch.arange(batch * heads, device=self.device).view(batch, heads, 1) * capacity
        to = (table + torch.cat([first, second], dim=1).to(self.device)[:, None]).flatten()
        source = (table + torch.cat([second, first], dim=1).to(self.device)[:, None]).flatten()
        for buffer in self.buffers:
            rows = buffer.view(-1, buffer.shape[3])
            rows.index_copy_(0, to, rows.index_select(0, source))

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        # The new end is below every row that `exchange` may move: the cache has checked that.
        if self.is_initialized:
            self._set_length(self.length - abs(int(tokens_to_remove)))

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.buffers = [pick(buffer).contiguous() for buffer in self.buffers]
            self._set_length(self.length)

    def reset(self) -> None:
        raise UnsupportedError("a DyCoke cache cannot be reset; pass a new DynamicCache()")

    def offload(self) -> None:
        raise UnsupportedError("a DyCoke cache cannot be offloaded; pass no cache_implementation")

    prefetch = offload


@dataclass(eq=False)
class Generation:
    """What belongs to one generation and dies with its cache.

    Attributes
    ----------
    owner : the settings that made the cache; equal settings may go on with it.
    prompt : Tensor, long, (B, prompt_length): its token ids, -1 for padding.
    prompt_length : tokens of the whole prompt at prefill, padding included.
    length : logical tokens so far.
    plain, pruned : row maps of the layers below `prune_layer` and from there on; where a method
        drops rows inside the LLM, of the layers below that door and from there on.
    visual : the visual tokens.
    dropped : Tensor, long, (B,): tokens of each prompt that were merged away.
    lead : how positions go on after the prompt.
    tally : what the report is made from; belongs to the engine.
    step : the decoder forward that runs now; rows may be added only inside one.
    refuse_crop : why `crop` must not be used, where it must not.
    refuse_below : tokens of the last forward, where some may be candidates of which nothing tells:
        forgetting fewer than these is refused.
    """

    owner: Any
    prompt: Tensor
    prompt_length: int
    length: int
    plain: RowMap
    pruned: RowMap
    visual: Visual
    dropped: Tensor
    lead: Lead
    tally: Any = None
    step: Any = None
    refuse_crop: str | None = None
    refuse_below: int = 0

    @property
    def prunes(self) -> bool:
        """Whether decode steps attend to a selection; rows that were dropped leave no choice."""
        return self.pruned.order is not None


class DycokeCache(DynamicCache):
    """The `DynamicCache` that generate made, grown into one with rows that move (`adopt`)."""

    generation: Generation

    def _check_open(self) -> None:
        if self.generation.step is None:
            raise UnsupportedError(
                "this cache was made by DyCoke and its rows are not in prompt order; go on with it "
                "inside the `with` block of the same settings (or use dycoke.apply), or start "
                "with a new cache"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._check_open()
        rows: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return rows

    # A linear layer asks first whether it has a state (5.17 so, later versions by the second).
    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        self._check_open()
        known: bool = super().has_previous_state(*args, **kwargs)
        return known

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._check_open()
        state: Tensor | None = super().get_conv_state(*args, **kwargs)
        return state

    @property
    def row_count(self) -> int:
        """The rows that are really there: text, generated and kept visual tokens."""
        layer = next(layer for layer in self.layers if isinstance(layer, DynamicLayer))
        return int(layer.get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.generation.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        # Masks place the new queries by it: with the logical length they would see the future.
        return self.row_count

    @property
    def is_croppable(self) -> bool:
        # A step that is undone may have changed the selection.
        return not self.generation.prunes and super().is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: as a stock cache, a negative number, or 0."""
        generation = self.generation
        if generation.refuse_crop:
            raise UnsupportedError(generation.refuse_crop)
        count = -int(tokens_to_remove)
        if 0 <= count < generation.refuse_below:
            raise UnsupportedError(
                f"forgetting {count} of the {generation.refuse_below} tokens that came at once is "
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
            generation.visual.previous = None
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
        for rows in {id(r): r for r in (generation.plain, generation.pruned)}.values():
            tail = torch.arange(left, left + count, device=rows.index.device)
            if left <= 0 or not (rows.index[:, -count:] == tail).all():
                raise UnsupportedError(
                    f"cannot crop to {left} of the prompt's {generation.prompt_length} tokens: "
                    "that reaches into the video; crop less, or prefill anew"
                )
            rows.index = rows.index[:, :-count]
            if rows.order is not None:
                rows.order = rows.order[:, :-count]
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

    def select(self, chosen: Tensor) -> Tensor:
        """Make ``chosen``, bool (B, V), the active set; returns how many came from the bank, (B,).

        Exchanges rows in every layer that shares the pruned row map.
        """
        visual, rows = self.generation.visual, self.generation.pruned
        recalled = (chosen & ~visual.active).sum(1)
        pairs = swap_pairs(visual.active, chosen)
        visual.active = chosen
        if pairs is None:
            return recalled
        leaving, entering = pairs
        first, second = visual.slots.gather(1, leaving), visual.slots.gather(1, entering)
        for layer in self.layers:
            if isinstance(layer, VideoLayer) and layer.rows is rows:
                layer.exchange(first, second)
        visual.slots.scatter_(1, leaving, second).scatter_(1, entering, first)
        index = rows.index.clone()
        index.scatter_(1, first, rows.index.gather(1, second))
        rows.index = index.scatter_(1, second, rows.index.gather(1, first))
        return recalled

    def _map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        generation = self.generation
        maps = {id(rows): rows.map_batch(pick) for rows in (generation.plain, generation.pruned)}
        for layer in self.layers:
            if isinstance(layer, VideoLayer):
                layer.map_batch(pick)
                layer.rows = maps[id(layer.rows)]
            else:
                _map_stock(layer, pick)
        generation.plain = maps[id(generation.plain)]
        generation.pruned = maps[id(generation.pruned)]
        generation.visual.map_batch(pick)
        generation.dropped = pick(generation.dropped)
        generation.prompt = pick(generation.prompt)
        generation.lead.map_batch(pick)
        generation.tally.map_batch(pick)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = torch.as_tensor(indices)
        self._map_batch(lambda x: x[indices.to(x.device)])

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


def adopt(cache: DynamicCache, generation: Generation, pruned: Container[int], layers: int) -> None:
    """Turn an empty `DynamicCache` into ours, in place: generate holds a reference to it.

    ``pruned`` says which layers are pruned while decoding. A cache made without a config has no
    layers yet; it gets ``layers`` of them.
    """
    cache.layers = [
        VideoLayer(generation.pruned if i in pruned else generation.plain)
        if type(layer) is DynamicLayer
        else layer
        for i, layer in enumerate(cache.layers or [DynamicLayer() for _ in range(layers)])
    ]
    cache.layer_class_to_replicate = None
    cache.__class__ = DycokeCache
    cache.generation = generation


def _map_stock(layer: Any, pick: Callable[[Tensor], Tensor]) -> None:
    """Follow beams and copies in a layer of transformers: rows, and states of linear attention.

    Stock layers reorder by themselves, but linear ones do not copy.
    """
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.ndim > 2:
            setattr(layer, name, pick(value))
        elif isinstance(value, dict):
            for key, state in value.items():
                if isinstance(state, Tensor):
                    value[key] = pick(state)


def _held(layer: Any) -> list[Tensor]:
    """The tensors of a cache layer: keys and values, or states of linear attention."""
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        states += getattr(layer, name, {}).values()
    return [state for state in states if isinstance(state, Tensor)]


def kv_bytes(cache: Any) -> int:
    """Bytes of the unique storages that a cache holds."""
    storages = {}
    for layer in getattr(cache, "layers", ()):
        for tensor in _held(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def kv_bytes_full(cache: Any) -> int:
    """Bytes that a stock `DynamicCache` would hold now for the same tokens, uncompressed."""
    if not isinstance(cache, DycokeCache):
        return kv_bytes(cache)
    total = 0
    for layer in cache.layers:
        for tensor in _held(layer):
            rows = 1
            if isinstance(layer, DynamicLayer):
                # A layer with a window holds its last tokens and, until the next, the new one.
                window = getattr(layer, "sliding_window", None) or cache.generation.length
                rows = min(cache.generation.length, window)
                tensor = tensor[:, :, :1]
            total += rows * tensor.numel() * tensor.element_size()
    return total
