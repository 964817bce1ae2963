"""Echoes: what merged tokens leave behind while a prompt is read. Not the paper's; pure tensors.

A merged token is no row any more: it has no query, no MLP and no place in the cache. In the lower
layers the frames still see it as a key and a value, its *echo*, made from a state that is guessed:
the token's own embedding, plus what the layers so far added to the kept tokens of its place before
and after it in time. In the first of these layers its state may be computed exactly instead.

Where the frames compare themselves with each other, this is what they need; the text, which comes
later, keeps to the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dycoke.models import VideoSpan

REACH = 4
"""Frames after its own in which an echo is seen. More change nothing (docs/decisions.md, 29)."""

BLOCK = 256
"""Queries whose mask is made at once."""

KEPT_MASKS = 1 << 24
"""Bytes of masks that are kept from layer to layer; larger ones are made anew in each."""

SHARING = ("cpu",)
"""Devices whose kernels take a mask and heads that share keys; others get keys for each head."""

FAR = 1 << 40  # behind every row


@dataclass(frozen=True, eq=False)
class Visible:
    """Which rows and which echoes each query sees: a range of each.

    Attributes
    ----------
    rows, echoes : Tensor, long, (2, B, Q): the first one, and the one behind the last.
    blocks : for each `BLOCK` of queries the rows and the echoes that any of them sees, as (rows,
        first echo, last echo); rows are counted from 0.
    masks : those of blocks, where they are kept.
    """

    rows: Tensor
    echoes: Tensor
    blocks: list[tuple[int, int, int]]
    masks: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Tensor, echoes: Tensor) -> Visible:
        """From the ranges; waits for the device once."""
        _, batch, count = rows.shape
        blocks = -(-count // BLOCK)
        empty = echoes[1] <= echoes[0]
        ends = torch.stack([rows[1], echoes[1].masked_fill(empty, 0)])
        begins = echoes[0].masked_fill(empty, FAR)
        ends = torch.nn.functional.pad(ends, (0, blocks * BLOCK - count))
        begins = torch.nn.functional.pad(begins, (0, blocks * BLOCK - count), value=FAR)
        last = ends.view(2, batch, blocks, BLOCK).amax((1, 3))
        first = begins.view(batch, blocks, BLOCK).amin((0, 2))
        first = torch.minimum(first, last[1])  # where nobody sees an echo: none
        bounds = torch.stack([last[0], first, last[1]], 1).tolist()
        return cls(rows, echoes, [(end, low, high) for end, low, high in bounds])

    def attend(
        self,
        query: Tensor,
        rows: Sequence[Tensor],
        echoes: Sequence[Tensor],
        scaling: float | None = None,
    ) -> Tensor:
        """Attention over what is seen, a block of queries at a time.

        Parameters
        ----------
        query : Tensor, (B, H, Q, D)
        rows, echoes : keys and values, (B, G, R, D) and (B, G, E, D); H is a multiple of G.
        scaling : factor of the products; None for ``D ** -0.5``.

        Returns
        -------
        Tensor, (B, Q, H, D)

        Notes
        -----
        Beside keys and values there is the mask of one block: memory grows with the prompt's
        length, not with its square. What a block needs has the same size in all of them, or lies in
        a buffer, since pieces that grow from block to block would tear the allocator's memory.
        """
        window = max(high - low for _, low, high in self.blocks)
        heads = query.shape[1]
        shared = query.device.type in SHARING
        held = rows[0].shape[1] if shared else heads
        keys, values = (_room_before(part, window, held) for part in rows)
        made = query.new_empty(query.shape[0], query.shape[2], heads, values.shape[-1])
        for i, (end, low, high) in enumerate(self.blocks):
            part, seen = slice(i * BLOCK, (i + 1) * BLOCK), slice(window - high + low, window + end)
            for buffer, echo in ((keys, echoes[0]), (values, echoes[1])):
                groups = buffer.view(*echo.shape[:2], -1, *buffer.shape[2:])
                groups[..., seen.start : window, :] = echo[:, :, None, low:high]
            made[:, part] = nn.functional.scaled_dot_product_attention(
                query[:, :, part],
                keys[:, :, seen],
                values[:, :, seen],
                self._mask(i, window, rows[0].shape[2], query)[..., seen],
                scale=scaling,
                enable_gqa=shared,
            ).transpose(1, 2)
        return made

    def _mask(self, block: int, window: int, rows: int, query: Tensor) -> Tensor:
        """What a block sees: bool, (B, 1, queries, window + rows).

        Echoes stand in front of the rows, the last one that a block sees in the last place.
        """
        if block in self.masks:
            return self.masks[block].to(query.device)
        _, _, last = self.blocks[block]
        part, device = slice(block * BLOCK, (block + 1) * BLOCK), self.rows.device
        seen = [
            (number >= begin[:, part, None]) & (number < stop[:, part, None])
            for (begin, stop), number in (
                (self.echoes, torch.arange(last - window, last, device=device)),
                (self.rows, torch.arange(rows, device=device)),
            )
        ]
        mask = torch.cat(seen, 2)[:, None].to(query.device)
        if len(self.blocks) * mask.numel() <= KEPT_MASKS:
            self.masks[block] = mask
        return mask


def _room_before(values: Tensor, window: int, heads: int) -> Tensor:
    """Values (B, G, R, D) behind ``window`` free places, for H heads: (B, H, window + R, D)."""
    batch, groups, count, width = values.shape
    made = values.new_empty(batch, groups, heads // groups, window + count, width)
    made[..., window:, :] = values[:, :, None]
    return made.flatten(1, 2)


@dataclass(eq=False)
class Echoes:
    """The merged tokens of a batch, while its prompt is read.

    E is the largest number of them in a sample; a sample with fewer is padded behind.

    Attributes
    ----------
    states : Tensor, (B, E, D): what they are in front of the layer at hand.
    entered : Tensor, (B, R, D): the rows, as they were where ``states`` was last brought up.
    position_ids : Tensor, (..., B, E).
    before, after : Tensor, long, (B, E): rows of the kept tokens of the place.
    weight : Tensor, (B, E): share of the one after.
    seen : what the rows see.
    own : what the echoes see themselves, where they are computed.
    rotary : their cosines and sines, by the kind of layer; None where all layers have the same.
    keys_and_values, of_rows : in the layer at hand, of the echoes and of the rows.
    """

    states: Tensor
    entered: Tensor
    position_ids: Tensor
    before: Tensor
    after: Tensor
    weight: Tensor
    seen: Visible
    own: Visible
    rotary: dict[str | None, tuple[Tensor, ...]] = field(default_factory=dict)
    keys_and_values: tuple[Tensor, Tensor] | None = None
    of_rows: tuple[Tensor, Tensor] | None = None

    def rise(self, hidden: Tensor) -> None:
        """Follow the rows, (B, R, D), to the layer that they enter now."""
        if hidden is self.entered:
            return
        added = hidden - self.entered.to(hidden.device)
        one, two = (_rows(added, index) for index in (self.before, self.after))
        weight = self.weight[..., None].to(added.device, added.dtype)
        self.states = self.states.to(added.device) + torch.lerp(one, two, weight)
        self.entered = hidden


def neighbours(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept tokens of a merged token's place, before and after it in time.

    Parameters
    ----------
    keep : Tensor, bool, (F, N)

    Returns
    -------
    before, after : Tensor, long, (F, N)
        Frames; the same one twice where there is none on one side, and -1 where no token of the
        place is kept.
    weight : Tensor, (F, N)
        0 at ``before``, 1 at ``after``, linear in time.
    """
    frames = len(keep)
    time = torch.arange(frames, device=keep.device)[:, None].expand_as(keep)
    before = torch.where(keep, time, -1).cummax(0).values
    after = torch.where(keep, time, frames).flip(0).cummin(0).values.flip(0)
    first, last = before < 0, after >= frames
    before, after = torch.where(first, after, before), torch.where(last, before, after)
    nowhere = first & last
    before, after = before.masked_fill(nowhere, -1), after.masked_fill(nowhere, -1)
    weight = (time - before) / (after - before).clamp(min=1)
    return before, after, weight.masked_fill(first | last, 0.0)


def echoes_of(
    embeds: Tensor,
    position_ids: Tensor | None,
    spans: Sequence[VideoSpan],
    masks: Sequence[Tensor],
    index: Tensor,
    rows: Tensor,
    reach: int | None = None,
) -> Echoes | None:
    """What was merged away in a prompt; None where nothing was.

    Parameters
    ----------
    embeds : Tensor, (B, S, D)
        The whole prompt.
    position_ids : Tensor or None, (..., B or 1, S)
        Its positions; None numbers it through.
    spans, masks : the videos, and which of their tokens stay, bool (F, N) each.
    index : Tensor, long, (B, R)
        The prompt position of each row, -1 for padding in front.
    rows : Tensor, (B, R, D)
        The rows that are left of ``embeds``.
    reach : frames, see `REACH`, which None stands for.
    """
    batch, length, _ = embeds.shape
    device, reach = embeds.device, REACH if reach is None else reach
    gone = torch.zeros(batch, length, dtype=torch.bool, device=device)
    visual, frame = torch.zeros_like(gone), torch.zeros_like(gone, dtype=torch.long)
    before, after = torch.zeros_like(frame), torch.zeros_like(frame)
    weight = torch.zeros(batch, length, device=device)
    begun = [0] * batch  # frames of the sample's videos so far
    for span, mask in zip(spans, masks, strict=True):
        sample, places, keep = span.sample, span.positions.to(device), mask.to(device)
        one, two, share = neighbours(keep)
        gone[sample, places] = ~keep & (one >= 0)
        visual[sample, places] = keep
        number = torch.arange(len(keep), device=device)[:, None].expand_as(keep)
        frame[sample, places] = number + begun[sample]
        begun[sample] += len(keep)
        before[sample, places] = places.gather(0, one.clamp(min=0))
        after[sample, places] = places.gather(0, two.clamp(min=0))
        weight[sample, places] = share
    counts = gone.sum(1)
    most = int(counts.max())
    if most == 0:
        return None
    source = gone.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    number = torch.arange(most, device=device).expand(batch, -1)
    real = number < counts[:, None]
    # Both ascend, so that what is seen is a range of each. Padding: first among rows, last here.
    places = torch.where(real, source, length)
    frames = torch.where(real, frame.gather(1, source), length)

    real_row = index >= 0
    at, row = index.clamp(min=0), torch.arange(index.shape[1], device=device).expand_as(index)
    padding = (~real_row).sum(1, keepdim=True)
    looks = visual.gather(1, at) & real_row  # text keeps to the rows, whenever it comes
    oldest = frame.gather(1, at) - reach
    seen = torch.searchsorted(frames, oldest), torch.searchsorted(places, at)
    seen_by_rows = torch.stack(seen).where(looks, torch.zeros_like(row))
    own_rows = torch.searchsorted(index, places).where(real, padding)
    own = torch.searchsorted(frames, frames - reach).where(real, number), number + 1
    if position_ids is None:
        position_ids = torch.arange(length, device=device)[None]
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, -1)
    where = source.to(position_ids.device).expand(*position_ids.shape[:-2], -1, -1)
    return Echoes(
        states=_rows(embeds, source),
        entered=rows,
        position_ids=position_ids.gather(-1, where),
        before=torch.searchsorted(index, before.gather(1, source)),
        after=torch.searchsorted(index, after.gather(1, source)),
        weight=weight.gather(1, source),
        seen=Visible.of(torch.stack([torch.minimum(padding, row), row + 1]), seen_by_rows),
        own=Visible.of(torch.stack([padding.expand_as(own_rows), own_rows]), torch.stack([*own])),
    )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, E) of ``values`` (B, R, D)."""
    index = index.to(values.device)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index)
