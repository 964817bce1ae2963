"""Clips for tests, rendered with PyAV: every picture carries its own index.

A picture is a grid of 4 x 4 big gray blocks, the 16 bits of its index. `number` reads them back
after any lossy codec, so a test can prove which picture of the clip it was given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

GRID = 4
DARK, LIGHT = 48, 208


def picture(index: int, height: int, width: int) -> NDArray[np.uint8]:
    """Picture (height, width, 3) whose blocks are the bits of `index`, lowest bit top left."""
    bits = np.array([index >> bit & 1 for bit in range(GRID * GRID)]).reshape(GRID, GRID)
    rows, columns = (np.arange(size) * GRID // size for size in (height, width))
    gray = np.where(bits, LIGHT, DARK)[rows][:, columns]
    return np.repeat(gray[:, :, None], 3, axis=2).astype(np.uint8)


def number(image: NDArray[np.uint8]) -> int:
    """Index that an upright picture (height, width, 3) carries."""
    height, width = image.shape[:2]
    index = 0
    for bit in range(GRID * GRID):
        row, column = divmod(bit, GRID)
        y, x = (2 * row + 1) * height // (2 * GRID), (2 * column + 1) * width // (2 * GRID)
        index |= int(image[y - 1 : y + 2, x - 1 : x + 2].mean() > (DARK + LIGHT) / 2) << bit
    return index


def render(
    path: Path,
    count: int,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (48, 64),
    rate: int = 25,
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    audio: bool = False,
    turn: int = 0,
    format: str | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Write `count` pictures of `size` (height, width) to `path` and return it.

    `times` are presentation times in milliseconds (default: `rate` pictures a second); `turn` is
    the clockwise rotation in degrees (mp4 only) that a player has to apply; `audio` adds a silent
    track of the same length; `count` 0 with `audio` gives a file with sound alone (one second).
    """
    height, width = size
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        if count:
            video = container.add_stream(codec, rate=rate, options=options or {})
            video.width, video.height, video.pix_fmt = width, height, pix_fmt
            video.codec_context.gop_size = gop
            video.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = times[index] if times else index
            frame.time_base = video.codec_context.time_base
            container.mux(video.encode(frame))
        if count:
            container.mux(video.encode(None))
        if sound is not None:
            samples = 16000 * max(count, rate) // rate
            for start in range(0, samples, 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 16000, start
                silence.time_base = Fraction(1, 16000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    if turn:
        _turn(path, turn)
    return path


def _turn(path: Path, turn: int) -> None:
    """Write a clockwise rotation into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # 4 name, 4 version and flags, 20 ids and times, 16 layer, volume
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    one = 1 << 16
    data[at : at + 36] = struct.pack(
        ">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
