"""The methods by name: DyCoke, the full model beside it, controls, and methods of other papers.

To add one, in three steps:

1. In a file of its own here, write a frozen dataclass on the base in `dycoke.methods.base` that
   fits: `ScoreBased` (a score per token), `Reducer` (which tokens stay, and what becomes of the
   others), `OneShot` (tokens leave inside the LLM alone), `TwoStage` (before the LLM and inside
   it). The file's docstring names the paper and the source.
2. Add an `Entry` below: the commands, the benchmarks and the tests over all methods find it there.
3. Write its formula once more as plain loops in ``tests/methods``, and compare.

In your own project step 2 is ``register(Entry(...))``; ``examples/new_method.py`` is all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dycoke.compressor import Compressor
from dycoke.core.method import VideoContext
from dycoke.methods.base import OneShot, Reducer, ScoreBased, TwoStage
from dycoke.methods.composed import Composed
from dycoke.methods.controls import Downsampled, FewerFrames, RandomTokens
from dycoke.methods.dycoke import ECHO, PLUS, DyCoke
from dycoke.methods.evs import EVS
from dycoke.methods.fastv import FastV
from dycoke.methods.fastvid import FastVID
from dycoke.methods.flashvid import FlashVID
from dycoke.methods.holitom import HoliTom
from dycoke.methods.prumerge import LLaVAPruMerge
from dycoke.methods.registry import METHODS, Entry, from_dict, register, to_dict
from dycoke.methods.vcast import VCast
from dycoke.methods.vidcom2 import VidCom2
from dycoke.methods.visionzip import VisionZip

for _entry in (
    Entry("full", "the model as it is, nothing removed", None),
    Entry(
        "dycoke",
        "merging over time, dynamic pruning while decoding",
        DyCoke,
        paper="https://arxiv.org/abs/2411.15024",
        source="https://github.com/KD-TAO/DyCoke",
    ),
    Entry(
        "dycoke+",
        "DyCoke, with echoes of what was merged and a later layer that scores (not the paper's)",
        DyCoke,
        PLUS,
    ),
    Entry("random", "control: DyCoke's counts, any tokens", RandomTokens),
    Entry("fewer-frames", "control: whole frames, not above DyCoke's counts", FewerFrames),
    Entry("downsampled", "control: as many tokens by a lower resolution", Downsampled),
    Entry(
        "merging",
        "control: DyCoke's merging alone, nothing pruned while decoding",
        DyCoke,
        {"prune_ratio": 0.0},
    ),
    Entry(
        "once",
        "control: DyCoke that selects once, nothing comes back",
        DyCoke,
        {"refresh_threshold": 0.0},
    ),
    Entry(
        "always",
        "control: DyCoke that selects anew in every step",
        DyCoke,
        {"refresh_threshold": 1.0},
    ),
    Entry(
        "fastv",
        "after an early layer, what the prompt's end attends to",
        FastV,
        paper="https://arxiv.org/abs/2403.06764",
        source="https://github.com/pkunlp-icler/FastV",
    ),
    Entry(
        "prumerge",
        "what the vision encoder attends to, with its neighbours (adapted to video)",
        LLaVAPruMerge,
        paper="https://arxiv.org/abs/2403.15388",
        source="https://github.com/42Shawn/LLaVA-PruMerge",
    ),
    Entry(
        "visionzip",
        "what the vision encoder attends to, and means of the others",
        VisionZip,
        paper="https://arxiv.org/abs/2412.04467",
        source="https://github.com/dvlab-research/VisionZip",
    ),
    Entry(
        "vidcom2",
        "what is least like the means of its video and frame",
        VidCom2,
        paper="https://arxiv.org/abs/2505.14454",
        source="https://github.com/xuyang-liu16/VidCom2",
    ),
    Entry(
        "evs",
        "what is least like its place in the frame before",
        EVS,
        paper="https://arxiv.org/abs/2510.14624",
        source="https://github.com/vllm-project/vllm",
    ),
    Entry(
        "vcast",
        "what stands out in its frame, more where the video turns",
        VCast,
        paper="https://arxiv.org/abs/2603.27650",
        source="https://github.com/xinyouu/V-CAST",
    ),
    Entry(
        "fastvid",
        "salient tokens and density peaks of segments",
        FastVID,
        paper="https://arxiv.org/abs/2503.11187",
        source="https://github.com/LunarShen/FastVID",
    ),
    Entry(
        "holitom",
        "still tokens merge over time, half more inside",
        HoliTom,
        paper="https://arxiv.org/abs/2505.21334",
        source="https://github.com/cokeshao/HoliTom",
    ),
    Entry(
        "flashvid",
        "diverse tokens and trees over time, more inside",
        FlashVID,
        paper="https://arxiv.org/abs/2602.08024",
        source="https://github.com/Fanziyang-v/FlashVID",
    ),
):
    register(_entry)


# Methods whose decode steps attend to a selection.
DYNAMIC = ("dycoke", "dycoke+", "once", "always")


def create(name: str, *, retention: float | None = None) -> Compressor | None:
    """A method by its name.

    Parameters
    ----------
    name : a key of `METHODS`; one of them with a "+" behind it, such as "visionzip+": with echoes,
        as DyCoke+ has them; or two joined by "+", such as "visionzip+dycoke": a one-shot method
        before the LLM, and the dynamic cache of another one while decoding.
    retention : share of the visual tokens that stay, in (0, 1], as the method counts them: where it
        drops some inside the LLM, a mean over the layers. None for the method's default setting.

    Raises
    ------
    ValueError
        For an unknown name, with those there are, and for a retention out of the method's reach.
    """
    if joined := re.fullmatch(r"(\w[\w-]*\+?)\s*\+\s*(\w.*)", name):
        before, after = joined.groups()
        first, cache = one_shot(before, retention=retention), create(after)
        if first is None:
            raise ValueError(f"{name}: nothing is composed with the full model")
        if not isinstance(cache, DyCoke) or after not in DYNAMIC:
            raise ValueError(
                f"{name}: {after!r} has no dynamic cache; {', '.join(DYNAMIC)} have one"
            )
        return Composed(first, replace(cache, merge_ratio=0))
    known = name in METHODS
    entry = METHODS.get(name if known else name.removesuffix("+"))
    if entry is None:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    try:
        method = entry.make(retention)
        if known:
            return method
        if method is None:
            raise ValueError("the full model merges nothing that could have an echo")
        return replace(method, **ECHO)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def choose(given: Mapping[str, Any], default: Compressor | None = None) -> Compressor | None:
    """The method that settings by name come to, as a command, a request or the page gives them.

    Parameters
    ----------
    given : ``{"off": True}`` alone; or ``method``, ``retention``, and settings of the method.
        Without a method and a retention, settings change those of ``default``.
    default : None for DyCoke.

    Returns
    -------
    Compressor or None
        None for the full model.

    Raises
    ------
    TypeError, ValueError
        For what no method has, or does not take.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    if "off" in settings:
        off = settings.pop("off")
        if not isinstance(off, bool) or (off and settings):
            raise ValueError(f"off must be true, alone, or false, got {dict(given)!r}")
        if off:
            return None
    name, retention = settings.pop("method", None), settings.pop("retention", None)
    if not isinstance(name, str | None):
        raise TypeError(f"method must be a name, got {name!r}")
    if name == "full" and (settings or retention is not None):
        listed = ", ".join([*settings, *(["retention"] if retention is not None else [])])
        raise ValueError(f"the full model keeps everything and has no settings; drop {listed}")
    if retention is not None:
        for other in ("merge_ratio", "token_budget", "ratio"):
            if other in settings:
                raise ValueError(f"retention and {other} both say how many tokens stay; drop one")
    if name is None and retention is None and default is not None:
        method: Compressor | None = default
    else:
        method = create(name or "dycoke", retention=retention)
    if method is None or not settings:
        return method
    return type(method).from_dict({**method.to_dict(), **settings})


def one_shot(name: str, *, retention: float | None = None) -> Compressor | None:
    """A method by its name, of which every step attends to all that it keeps."""
    method = create(name, retention=retention)
    # The controls come with DyCoke's cache, where nothing else is asked of them.
    return replace(method, prune_ratio=0.0) if isinstance(method, DyCoke) else method


__all__ = [
    "DYNAMIC",
    "EVS",
    "METHODS",
    "Composed",
    "Downsampled",
    "DyCoke",
    "Entry",
    "FastV",
    "FastVID",
    "FewerFrames",
    "FlashVID",
    "HoliTom",
    "LLaVAPruMerge",
    "OneShot",
    "RandomTokens",
    "Reducer",
    "ScoreBased",
    "TwoStage",
    "VCast",
    "VidCom2",
    "VideoContext",
    "VisionZip",
    "choose",
    "create",
    "from_dict",
    "one_shot",
    "register",
    "to_dict",
]
