"""What an answer's steps look like on the wire: small JSON-able events, sets of tokens as bits.

An answer is one ``start``, one ``word`` per generated token, and whatever ends it. A word costs two
bitsets, 370 bytes each at 2,960 tokens, and where attention is asked for a byte per token.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dycoke.core.steps import SampleStep, Step, VideoMasks
from dycoke.methods.dycoke import DyCoke
from dycoke.video import Video

Event = dict[str, Any]
WATCHED_FULL = DyCoke(merge_ratio=0, prune_ratio=0)
"""The full model for one who watches: it removes nothing, and has steps."""
LONGEST = 192  # longer side of a frame's picture, in pixels
UNFINISHED = "\ufffd"  # what a tokenizer makes of half a character


def bitset(mask: Tensor) -> str:
    """A mask of any shape as base64: eight tokens a byte, the first one in its lowest bit."""
    packed = np.packbits(mask.flatten().cpu().numpy(), bitorder="little")
    return base64.b64encode(packed.tobytes()).decode()


def quantised(attention: Tensor) -> tuple[str, float]:
    """Attention (Nv,) as base64 of a byte per token, and what 255 stands for.

    A token that is attended to at all has at least 1.
    """
    values = attention.double().numpy()
    top = float(values.max()) if values.size else 0.0
    scaled = np.ceil(values * (255 / top)) if top > 0 else np.zeros_like(values)
    data = np.clip(scaled, 0, 255).astype(np.uint8).tobytes()
    return base64.b64encode(data).decode(), top


def pictures(video: Video, count: int) -> tuple[list[str], list[float]]:
    """A small JPEG, in base64, and the time of each of ``count`` temporal slices.

    Some models fuse frames; a slice is shown by the first of them.
    """
    total = len(video.frames)
    shown = [i * total // count for i in range(count)]
    made = []
    for i in shown:
        picture = Image.fromarray(video.frames[i])
        picture.thumbnail((LONGEST, LONGEST))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        made.append(base64.b64encode(file.getvalue()).decode())
    return made, [round(video.timestamps[i], 3) for i in shown]


def start_event(videos: Sequence[Video], masks: Sequence[VideoMasks]) -> Event:
    """What is known once the prompt was read: frames of each video, and its tokens' fate."""
    return {"event": "start", "videos": [_shown(*one) for one in zip(videos, masks, strict=True)]}


def _shown(video: Video, masks: VideoMasks) -> dict[str, Any]:
    frames, tokens = masks.keep.shape
    shown, times = pictures(video, frames)
    return {
        "frames": shown,
        "times": times,
        "size": list(video.frames.shape[1:3]),
        "grid": list(masks.grid),
        "tokens": frames * tokens,
        "keep": bitset(masks.keep),
        "encoded": None if masks.encoded is None else bitset(masks.encoded),
    }


def word_event(index: int, text: str, row: SampleStep, attention: bool) -> Event:
    """One generated token, and what the forward that wrote it attended to.

    ``active`` and ``recalled`` are bitsets over the kept tokens of all videos. ``attention`` is
    there where it is asked for and the forward has it; ``share`` is how much of all its attention
    went to the videos.
    """
    event: Event = {
        "event": "word",
        "index": index,
        "text": text,
        "active": bitset(row.active),
        "recalled": bitset(row.recalled),
    }
    if attention and row.attention is not None:
        event["attention"], event["top"] = quantised(row.attention)
        event["share"] = round(float(row.attention.sum()), 5)
    return event


class Steps:
    """Listens to one answer about videos and hands its events on, a word as soon as it is known.

    A forward writes a token that only the next one feeds: so a word is told one forward later, and
    the last one by `finish`.

    Parameters
    ----------
    videos : what the prompt shows, in order.
    decode : from token ids to text, without special tokens.
    emit : takes the events, in the thread of generate.
    attention : whether words bring their attention.
    row : which row of the batch the answer is.
    ended : asked after a word whether the answer is complete; the rest of a batch may go on.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        decode: Callable[[Sequence[int]], str],
        emit: Callable[[Event], None],
        attention: bool = True,
        row: int = 0,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._videos, self._decode, self._emit = videos, decode, emit
        self._attention, self._row, self._ended = attention, row, ended
        self._generation: int | None = None
        self._waiting: SampleStep | None = None
        self._ids: list[int] = []
        self._told, self._began = "", time.perf_counter()

    def __call__(self, step: Step) -> None:
        """An ``on_step``."""
        if self._generation is None:
            self._generation = step.generation
        elif step.generation != self._generation:
            return  # one that runs inside this one, as guidance does
        if step.index == 0:
            self._emit(start_event(self._videos, step.videos[self._row]))
        elif self._waiting is None:
            return  # the answer is complete
        elif step.ids is not None:
            self._word(self._waiting, int(step.ids[self._row, -1]))
        self._waiting = None if step.index and self._ended() else step.samples[self._row]

    def finish(self, last: int | None) -> None:
        """Tell the last word, ``last`` its id, if it is not told; None where there is none."""
        if last is not None and self._waiting is not None:
            self._word(self._waiting, last)
        self._waiting = None

    def _word(self, row: SampleStep, token: int) -> None:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            new = ""  # the next token completes it
        else:
            new, self._told = text[len(self._told) :], text
        event = word_event(len(self._ids) - 1, new, row, self._attention)
        event["seconds"] = round(time.perf_counter() - self._began, 4)
        self._emit(event)
