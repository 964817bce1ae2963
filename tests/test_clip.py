"""How a budget is shared over videos."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke.merging import share_budget


@given(st.integers(0, 5000), st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_shares_are_exact_and_within_one_of_fair(budget: int, tokens: list[int]) -> None:
    counts = share_budget(budget, tokens)
    assert sum(counts) == min(budget, sum(tokens))
    for count, n in zip(counts, tokens, strict=True):
        fair = Fraction(min(budget, sum(tokens)) * n, sum(tokens))
        assert abs(count - fair) < 1 and count <= n


@pytest.mark.parametrize(
    ("budget", "tokens", "counts"),
    [(10, [100, 100, 100], [4, 3, 3]), (7, [10, 20], [2, 5]), (99, [3, 4], [3, 4]), (0, [5], [0])],
)
def test_the_largest_remainder_gets_what_is_left(
    budget: int, tokens: list[int], counts: list[int]
) -> None:
    assert share_budget(budget, tokens) == counts
