"""The methods by name: DyCoke, the full model beside it, and others through the same doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dycoke.compressor import Compressor, DyCoke
from dycoke.errors import check_ratio, check_retention
from dycoke.methods.composed import Composed
from dycoke.methods.controls import FewerFrames, RandomTokens
from dycoke.methods.fastv import FastV
from dycoke.methods.fastvid import FastVID
from dycoke.methods.flashvid import FlashVID
from dycoke.methods.holitom import HoliTom
from dycoke.methods.prumerge import LLaVAPruMerge
from dycoke.methods.vidcom2 import VidCom2
from dycoke.methods.visionzip import VisionZip


@dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes
    ----------
    name : what commands call it.
    about : what it does, in a line.
    make : ``make()`` gives the method in its own default setting, ``make(ratio)`` the one that
        removes that share of the visual tokens. None stands for the full model.
    """

    name: str
    about: str
    make: Callable[..., Compressor | None]

    @property
    def doors(self) -> list[str]:
        """Where it works: "before" the LLM (by "vision" scores), "inside" it, "decoding"."""
        method = self.make()
        if method is None:
            return []
        kind = type(method)
        found = {
            "before": kind.merge_tokens is not Compressor.merge_tokens,
            "vision": method.needs_vision,
            "inside": method.drop_layer(28) is not None,
            "decoding": method.prune_ratio > 0,
        }
        return [name for name, there in found.items() if there]


def _full(ratio: float = 0.0) -> None:
    """No compressor, whatever the others are asked to remove."""


def _merging(method: type[DyCoke], **settings: Any) -> Callable[..., Compressor]:
    """The factory of a method that counts as DyCoke does: a share to remove is a token budget."""

    def make(ratio: float | None = None) -> Compressor:
        if ratio is None:
            return method(**settings)
        budget = round(1.0 - check_ratio("ratio", ratio), 12)  # 0.15, not 0.15000000000000002
        return method(**settings, token_budget=budget)

    return make


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "the model as it is, nothing removed", _full),
        Method("dycoke", "merging over time, dynamic pruning while decoding", _merging(DyCoke)),
        Method("random", "control: DyCoke's counts, any tokens", _merging(RandomTokens)),
        Method(
            "fewer-frames",
            "control: whole frames, not above DyCoke's counts",
            _merging(FewerFrames),
        ),
        Method(
            "merging",
            "control: DyCoke's merging alone, nothing pruned while decoding",
            _merging(DyCoke, prune_ratio=0.0),
        ),
        Method(
            "once",
            "control: DyCoke that selects once, nothing comes back",
            _merging(DyCoke, refresh_threshold=0),
        ),
        Method(
            "always",
            "control: DyCoke that selects anew in every step",
            _merging(DyCoke, refresh_threshold=1),
        ),
        Method("fastv", "after an early layer, what the prompt's end attends to", FastV),
        Method(
            "prumerge",
            "what the vision encoder attends to, with its neighbours (adapted to video)",
            LLaVAPruMerge,
        ),
        Method(
            "visionzip",
            "what the vision encoder attends to, and means of the others",
            VisionZip,
        ),
        Method("vidcom2", "what is least like the means of its video and frame", VidCom2),
        Method("fastvid", "salient tokens and density peaks of segments", FastVID),
        Method("holitom", "still tokens merge over time, half more inside", HoliTom),
        Method("flashvid", "diverse tokens and trees over time, more inside", FlashVID),
    )
}


# Methods whose decode steps attend to a selection.
DYNAMIC = ("dycoke", "once", "always")


def create(name: str, ratio: float | None = None) -> Compressor | None:
    """A method by its name.

    Parameters
    ----------
    name : a key of `METHODS`; or two joined by "+", such as "visionzip+dycoke": a one-shot method
        before the LLM, and the dynamic cache of another one while decoding.
    ratio : share of the visual tokens to remove before the LLM, in [0, 1); None for the method's
        own default setting.

    Raises
    ------
    ValueError
        For an unknown name, with those there are, and for a ratio out of the method's reach.
    """
    before, plus, after = (part.strip() for part in name.partition("+"))
    if plus:
        first, cache = one_shot(before, ratio), create(after)
        if first is None:
            raise ValueError(f"{name}: nothing is composed with the full model")
        if not isinstance(cache, DyCoke) or after not in DYNAMIC:
            raise ValueError(
                f"{name}: {after!r} has no dynamic cache; {', '.join(DYNAMIC)} have one"
            )
        return Composed(first, replace(cache, merge_ratio=0))
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    make = METHODS[name].make
    try:
        return make() if ratio is None else make(ratio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def at_retention(name: str, retention: float | None = None) -> Compressor | None:
    """A method by its name, as `create`, that keeps the share ``retention``, in (0, 1].

    Commands and settings say what stays; the constructors of the methods take ``ratio``, what
    leaves.
    """
    return create(name, None if retention is None else removed(retention))


def removed(retention: float) -> float:
    """The share that leaves where ``retention`` stays: 0.85 of 0.15, not 0.85 and a bit."""
    return round(1.0 - check_retention("retention", retention), 12)


def one_shot(name: str, ratio: float | None = None) -> Compressor | None:
    """A method by its name, of which every step attends to all that it keeps."""
    method = create(name, ratio)
    # The controls come with DyCoke's cache, where nothing else is asked of them.
    return replace(method, prune_ratio=0.0) if isinstance(method, DyCoke) else method


__all__ = [
    "DYNAMIC",
    "METHODS",
    "Composed",
    "DyCoke",
    "FastV",
    "FastVID",
    "FewerFrames",
    "FlashVID",
    "HoliTom",
    "LLaVAPruMerge",
    "Method",
    "RandomTokens",
    "VidCom2",
    "VisionZip",
    "at_retention",
    "create",
    "one_shot",
    "removed",
]
