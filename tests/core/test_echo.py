"""The pure parts of echoes against plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import close, exact

from dycoke.core import echo
from dycoke.core.echo import Echoes, Visible, neighbours

pytestmark = exact


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (7, 4), (13, 6)])
def test_neighbours(shape: tuple[int, int], share: float, seed: int) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    before, after, weight = neighbours(keep)
    for f, n in itertools.product(*map(range, shape)):
        stay = [g for g in range(shape[0]) if keep[g, n]]
        earlier, later = [g for g in stay if g <= f], [g for g in stay if g >= f]
        found = (int(before[f, n]), int(after[f, n]), float(weight[f, n]))
        if not stay:
            assert found == (-1, -1, 0)
        elif not earlier:
            assert found == (later[0], later[0], 0)
        elif not later:
            assert found == (earlier[-1], earlier[-1], 0)
        else:
            a, b = earlier[-1], later[0]
            assert found[:2] == (a, b)
            assert found[2] == pytest.approx((f - a) / max(b - a, 1))


def ranges(g: torch.Generator, shape: tuple[int, ...], most: int) -> torch.Tensor:
    """Ascending begins and ends, some of them empty."""
    ends = torch.randint(0, most + 1, shape, generator=g).sort(-1).values
    return torch.stack([(ends - torch.randint(0, 6, shape, generator=g)).clamp(min=0), ends])


@pytest.mark.parametrize("block", [1, 4, 7, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kept_masks", [0, 1 << 22])
@pytest.mark.parametrize("sharing", [("cpu",), ()])
def test_attention_in_blocks_is_attention(
    block: int, groups: int, kept_masks: int, sharing: tuple[str, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(echo, "SHARING", sharing)
    monkeypatch.setattr(echo, "BLOCK", block)
    monkeypatch.setattr(echo, "KEPT_MASKS", kept_masks)
    g = torch.Generator().manual_seed(block + groups)
    batch, heads, queries, count, others, width = 2, 4, 23, 23, 11, 6

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    rows = ranges(g, (batch, queries), count)
    rows[0, :, :], rows[1] = 0, torch.arange(1, queries + 1)  # each sees itself
    echoes = ranges(g, (batch, queries), others)
    query = some(batch, heads, queries, width)
    of_rows = some(batch, groups, count, width), some(batch, groups, count, width)
    of_echoes = some(batch, groups, others, width), some(batch, groups, others, width)
    visible = Visible.of(rows, echoes)
    for _ in range(2):  # the second time with masks that were kept
        made = visible.attend(query, of_rows, of_echoes, 0.3)
        for b, h, q in itertools.product(range(batch), range(heads), range(queries)):
            group = h * groups // heads
            seen = [(0, i) for i in range(rows[0, b, q], rows[1, b, q])]
            seen += [(1, i) for i in range(echoes[0, b, q], echoes[1, b, q])]
            parts = of_rows, of_echoes
            keys = torch.stack([parts[which][0][b, group, i] for which, i in seen])
            values = torch.stack([parts[which][1][b, group, i] for which, i in seen])
            close(made[b, q, h], (0.3 * keys @ query[b, h, q]).softmax(0) @ values)
    assert bool(visible.masks) == bool(kept_masks)


def test_echoes_rise_with_their_neighbours() -> None:
    g = torch.Generator().manual_seed(0)
    rows, states = torch.randn(2, 5, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    before, after = (torch.randint(0, 5, (2, 4), generator=g) for _ in range(2))
    weight = torch.rand(2, 4, generator=g)
    nothing = Visible.of(torch.zeros(2, 2, 5).long(), torch.zeros(2, 2, 5).long())
    held = Echoes(states, rows, torch.zeros(2, 4), before, after, weight, nothing, nothing)
    held.rise(rows)
    assert held.states is states
    higher = rows + torch.randn(2, 5, 3, generator=g)
    held.rise(higher)
    for b, e in itertools.product(range(2), range(4)):
        one, two = (higher[b, int(i[b, e])] - rows[b, int(i[b, e])] for i in (before, after))
        share = float(weight[b, e])
        close(held.states[b, e], states[b, e] + (1 - share) * one + share * two)
    assert held.entered is higher
