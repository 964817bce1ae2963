"""Which cases of a parametrised test `make test` runs: a covering design of strength two.

Most tests are a product: family x backend x ratios x kind of batch. Faults of such a product show
nearly always in a pair of values (a family with a backend, a backend with a kind of batch), seldom
only in three at once. So a few cases are chosen in which every pair of values meets at least once,
for each test function by itself; `--all` runs the whole product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest

# Of a run: what was collected, and what of it is run.
COLLECTED = pytest.StashKey[tuple[list[pytest.Item], list[pytest.Item]]]()

Case = tuple[Hashable, ...]  # a value per axis
Pair = tuple[int, Hashable, int, Hashable]  # axis, value, axis, value


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of values that meet in a case; the values themselves, where there is one axis."""
    if len(case) == 1:
        return {(0, case[0], 0, case[0])}
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def covering(cases: Sequence[Case]) -> list[int]:
    """Indices of cases in which every pair meets that meets in any of them.

    Greedy and deterministic: the case with the most new pairs, the first of equals.
    """
    left = [pairs_of(case) for case in cases]
    missing = set().union(*left)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(left[i] & missing), -i))
        chosen.append(best)
        missing -= left[best]
    return sorted(chosen)


def case_of(item: pytest.Item) -> Case:
    """The values of a test item, one for each `parametrize`: those given together are one value."""
    case: list[Hashable] = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        values = item.callspec.params  # type: ignore[attr-defined]
        case.append(tuple(repr(values[name.strip()]) for name in names))
    return tuple(case)


def functions(items: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Test items by their test function."""
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.partition("[")[0]].append(item)
    return groups


def design(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items that are run: of each test function a covering design."""
    chosen = []
    for group in functions(items).values():
        cases = [case_of(item) for item in group]
        chosen += [group[i] for i in covering(cases)] if all(cases) else group
    return chosen
