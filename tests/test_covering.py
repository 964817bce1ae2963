"""`make test` leaves cases out, but no pair of values."""

from __future__ import annotations

from itertools import combinations, product

import covering
import pytest


@pytest.mark.parametrize(
    "sizes", [(1,), (4,), (3, 5), (15, 3, 2), (15, 3, 3, 3), (6, 3, 3, 2), (2,) * 6]
)
def test_every_pair_of_values_meets(sizes: tuple[int, ...]) -> None:
    """And few cases more than the two longest axes make necessary."""
    cases = list(product(*map(range, sizes)))
    chosen = [cases[i] for i in covering.covering(cases)]
    for i, j in combinations(range(len(sizes)), 2):
        assert {(c[i], c[j]) for c in chosen} == set(product(range(sizes[i]), range(sizes[j])))
    for i, size in enumerate(sizes):
        assert {case[i] for case in chosen} == set(range(size))
    least = 1
    for size in sorted(sizes)[-2:]:
        least *= size
    assert len(chosen) <= least + 6 and (len(sizes) < 3 or len(chosen) < len(cases))


def test_what_never_meets_is_not_asked_for() -> None:
    """A product with holes: the first value of one axis goes with one of the other only."""
    cases = [("a", 1, "x"), ("b", 1, "x"), ("b", 2, "x"), ("b", 2, "y"), ("b", 1, "y")]
    chosen = [cases[i] for i in covering.covering(cases)]
    pairs = set().union(*map(covering.pairs_of, cases))
    assert set().union(*map(covering.pairs_of, chosen)) == pairs


def test_this_very_run_covers_every_pair(request: pytest.FixtureRequest) -> None:
    """Of every test function that was collected: nothing that meets in the product is left out."""
    everything, chosen = request.config.stash[covering.COLLECTED]
    run = covering.functions(chosen)
    for function, items in covering.functions(everything).items():
        cases = [covering.case_of(item) for item in items]
        kept = [covering.case_of(item) for item in run[function]]
        if not all(cases):
            assert len(kept) == len(cases)
            continue
        wanted, met = (set().union(*map(covering.pairs_of, c)) for c in (cases, kept))
        assert met == wanted, function


@pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("c", ["x", "y"])
def test_values_given_together_are_one(
    request: pytest.FixtureRequest, a: int, b: int, c: str
) -> None:
    assert covering.case_of(request.node) == ((repr(c),), (repr(a), repr(b)))
