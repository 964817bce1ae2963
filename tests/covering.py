"""Which cases of the parametrised tests `make test` runs: a covering design of strength two.

Most tests are a product: family x backend x ratios x kind of batch. Faults of such a product show
nearly always in a pair of values (a family with a backend, a backend with a kind of batch), seldom
only in three at once. So a few cases are chosen, with two promises:

- in each test function every pair of kinds of values meets that meets in its product; values are
  a kind each, but for families that are `ALIKE`, which take turns; where the family is the only
  axis, all kinds take turns, half of them in each function;
- in the suite every value is run, and every pair of values that meets in the products of several
  test functions, families alike included.

`--all` runs the whole product. `--light`, for the oldest releases, is content with every kind of
value in each test function; the second promise stays, so that what a release calls otherwise is
met by every family, backend and kind of batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import combinations

import pytest

# Families that take turns, each with the one that stands for them: prompts, positions and layers
# of one kind (tests/tiny.py). What differs inside a kind, its own layout, is tested by name.
ALIKE = {
    "llava_next_video": "llava_onevision",  # 1-D positions, full attention
    "qwen2_vl": "qwen2_5_vl",  # 3-D positions
    "glm4v": "qwen2_5_vl",
    "glm46v": "qwen2_5_vl",
    "glm4v_moe": "qwen2_5_vl",
    "qwen3_vl_moe": "qwen3_vl",  # deepstack
    "qwen3_5_moe": "qwen3_5",  # linear attention
    "smolvlm": "internvl",  # frames given as images
}
# Of a run: what was collected, and what of it is run.
COLLECTED = pytest.StashKey[tuple[list[pytest.Item], list[pytest.Item]]]()

Value = tuple[str, Hashable]  # of an axis: the names of its parameters, and what they are
Case = tuple[Value, ...]
Pair = frozenset[Value]


def kind_of(value: Value) -> Value:
    """The value itself, or the one that it is like."""
    axis, chosen = value
    return (axis, ALIKE.get(str(chosen), chosen)) if axis == "family" else value


def pairs_of(case: Iterable[Value], strength: int = 2) -> set[Pair]:
    """The pairs of values that meet in a case; where there is one axis, the value alone.

    With a ``strength`` of 1: the values.
    """
    case = tuple(case)
    return {frozenset(pair) for pair in combinations(case, min(strength, len(case)))}


class Design:
    """Cases chosen so far, for one test function after another.

    Greedy and deterministic: the case with the most pairs of kinds that are new to its function,
    of equals that with the most pairs of values new to the suite, then that whose values were
    taken least, then the first. ``strength``: 1 where kinds need not meet in pairs.
    """

    def __init__(self, strength: int = 2) -> None:
        self.strength = strength
        self.met: set[Pair] = set()
        self.taken: Counter[Value] = Counter()
        self.turns: Counter[Pair] = Counter()

    def choose(self, cases: Sequence[Case], wanted: Collection[Pair] | None = None) -> list[int]:
        """Indices of cases in which all pairs of kinds meet, or the pairs ``wanted`` of values."""
        if wanted is None:
            new = [pairs_of(map(kind_of, case), self.strength) for case in cases]
            missing = set().union(*new)
            if all(len(case) == 1 and case[0][0] == "family" for case in cases):
                missing = self._turns(missing)
                new = [pairs & missing for pairs in new]
        else:
            missing = set(wanted)
            new = [(pairs_of(case) | set(map(frozenset, zip(case)))) & missing for case in cases]
        left, chosen = [i for i in range(len(cases)) if new[i]], []
        while missing:
            best = max(left, key=lambda i: self._worth(cases[i], new[i] & missing, i))
            left.remove(best)
            chosen.append(best)
            missing -= new[best]
            self.met |= pairs_of(cases[best]) | set(map(frozenset, zip(cases[best])))
            self.taken.update(cases[best])
        return chosen

    def _turns(self, kinds: set[Pair]) -> set[Pair]:
        """The half of these kinds of families that was taken least."""
        ranked = sorted(kinds, key=lambda kind: (self.turns[kind], sorted(kind)))
        chosen = set(ranked[: (len(ranked) + 1) // 2])
        self.turns.update(chosen)
        return chosen

    def _worth(self, case: Case, new: set[Pair], place: int) -> tuple[int, int, int, int]:
        unmet = len(pairs_of(case) - self.met)
        return len(new), unmet, -sum(self.taken[value] for value in case), -place


def case_of(item: pytest.Item) -> Case:
    """The values of a test item, one for each `parametrize`: those given together are one value."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    case: list[Value] = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        names = [name.strip() for name in names]
        given = [values[name] for name in names]
        only = given[0] if len(given) == 1 and isinstance(given[0], str) else repr(given)
        case.append((",".join(names), only))
    return tuple(case)


def functions(items: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Test items by their test function."""
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.partition("[")[0]].append(item)
    return groups


def design(items: Sequence[pytest.Item], light: bool = False) -> list[pytest.Item]:
    """The items that are run."""
    made, chosen = Design(1 if light else 2), []
    for group in functions(items).values():
        cases = [case_of(item) for item in group]
        chosen += [group[i] for i in made.choose(cases)] if all(cases) else group
    product = [item for item in items if case_of(item)]
    cases = [case_of(item) for item in product]
    chosen += [product[i] for i in made.choose(cases, wanted_of(items) - made.met)]
    return chosen


def wanted_of(items: Sequence[pytest.Item]) -> set[Pair]:
    """What the suite promises: pairs that meet in several test functions, and each value."""
    meets: Counter[Pair] = Counter()
    values: set[Pair] = set()
    for group in functions(items).values():
        cases = [case for case in map(case_of, group) if case]
        meets.update(set().union(*map(pairs_of, cases)))
        values |= {frozenset([value]) for case in cases for value in case}
    return {pair for pair, count in meets.items() if count > 1} | values
