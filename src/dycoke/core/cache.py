"""The KV cache of one generation: every row once, in the order that decoding wants.

An upper layer (`LayerPlan.upper`) that attends to a selection keeps, per sample, right-aligned::

    [ padding | bank | active | text and generated tokens ]

so that a decode step attends to one contiguous view, from the first active row on. Changing the
selection exchanges rows in place. The lower layers keep their rows in prompt order; layers with a
sliding window or linear attention stay what transformers made them.

To the outside (`generate` slices follow-up prompts by it) the cache has its *logical* length, the
tokens of the whole prompt and of the answer. To the masks it has its *physical* length, the rows
that are really there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dycoke.core.layers import Kind
from dycoke.core.method import Method, VisualTokens
from dycoke.core.positions import PositionOffset
from dycoke.core.records import Record
from dycoke.core.selection import swap_pairs
from dycoke.errors import UnsupportedError

ROOM = 64  # rows allocated ahead, so that a token costs no copy of the whole buffer


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which prompt token each prefilled row of some layers holds.

    Attributes
    ----------
    index : Tensor, long, (B, R): position in the prompt, -1 for padding that only aligns samples.
    first : Tensor, long, (B,): the first row that a decode step attends to.
    start : int: the smallest of them; one view serves the whole batch.
    order : Tensor, long, (B, R), or None: where each row stood at prefill; None for prompt order.
    padded, uneven : whether there is any -1, and whether samples start at different rows.
    """

    index: Tensor
    first: Tensor
    start: int
    order: Tensor | None = None
    padded: bool = False
    uneven: bool = False

    def key_mask(
        self, attention_mask: Tensor | None, length: int, device: torch.device, decode: bool
    ) -> Tensor | None:
        """Which keys may be seen: bool (B, T), or None where all may.

        ``attention_mask`` is the user's over prompt and answer, (B, logical length), or None;
        ``length`` counts the layer's rows, prefilled and later ones; ``decode`` asks about the
        view that a decode step takes, not about all rows.
        """
        start = self.start if decode else 0
        if attention_mask is None and not (self.uneven if decode else self.padded):
            return None
        index = self.index.to(device)
        rows = index.shape[1]
        seen = index >= 0
        if decode:
            places = torch.arange(rows, device=device)
            seen = seen & (places >= self.first.to(device)[:, None])
        if attention_mask is None:
            later = torch.ones(len(index), length - rows, dtype=torch.bool, device=device)
        else:
            attention_mask = attention_mask.to(device=device, dtype=torch.bool)
            seen = seen & attention_mask.gather(1, index.clamp(min=0))
            later = attention_mask[:, attention_mask.shape[1] - (length - rows) :]
        return torch.cat([seen[:, start:], later], dim=1)


@dataclass(eq=False)
class Generation:
    """What belongs to one generation and dies with its cache.

    Attributes
    ----------
    method, kind : the settings, equal ones may go on; what upper layers do, as in `LayerPlan`.
    prompt : Tensor, long, (B, prompt_length): its token ids, -1 for padding.
    prompt_length : tokens of the whole prompt at prefill, padding included.
    length : logical tokens so far.
    lower, upper : row maps of the lower and of the upper layers.
    visual : the visual tokens, as methods see them.
    lower_rows, upper_rows : Tensor, long, (B, V): the row of each visual token; 0 for padding.
    dropped : Tensor, long, (B,): tokens of each prompt that were merged away.
    offset : how positions go on after the prompt.
    record : what the report is made from.
    newest : tokens of the last forward.
    open : whether a decoder forward runs now; rows may be added only inside one.
    grown, inferred : whether buffers changed since they were last measured; whether any was made
        under torch.inference_mode(), outside of which it cannot be written.
    counting, stock_layers : the first layer that has rows; whether some stay transformers' own.
    """

    method: Method
    kind: Kind
    prompt: Tensor
    prompt_length: int
    length: int
    lower: RowMap
    upper: RowMap
    visual: VisualTokens
    lower_rows: Tensor
    upper_rows: Tensor
    dropped: Tensor
    offset: PositionOffset
    record: Record
    newest: int = 1
    open: bool = False
    grown: bool = True
    inferred: bool = False
    counting: int = 0
    stock_layers: bool = False

    def rows(self, upper: bool) -> int:
        """The rows that an upper or a lower layer has before this forward."""
        rows = self.upper if upper else self.lower
        return rows.index.shape[1] + self.length - self.prompt_length if self.length else 0


class Table:
    """Keys or values of like layers, one to a place: (B, places, heads, rows, D).

    One copy makes room for all of them, one view of all is taken apart into theirs, and one
    exchange moves the rows of all: each takes longer to ask for than to do.
    """

    def __init__(self, parts: list[Tensor], upper: bool) -> None:
        batch, heads, self.end, width = parts[0].shape
        self.upper, self.begin, self.start = upper, 0, 0
        self.new: tuple[Tensor, ...] = ()  # per place, the rows that this forward writes
        self.seen: tuple[Tensor, ...] = ()  # and those that it attends to
        self.buffer = parts[0].new_empty(batch, len(parts), heads, self.end + ROOM, width)
        for place, part in enumerate(parts):
            self.rows(place).copy_(part)

    def rows(self, place: int) -> Tensor:
        """The filled rows of one place, (B, heads, T, D)."""
        return self.buffer.select(1, place).narrow(2, 0, self.end)

    def open(self, begin: int, new: int, start: int) -> bool:
        """Be ready for ``new`` rows from ``begin`` on, seen from ``start`` on; whether it grew."""
        self.begin, self.start, self.end, self.new, self.seen = begin, start, begin + new, (), ()
        *sizes, capacity, width = self.buffer.shape
        grows = self.end > capacity
        if grows:
            grown = self.buffer.new_empty(*sizes, self.end + ROOM, width)
            grown.narrow(3, 0, begin).copy_(self.buffer.narrow(3, 0, begin))
            self.buffer = grown
        if not torch.is_grad_enabled():  # else what comes from one call cannot be written
            self.new = self.buffer.narrow(3, begin, new).unbind(1)
            self.seen = self.buffer.narrow(3, start, self.end - start).unbind(1)
        return grows

    def put(self, place: int, states: Tensor) -> Tensor:
        """Write the new rows of one place where gradients are recorded; returns those to see."""
        rows = self.rows(place)
        rows.narrow(2, self.begin, states.shape[2]).copy_(states)
        return rows.narrow(2, self.start, self.end - self.start)

    def exchange(self, samples: Tensor, there: Tensor, back: Tensor) -> None:
        """Copy rows ``back[i]`` of ``samples[i]``, all at once, to where ``there[i]`` are."""
        # Whole rows are copied, which is several times faster than gather and scatter.
        _, places, heads, capacity, width = self.buffer.shape
        every = torch.arange(places * heads, device=samples.device)[:, None]
        begins = (samples * len(every) + every) * capacity
        to, source = ((begins + x).flatten().to(self.buffer.device) for x in (there, back))
        rows = self.buffer.view(-1, width)
        rows.index_copy_(0, to, rows.index_select(0, source))


class VideoLayer(DynamicLayer):
    """One decoder layer's keys and values: places in tables, once its prompt is read.

    ``keys`` and ``values`` are views of the filled rows, (B, heads, T, D).
    """

    def __init__(self, generation: Generation, upper: bool) -> None:
        self.prompt: dict[int, Tensor] = {}  # keys (0) and values (1), until a table has them
        self.at: tuple[Any, ...] = ()  # the keys' table and place, the values' table and place
        self.generation, self.upper = generation, upper
        super().__init__()

    # Views are made when they are looked at; what transformers sets to None at first stays away.
    keys = property(lambda self: self._rows(0), lambda self, _: None)
    values = property(lambda self: self._rows(1), lambda self, _: None)

    def _rows(self, which: int) -> Any:
        if self.at:
            return self.at[2 * which].rows(self.at[2 * which + 1])
        return self.prompt.get(which)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.at:
            return self._fill(key_states, value_states)
        keys, place, values, other = self.at
        if not keys.new:
            return keys.put(place, key_states), values.put(other, value_states)
        keys.new[place].copy_(key_states)
        values.new[other].copy_(value_states)
        return keys.seen[place], values.seen[other]

    def _fill(self, *new: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a prompt, in the order that decoding wants."""
        order = (self.generation.upper if self.upper else self.generation.lower).order
        index = None if order is None else order.to(new[0].device)[:, None, :, None]
        self.dtype, self.device, self.is_initialized = new[0].dtype, new[0].device, True
        for i, states in enumerate(new):  # copied, since a view may keep more alive than its rows
            kept = states.clone() if index is None else states.gather(2, index.expand_as(states))
            self.prompt[i] = kept
        return new[0], new[1]

    def get_seq_length(self) -> int:
        return self.generation.rows(self.upper)


class VideoCache(DynamicCache):
    """Rows of one generation: added, viewed, exchanged. What else is asked is in `cache_rules`."""

    generation: Generation
    tables: list[Table]

    def _check_open(self) -> None:
        if not self.generation.open:
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

    @property
    def row_count(self) -> int:
        """The rows that are really there: text, generated and kept visual tokens."""
        return self.generation.rows(upper=False)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.generation.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        # Masks place the new queries by it: with the logical length they would see the future.
        return self.row_count

    def begin(self, new: int, decode: bool) -> None:
        """A forward of ``new`` tokens starts; ``decode`` where it goes on with an answer."""
        generation, self.generation.newest = self.generation, new
        if new > 1 and generation.visual.previous is not None:
            # What follows selects anew.
            generation.visual = replace(generation.visual, previous=None)
        offset = generation.offset
        if not decode and offset.answered:
            offset.now = offset.turn
        offset.answered |= decode
        for table in self.tables:
            rows = generation.upper if table.upper else generation.lower
            begin, start = generation.rows(table.upper), rows.start if new == 1 else 0
            if table.open(begin, new, start):
                generation.grown = True
                generation.inferred |= torch.is_inference_mode_enabled()

    def select(self, chosen: Tensor) -> Tensor:
        """Make ``chosen``, bool (B, V), the active set; how many come back from the bank, (B,)."""
        generation, active = self.generation, self.generation.visual.active
        recalled = (chosen & ~active).sum(1)
        if (pairs := swap_pairs(active, chosen)) is None:
            return recalled
        slots, rows = generation.upper_rows.clone(), generation.upper
        samples, leaving, entering = pairs
        first, second = slots[samples, leaving], slots[samples, entering]
        both, there = samples.repeat(2), torch.cat([first, second])
        back = torch.cat([second, first])
        for table in self.tables:
            if table.upper:
                table.exchange(both, there, back)
        slots[both, torch.cat([leaving, entering])] = back
        index = rows.index.clone()
        index[both, there] = rows.index[both, back]
        generation.upper_rows = slots
        generation.upper = replace(rows, index=index)
        generation.visual = replace(generation.visual, active=chosen)
        generation.record.attended = chosen.sum(1)
        return recalled

    def note(self, scores: Tensor) -> None:
        """Remember this step's attention to the visual tokens, (B, V), for the next one."""
        self.generation.visual = replace(self.generation.visual, previous=scores)
