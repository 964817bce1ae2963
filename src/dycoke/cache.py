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
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dycoke.cache_rules import CacheRules, Generation
from dycoke.errors import UnsupportedError
from dycoke.rows import RowMap
from dycoke.selection import swap_pairs

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


class DycokeCache(CacheRules):
    """The `DynamicCache` that generate made, grown into one with rows that move (`adopt`)."""

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
