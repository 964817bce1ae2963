"""lmms-eval's messages and generation settings, as `Assistant.ask` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dycoke.errors import UnsupportedError

DEFAULT_NEW_TOKENS = 1024  # tokens, where a task does not say; as lmms-eval's LLaVA models


def video_and_question(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The file and the text of a prompt.

    Parameters
    ----------
    messages : one user turn, whose ``content`` lists one video ({"type": "video", "url": file}) and
        texts ({"type": "text", "text": str}).

    Returns
    -------
    (file, question)
        The texts joined; the model's template puts the video before them.

    Raises
    ------
    UnsupportedError
        For anything else: images, several videos, a part of a video, several turns.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages)
        raise UnsupportedError(f"a prompt is one user turn here, not {roles}; take a base=")
    content = messages[0]["content"]
    kinds = [part["type"] for part in content]
    if kinds.count("video") != 1 or set(kinds) - {"video", "text"}:
        raise UnsupportedError(
            f"a prompt is one video and text here, not {', '.join(kinds)}; take a base="
        )
    video = next(part for part in content if part["type"] == "video")
    bounds = [name for name in ("start_time", "end_time") if video.get(name) is not None]
    if bounds or not isinstance(video["url"], str):
        raise UnsupportedError(
            f"a video is a whole file here, not {bounds or type(video['url']).__name__}; take a "
            "base="
        )
    return video["url"], "".join(part["text"] for part in content if part["type"] == "text")


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` from a task's ``generation_kwargs``; greedy unless it is warm.

    Like lmms-eval's LLaVA models this takes no ``until``: an answer ends where the model ends it.
    """
    chosen: dict[str, Any] = {"max_new_tokens": settings.get("max_new_tokens", DEFAULT_NEW_TOKENS)}
    if settings.get("num_beams", 1) != 1:
        chosen["num_beams"] = settings["num_beams"]
    if settings.get("temperature", 0) > 0:
        chosen["do_sample"] = True
        names = ("temperature", "top_p", "top_k")
        chosen |= {name: settings[name] for name in names if settings.get(name) is not None}
    return chosen
