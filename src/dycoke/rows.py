"""Where each row of a shortened prompt came from, and in which order layers keep rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke.merging import retained_count


@dataclass(eq=False)
class RowMap:
    """Which prompt token each prefilled row holds; shared by the layers whose rows agree.

    Attributes
    ----------
    index : Tensor, long, shape (B, R)
        Position in the prompt, -1 for padding that only aligns samples.
    padded : bool
        Whether any -1 is there.
    first : list of int
        Per sample, the first row that a decode step attends to.
    order : Tensor, long, shape (B, R), or None
        Where each row stood at prefill; None for prompt order.
    """

    index: Tensor
    padded: bool
    first: list[int]
    order: Tensor | None = None

    @property
    def start(self) -> int:
        """First row of the one view that a decode step takes for the whole batch."""
        return min(self.first)

    def key_mask(
        self, attention_mask: Tensor | None, length: int, device: torch.device, decode: bool
    ) -> Tensor | None:
        """Which keys may be seen: bool (B, T), or None where all may.

        Parameters
        ----------
        attention_mask : Tensor, shape (B, logical length), or None
            The user's mask over prompt and answer.
        length : int
            Rows in the layer, prefilled and later ones.
        decode : bool
            True for the view that a decode step takes, False for all rows.
        """
        start = self.start if decode else 0
        hidden = max(self.first) > start if decode else self.padded
        if attention_mask is None and not hidden:
            return None
        index = self.index.to(device)
        rows = index.shape[1]
        seen = index >= 0
        if decode:
            first = torch.tensor(self.first, device=device)
            seen = seen & (torch.arange(rows, device=device) >= first[:, None])
        if attention_mask is None:
            later = torch.ones(len(index), length - rows, dtype=torch.bool, device=device)
        else:
            attention_mask = attention_mask.to(device=device, dtype=torch.bool)
            seen = seen & attention_mask.gather(1, index.clamp(min=0))
            later = attention_mask[:, attention_mask.shape[1] - (length - rows) :]
        return torch.cat([seen[:, start:], later], dim=1)

    def become(self, other: RowMap) -> None:
        """Take over another map, for all layers that share this one."""
        self.index, self.padded = other.index, other.padded
        self.first, self.order = other.first, other.order

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> RowMap:
        """The same map over other rows of the batch (beams, copies)."""
        order = None if self.order is None else pick(self.order)
        first = pick(torch.tensor(self.first, device=self.index.device)).tolist()
        return RowMap(pick(self.index), self.padded, first, order)


@dataclass(eq=False)
class Visual:
    """The visual tokens of a generation and which of them are active.

    V is the largest number of kept visual tokens in a sample; token v of a sample is its v-th in
    raster order, over all its videos.

    Attributes
    ----------
    rows : Tensor, long, (B, V): row in the layers that are not pruned; 0 for padding.
    slots : Tensor, long, (B, V): row in the pruned layers; 0 for padding.
    valid : Tensor, bool, (B, V): False for padding.
    counts : Tensor, long, (B,): how many tokens a decode step attends to.
    active : Tensor, bool, (B, V): the tokens that it attends to now.
    previous : Tensor or None, (B, V): attention in the step before.
    refreshes, recalled : Tensor, long, (B,): tallies, without the first selection.
    """

    rows: Tensor
    slots: Tensor
    valid: Tensor
    counts: Tensor
    active: Tensor
    refreshes: Tensor
    recalled: Tensor
    previous: Tensor | None = None

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, pick(value))


@dataclass(eq=False)
class Arrangement:
    """A prompt cut down to the rows that stay.

    Attributes
    ----------
    source : Tensor, long, (B, R): prompt position of each row; of a padding row, any position.
    dropped : Tensor, long, (B, S): tokens merged away before (and at) each prompt position.
    plain, pruned : row maps; the same object where nothing is pruned.
    visual : the visual tokens.
    kept : list of int: visual tokens per sample.
    """

    source: Tensor
    dropped: Tensor
    plain: RowMap
    pruned: RowMap
    visual: Visual
    kept: list[int]


def arrange(
    keep: Tensor, visual: Tensor, attention_mask: Tensor | None, prune_ratio: float
) -> Arrangement:
    """Lay out the rows of a prompt from which tokens have been merged away.

    Parameters
    ----------
    keep : Tensor, bool, (B, S): False for tokens merged away.
    visual : Tensor, bool, (B, S): True for visual tokens that stay.
    attention_mask : Tensor, (B, S), or None: 0 for padding.
    prune_ratio : share of a sample's visual tokens that a decode step does not attend to; 0 keeps
        one row order for all layers.

    Returns
    -------
    Arrangement
        Samples are right-aligned; leading padding beyond what the longest sample needs is gone.
    """
    device = keep.device
    stays = keep
    if attention_mask is not None:
        stays = keep & (attention_mask.to(device).cumsum(1) > 0)
    # One wait for the device: the sizes below are needed as Python numbers.
    lengths, kept = torch.stack([stays.sum(1), visual.sum(1)]).tolist()
    longest, most = max(lengths), max(kept)
    source = stays.byte().sort(dim=1, stable=True).indices[:, -longest:]
    real = stays.gather(1, source)
    plain = RowMap(
        index=torch.where(real, source, -1),
        padded=min(lengths) < longest,
        first=[0] * len(lengths),
    )

    shown = visual.gather(1, source) & real
    valid, rows = shown.byte().sort(dim=1, descending=True, stable=True)
    valid, rows = valid[:, :most].bool(), rows[:, :most]
    rows = torch.where(valid, rows, 0)
    pruned, slots, active = plain, rows, valid
    counts = [retained_count(n, prune_ratio) for n in kept]
    if prune_ratio > 0:
        # The first decode step selects; until then the last tokens stand in for the active set.
        place = torch.arange(most, device=device).expand_as(rows)
        bank = torch.tensor([n - m for n, m in zip(kept, counts, strict=True)], device=device)
        active = valid & (place >= bank[:, None])
        kind = torch.where(real, torch.where(shown, 1, 3), 0)
        # Padding of `rows` points at row 0: add there nothing, and 1 where a token is active.
        kind.scatter_add_(1, rows, active.long())
        order = kind.sort(dim=1, stable=True).indices
        first = [longest - n + k - m for n, k, m in zip(lengths, kept, counts, strict=True)]
        pruned = RowMap(plain.index.gather(1, order), plain.padded, first, order)
        slots = torch.where(valid, order.argsort(dim=1).gather(1, rows), 0)

    zeros = torch.zeros(len(kept), dtype=torch.long, device=device)
    return Arrangement(
        source=source,
        dropped=(~keep).cumsum(1),
        plain=plain,
        pruned=pruned,
        visual=Visual(
            rows=rows,
            slots=slots,
            valid=valid,
            counts=torch.tensor(counts, device=device),
            active=active,
            refreshes=zeros,
            recalled=zeros.clone(),
        ),
        kept=kept,
    )
