"""Which methods vLLM can have, and how many tokens of a video they keep.

vLLM writes a prompt's placeholders before the video is encoded, so that the count must follow from
shapes alone. Positions of kept tokens follow from the mask, and travel with the features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from torch import Tensor

from dycoke.compressor import Compressor
from dycoke.errors import UnsupportedError
from dycoke.merging import retained_count, video_budget
from dycoke.methods import EVS, DyCoke, RandomTokens, choose
from dycoke.vllm import VARIABLE


@cache
def parse(text: str) -> Compressor:
    """The method that ``DYCOKE_VLLM`` asks for.

    Parameters
    ----------
    text : a JSON object, as `dycoke.methods.choose` takes it. ``prune_ratio`` is 0 here, whatever
        its default: choosing rows per step is not possible.

    Raises
    ------
    ValueError
        For what is no JSON object, an unknown method or setting, a value out of its range.
    UnsupportedError
        For a method whose count depends on the video, and for settings that vLLM cannot have.
    """
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"DYCOKE_VLLM={text!r} is no JSON ({error}); "
            """write for example DYCOKE_VLLM='{"merge_ratio": 0.7}'"""
        ) from None
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"DYCOKE_VLLM={text!r} must be a JSON object of settings; "
            """write for example DYCOKE_VLLM='{"merge_ratio": 0.7}'"""
        )
    method = choose(settings, DyCoke(prune_ratio=0))
    if method is None:
        raise ValueError(f"DYCOKE_VLLM={text!r} asks for the full model; unset it instead")
    if type(method) not in (DyCoke, RandomTokens, EVS):
        raise UnsupportedError(
            "vLLM must know from a video's shape how many tokens stay, and "
            f"{type(method).__name__} does not say so; use dycoke, random or evs, or `dycoke "
            "serve`, which has all methods"
        )
    if isinstance(method, DyCoke) and "prune_ratio" not in settings:
        method = replace(method, prune_ratio=0.0)
    _check(method)
    return method


def asked() -> Compressor:
    """The method that this process's environment asks for."""
    return parse(os.environ[VARIABLE])


def _check(method: Compressor) -> None:
    refused = {
        "prune_ratio": (method.prune_ratio, 0, "a paged cache cannot choose rows per step"),
        "score_layer": (method.score_layer, None, "nothing is chosen while decoding"),
        "echo": (method.echo, 0, "echoes need the attention of the first layers"),
        "skip_ratio": (method.skip_ratio, 0, "vLLM has an encoder of its own"),
        "positions": (method.positions, "original", "tokens keep their positions here"),
        "merge": (getattr(method, "merge", "keep"), "keep", "vLLM takes a mask, no new features"),
    }
    for name, (value, only, why) in refused.items():
        if value != only:
            raise UnsupportedError(
                f"{name}={value!r} is not possible inside vLLM, as {why}; leave it at {only!r}, or "
                "use `dycoke serve`"
            )
    budget = getattr(method, "token_budget", None)
    if isinstance(budget, int):
        raise UnsupportedError(
            f"token_budget={budget} is shared over the videos of a prompt, and vLLM counts each "
            "video by itself; give a share of the tokens, such as token_budget=0.3"
        )


def kept_count(method: Compressor, frames: int, tokens: int) -> int:
    """How many visual tokens of a video stay: ``frames`` of ``tokens`` each."""
    if isinstance(method, EVS):
        return max(tokens, retained_count(frames * tokens, method.ratio))
    assert isinstance(method, DyCoke)
    if method.token_budget is not None:
        return video_budget(method.token_budget, frames * tokens)
    anchors = -(-frames // method.window)
    return anchors * tokens + (frames - anchors) * retained_count(tokens, method.merge_ratio)


def keep_mask(method: Compressor, features: Tensor, frames: int) -> Tensor:
    """Which tokens of a video stay.

    Parameters
    ----------
    features : Tensor, shape (F * N, D), the frames in order.
    frames : F.

    Returns
    -------
    Tensor, bool, shape (F * N,): exactly `kept_count` are True.

    Raises
    ------
    RuntimeError
        Where the method kept another number than was promised: the prompt has that many places.
    """
    tokens = len(features) // frames
    keep = method.merge_tokens(features.view(frames, tokens, -1))[1].flatten()
    promised, kept = kept_count(method, frames, tokens), int(keep.sum())
    if kept != promised:
        raise RuntimeError(
            f"{kept} visual tokens stay of {frames} frames of {tokens}, and the prompt has places "
            f"for {promised}; please report this with the settings {method}"
        )
    return keep
