"""Accuracy against retention: every method at the same shares of the visual tokens, twice.

At equal *kept* tokens methods hold and prefill as many; at equal *attended* tokens a decode step
reads as many. A one-shot method keeps what it attends to, and is the same in both; a method with a
dynamic cache keeps more than it attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dycoke import methods
from dycoke.errors import check_retention
from dycoke.evaluate.stats import Count, paired_difference
from dycoke.evaluate.storyqa import TASKS, Scores, Setting, accuracy
from dycoke.methods.dycoke import DyCoke
from dycoke.nano.build import TOKENS_PER_FRAME

RETENTIONS = (0.5, 0.25, 0.15, 0.1, 0.05)
BASES = ("kept", "attended")
USUAL = [name for name in methods.METHODS if name != "always"]
# A share may be missed by a token per frame, by rounding.
ROUNDING = 1 / TOKENS_PER_FRAME + 1e-9


@dataclass(frozen=True)
class Point:
    """One method at one share of the tokens.

    Attributes
    ----------
    method : its name; ``"visionzip + dycoke"`` for one composed with a dynamic cache.
    retention : the share that it should keep.
    bases : what the share is of, "kept" or "attended" tokens; both for a one-shot method.
    setting : what runs.
    """

    method: str
    retention: float
    bases: tuple[str, ...]
    setting: Setting


def points(names: Sequence[str], retentions: Sequence[float] = RETENTIONS) -> list[Point]:
    """What to run for these methods.

    Parameters
    ----------
    names : of `dycoke.methods.create`; two joined by "+" are shown at equal kept tokens.
    retentions : shares in (0, 1].

    Raises
    ------
    ValueError
        For unknown names and shares out of range.
    """
    for share in retentions:
        check_retention("retention", share)
    found = [Point("full", 1.0, BASES, Setting("full", "full", None))]
    for name in names:
        if name != "full":
            found += [point for share in retentions for point in _points(name, share)]
    # The same settings may answer for two shares: what keeps 50 % may attend to 15 %.
    known: dict[Any, Setting] = {}
    return [replace(p, setting=known.setdefault(p.setting.compressor, p.setting)) for p in found]


def _points(name: str, share: float) -> list[Point]:
    if name not in methods.METHODS and "+" in name[:-1]:
        return [_point(name, share, ("kept",), methods.create(name, retention=share))]
    if name not in methods.DYNAMIC:
        return [_point(name, share, BASES, methods.one_shot(name, retention=share))]
    kept = methods.create(name, retention=share)
    assert isinstance(kept, DyCoke)
    # docs/methods.md: up to a share of .3 the tokens that are kept shrink, above it all are kept.
    left = round(1 - kept.prune_ratio, 12)
    attended = (
        replace(kept, token_budget=round(share / left, 12))
        if share <= left
        else replace(kept, token_budget=None, merge_ratio=0, prune_ratio=round(1 - share, 12))
    )
    return [_point(name, share, ("kept",), kept), _point(name, share, ("attended",), attended)]


def _point(name: str, share: float, bases: tuple[str, ...], compressor: Any) -> Point:
    of = "" if bases == BASES else f" {bases[0]}"
    return Point(name, share, bases, Setting(f"{name} {share:.4g}{of}", name, compressor))


def point_results(
    points: Sequence[Point], scores: dict[str, Scores], rival: str = "dycoke"
) -> list[dict[str, Any]]:
    """One dictionary per point, ready for JSON.

    ``to_full`` and, per basis, ``to_rival`` are paired differences with story-clustered bootstrap
    intervals, the latter to the method ``rival`` at the same share. ``reached`` is False where a
    method cannot keep as few tokens as ``target_retention`` says.
    """
    rivals = {
        (basis, point.retention): scores[point.setting.name]
        for point in points
        for basis in point.bases
        if point.method == rival
    }
    rows = []
    for point in points:
        mine = scores[point.setting.name]
        kept, attended = mine.kept / mine.visual, mine.active / mine.visual
        shares = {"kept": kept, "attended": attended}
        row: dict[str, Any] = {
            "method": point.method,
            "target_retention": point.retention,
            "bases": list(point.bases),
            "settings": point.setting.settings,
            "retention": kept,
            "final_retention": attended,
            "reached": all(shares[b] <= point.retention + ROUNDING for b in point.bases[:1]),
        }
        for task in TASKS:
            counts: list[Count] = getattr(mine, task)
            row[task] = accuracy(mine, task, None if point.method == "full" else scores.get("full"))
            against = {
                basis: paired_difference(counts, getattr(rivals[basis, point.retention], task))
                for basis in point.bases
                if (basis, point.retention) in rivals and point.method != rival
            }
            if against:
                row[task]["to_rival"] = against
        rows.append(row)
    return rows
