"""The arrangement of rows, against plain lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke.core.prefill import arrange


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(2, 14), st.sampled_from([0.0, 0.3, 0.7]), st.integers(0, 300))
def test_arrangement_equals_plain_lists(batch, length, prune, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    pads = torch.randint(0, length - 1, (batch,), generator=g)
    pads[int(torch.randint(0, batch, (1,), generator=g))] = 0
    mask = torch.arange(length) >= pads[:, None]
    video = (torch.rand(batch, length, generator=g) < 0.6) & mask
    video[:, -1] = False
    keep = ~(video & (torch.rand(batch, length, generator=g) < 0.5))
    got = arrange(keep, video & keep, mask, prune)

    rows = [[i for i in range(length) if mask[b, i] and keep[b, i]] for b in range(batch)]
    longest = max(map(len, rows))
    for b, mine in enumerate(rows):
        padding = [-1] * (longest - len(mine))
        assert got.lower.index[b].tolist() == padding + mine
        assert got.source[b, len(padding) :].tolist() == mine
        visual = [i for i in mine if video[b, i]]
        text = [i for i in mine if not video[b, i]]
        count = int((1 - prune) * len(visual) + 1e-6)
        state = got.visual
        assert int(state.valid[b].sum()) == len(visual)
        assert int(state.counts[b]) == count == int(state.active[b].sum())
        assert state.valid[b].tolist() == [v < len(visual) for v in range(state.valid.shape[1])]
        for v, prompt in enumerate(visual):
            assert got.lower.index[b, got.lower_rows[b, v]] == prompt
            assert got.upper.index[b, got.upper_rows[b, v]] == prompt
            assert bool(state.active[b, v]) == (v >= len(visual) - count)
        if prune:
            order = padding + visual + text
            assert got.upper.index[b].tolist() == order
            assert got.upper.first[b] == len(padding) + len(visual) - count
        else:
            assert got.upper is got.lower
        assert got.dropped[b].tolist() == (~keep[b]).cumsum(0).tolist()
    assert got.lower.padded == (min(map(len, rows)) < longest)


def test_key_masks() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    video = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    rows = arrange(torch.ones(2, 6, dtype=torch.bool), video, mask, 0.5)
    # [bank 1 2 | active 3 4 | text 0 5] and [pad | bank 1 | active 2 | text 3 4 5]
    assert rows.upper.first.tolist() == [2, 2]
    longer = torch.cat([mask, torch.tensor([[1], [1]])], 1)
    seen = rows.upper.key_mask(longer, 7, mask.device, decode=True)
    assert seen.tolist() == [[True] * 5, [True] * 5]
    # Equal starts and no mask: nothing to hide in the view of a decode step, a pad in the whole.
    assert rows.upper.key_mask(None, 7, mask.device, decode=True) is None
    whole = rows.upper.key_mask(None, 7, mask.device, decode=False)
    assert whole.tolist() == [[True] * 7, [False] + [True] * 6]
    # A masked-out prompt token stays masked wherever its row went.
    longer[0, 0] = 0
    seen = rows.upper.key_mask(longer, 7, mask.device, decode=True)
    assert seen[0].tolist() == [True, True, False, True, True]
