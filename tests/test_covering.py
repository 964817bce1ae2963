"""`make test` leaves cases out, but no pair of values."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import covering
import pytest
import tiny


def axes(*sizes: int) -> list[Any]:
    values = [[(f"axis {i}", n) for n in range(size)] for i, size in enumerate(sizes)]
    return list(product(*values))


@pytest.mark.parametrize(
    "sizes", [(1,), (4,), (3, 5), (15, 3, 2), (15, 3, 3, 3), (6, 3, 3, 2), (2,) * 6]
)
def test_every_pair_of_values_meets(sizes: tuple[int, ...]) -> None:
    """In few cases more than the two longest axes make necessary."""
    cases = axes(*sizes)
    chosen = [cases[i] for i in covering.Design().choose(cases)]
    for i, j in combinations(range(len(sizes)), 2):
        met = {(case[i][1], case[j][1]) for case in chosen}
        assert met == set(product(range(sizes[i]), range(sizes[j])))
    assert {case[-1][1] for case in chosen} == set(range(sizes[-1]))
    first, second = sorted((1, *sizes))[-2:]
    assert len(chosen) <= first * second + 6
    assert len(sizes) < 3 or len(chosen) < len(cases)


def test_where_pairs_are_not_asked_for_every_value_is_taken() -> None:
    cases = axes(15, 3, 2)
    chosen = [cases[i] for i in covering.Design(strength=1).choose(cases)]
    assert len(chosen) == 15
    assert {value for case in chosen for value in case} == {v for case in cases for v in case}


def test_what_never_meets_is_not_asked_for() -> None:
    """A product with holes."""
    cases = [case for case in axes(3, 3, 3) if case[0][1] <= case[1][1] != case[2][1]]
    chosen = [cases[i] for i in covering.Design().choose(cases)]
    wanted, met = (set().union(*map(covering.pairs_of, c)) for c in (cases, chosen))
    assert met == wanted and len(chosen) < len(cases)


def test_families_alike_take_turns() -> None:
    families = [("family", name) for name in ("internvl", "gemma4", "smolvlm")]
    made = covering.Design()
    cases = [(family, ("axis", 0)) for family in families]
    taken = [[families[i][1] for i in made.choose(cases)] for _ in range(3)]
    assert taken == [["internvl", "gemma4"], ["smolvlm", "gemma4"], ["internvl", "gemma4"]]


def test_alone_half_of_the_families_are_run_and_then_the_other_half() -> None:
    families = [(("family", name),) for name in sorted(tiny.FAMILIES)]
    made = covering.Design()
    taken = [{covering.kind_of(families[i][0]) for i in made.choose(families)} for _ in range(2)]
    kinds = {covering.kind_of(family) for (family,) in families}
    assert taken[0] | taken[1] == kinds
    assert len(taken[0]) == len(taken[1]) == (len(kinds) + 1) // 2


def test_families_alike_are_known() -> None:
    assert set(covering.ALIKE) | set(covering.ALIKE.values()) <= set(tiny.FAMILIES)
    assert not set(covering.ALIKE) & set(covering.ALIKE.values())


def test_this_very_run_covers_every_pair(request: pytest.FixtureRequest) -> None:
    """Of kinds in every test function, of shared values in the suite: of all that was collected."""
    everything, chosen = request.config.stash[covering.COLLECTED]
    strength = 1 if request.config.getoption("--light") else 2
    run = covering.functions(chosen)
    met, values = set(), set()
    for function, items in covering.functions(everything).items():
        cases = [covering.case_of(item) for item in items]
        kept = [covering.case_of(item) for item in run[function]]
        if not all(cases):
            assert len(kept) == len(cases)
            continue
        for case in kept:
            met |= covering.pairs_of(case)
            values |= {frozenset([value]) for value in case}
        kinds = [
            set().union(*(covering.pairs_of(map(covering.kind_of, x), strength) for x in some))
            for some in (cases, kept)
        ]
        if {axis for case in cases for axis, _ in case} == {"family"}:
            assert len(kinds[1]) == (len(kinds[0]) + 1) // 2, function
        else:
            assert kinds[0] == kinds[1], function
    wanted = covering.wanted_of(everything)
    assert wanted <= met | values
    families = {frozenset([("family", name)]) for name in tiny.FAMILIES}
    assert families <= wanted or len(run) < 100  # of a few files, those that they name


@pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("c", ["x", "y"])
def test_values_given_together_are_one(
    request: pytest.FixtureRequest, a: int, b: int, c: str
) -> None:
    assert covering.case_of(request.node) == (("c", c), ("a,b", repr([a, b])))
