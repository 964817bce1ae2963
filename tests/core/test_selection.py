"""Stage 2's pure parts: the top tokens, the refresh rule, and pairs to exchange."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke.core.selection import needs_refresh, swap_pairs, top_mask

seeds = st.integers(0, 500)


@given(st.integers(1, 4), st.integers(1, 20), seeds)
def test_top_mask_takes_the_best_and_breaks_ties_low(batch, tokens, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (batch, tokens), generator=g).float()  # many ties
    counts = torch.randint(0, tokens + 1, (batch,), generator=g)
    chosen = top_mask(scores, counts)
    for row, count, mask in zip(scores.tolist(), counts.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(tokens), key=lambda v: (-row[v], v))[:count]
        assert [v for v in range(tokens) if mask[v]] == sorted(best)


def test_padding_is_never_chosen() -> None:
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    assert top_mask(scores, torch.tensor([2, 1])).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


def test_refresh_rule() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.8]])
    assert needs_refresh(after, None, 0.9).tolist() == [True, True, True]
    assert needs_refresh(after, before, 0.9).tolist() == [False, True, False]
    assert needs_refresh(after, before, 0.0).tolist() == [False, False, False]
    assert needs_refresh(after, before, 1.0).tolist()[1:] == [True, True]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), seeds)
def test_pairs_exchange_exactly_what_changed(batch, tokens, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, tokens + 1, (batch,), generator=g)
    active = top_mask(torch.rand(batch, tokens, generator=g), counts)
    chosen = top_mask(torch.rand(batch, tokens, generator=g), counts)
    if bool(torch.randint(0, 2, (1,), generator=g)):
        chosen[0] = active[0]  # a sample in which nothing changes
    pairs = swap_pairs(active, chosen)
    if pairs is None:
        assert torch.equal(active, chosen)
        return
    for b in range(batch):
        leaving, entering = (x[pairs[0] == b].tolist() for x in pairs[1:])
        assert leaving == (active[b] & ~chosen[b]).nonzero()[:, 0].tolist()
        assert entering == (chosen[b] & ~active[b]).nonzero()[:, 0].tolist()
