"""What a row says; the same keys for answers and for failures."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dycoke import __version__
from dycoke.batch.items import Item, Question

TOKENS = ("visual", "kept", "active", "prompt", "new")
SECONDS = ("decode", "encode", "prefill", "decode_step", "total")
HOST = socket.gethostname()


@dataclass(frozen=True)
class Reply:
    """An answer to one question.

    Attributes
    ----------
    text, finish_reason : as in `dycoke.assistant.Answer`.
    tokens : by the names in `TOKENS`; None for what is not known.
    seconds : by the names in `SECONDS`. What several rows shared is divided among them, so that
        sums over rows are what was spent; a decode step is one of the whole batch.
    """

    text: str
    finish_reason: str
    tokens: Mapping[str, int | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """What was read of a video: sampled frames, and the clip's length in seconds."""

    frames: int
    duration_s: float


@dataclass(frozen=True)
class Stamp:
    """What all rows of a run say alike."""

    method: str
    settings: Mapping[str, Any]
    model: str


def row(
    stamp: Stamp,
    item: Item,
    question: Question,
    attempt: int,
    clip: Clip | None,
    reply: Reply | None,
    error: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One line of the output."""
    tokens, seconds = (reply.tokens, reply.seconds) if reply is not None else ({}, {})
    return {
        "id": question.id,
        "video": item.video,
        "prompt": question.prompt,
        "text": None if reply is None else reply.text,
        "error": None if error is None else dict(error),
        "finish_reason": None if reply is None else reply.finish_reason,
        "frames": None if clip is None else clip.frames,
        "duration_s": None if clip is None else round(clip.duration_s, 3),
        "tokens": {name: tokens.get(name) for name in TOKENS},
        "seconds": {n: round(s, 6) if (s := seconds.get(n)) is not None else None for n in SECONDS},
        "method": stamp.method,
        "settings": dict(stamp.settings),
        "model": stamp.model,
        "version": __version__,
        "attempt": attempt,
        "host": HOST,
    }


def fault(error: BaseException) -> dict[str, str]:
    """What a row says of an error: its type, and its message on one line."""
    return {"type": type(error).__name__, "message": " ".join(str(error).split())[:2000]}
