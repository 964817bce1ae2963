"""Clips for tests, rendered with PyAV: every picture carries its own number.

A picture is a grid of 4 x 4 big gray blocks, the 16 bits of its number. `number` reads them back
after any lossy codec, so a test can prove which picture of the clip it was given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from dycoke.video.upright import ALONE

GRID = 4
DARK, LIGHT = 48, 208


def picture(value: int, height: int, width: int) -> NDArray[np.uint8]:
    """Picture (height, width, 3) whose blocks are the bits of `value`, the lowest top left."""
    bits = np.array([value >> bit & 1 for bit in range(GRID * GRID)]).reshape(GRID, GRID)
    rows, columns = (np.arange(size) * GRID // size for size in (height, width))
    gray = np.where(bits, LIGHT, DARK)[rows][:, columns]
    return np.repeat(gray[:, :, None], 3, axis=2).astype(np.uint8)


def number(image: NDArray[np.uint8]) -> int:
    """The number that an upright picture (height, width, 3) carries."""
    height, width = image.shape[:2]
    value = 0
    for bit in range(GRID * GRID):
        row, column = divmod(bit, GRID)
        y, x = (2 * row + 1) * height // (2 * GRID), (2 * column + 1) * width // (2 * GRID)
        value |= int(image[y - 1 : y + 2, x - 1 : x + 2].mean() > (DARK + LIGHT) / 2) << bit
    return value


def can_encode(codec: str) -> bool:
    """Whether this PyAV ships the encoder."""
    try:
        return bool(av.codec.Codec(codec, "w"))
    except ValueError:
        return False


def render(
    path: Path,
    count: int,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 64),
    rate: int = 25,
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    sound: float = 0,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """Write `count` pictures of `size` (height, width), numbered from 0, and return the path.

    `times` are presentation times in milliseconds (default: `rate` pictures a second). `sound`
    adds that many seconds of silence; with a `count` of 0 it is all there is. `aspect` is the width
    of a pixel over its height.
    """
    height, width = size
    clock = Fraction(1, 1000) if times else Fraction(1, rate)
    with av.open(str(path), "w", options=muxer or {}) as container:
        container.metadata.update(metadata or {})
        if count:
            video = container.add_stream(codec, rate=rate, options=options or {})
            video.width, video.height, video.pix_fmt = width, height, pix_fmt
            if aspect is not None:
                video.codec_context.sample_aspect_ratio = aspect
            video.codec_context.gop_size, video.codec_context.time_base = gop, clock
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for value in range(count):
            frame = av.VideoFrame.from_ndarray(picture(value, height, width), format="rgb24")
            frame = frame.reformat(format=pix_fmt, **ALONE)
            frame.pts, frame.time_base = times[value] if times else value, clock
            container.mux(video.encode(frame))
        if count:
            container.mux(video.encode(None))
        if audio is not None:
            _silence(container, audio, sound)
    return path


def _silence(container: Any, stream: Any, seconds: float) -> None:
    for start in range(0, int(16000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "f4"), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def remux(
    source: Path, path: Path, *, skip: int = 0, shift: int = 0, muxer: dict[str, str] | None = None
) -> Path:
    """Copy a clip's packets, without the first `skip` of them, `shift` ticks earlier.

    Times below zero become an edit list in mp4: pictures that are stored, and not shown.
    """
    options = {"avoid_negative_ts": "disabled"} if shift else {}
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", options=options | (muxer or {})) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for place, packet in enumerate(old.demux(video=0)):
            if packet.size and place >= skip:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                new.mux(packet)
    return path


def turn(path: Path, degrees: int) -> Path:
    """Tell players, in an mp4's track header, to turn the picture clockwise."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    return place(path, cos, sin, -sin, cos)


def place(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Tell players, in an mp4's track header, to show (x, y) at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # name 4, version and flags 4, numbers and times 20, layer 16
    a, b, c, d = (round(value * (1 << 16)) for value in (a, b, c, d))  # 16.16 fixed point
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)  # the last is 2.30
    path.write_bytes(data)
    return path


def side_by_side(path: Path, *counts: int, rate: int = 25, default: int | None = None) -> Path:
    """One video stream for each of `counts` pictures; stream s begins with picture 1000 s.

    A stream of one picture is a still, smaller than the others.
    """
    with av.open(str(path), "w") as container:
        streams = []
        for count in counts:
            stream = container.add_stream("libx264" if count > 1 else "mjpeg", rate=rate)
            stream.width, stream.height = (64, 48) if count > 1 else (32, 24)
            stream.pix_fmt = "yuv420p" if count > 1 else "yuvj420p"
            streams.append(stream)
        if default is not None:
            for at, stream in enumerate(streams):
                stream.disposition = int(at == default)
        for value in range(max(counts)):
            for at, (stream, count) in enumerate(zip(streams, counts, strict=True)):
                if value < count:
                    image = picture(1000 * at + value, stream.height, stream.width)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame = frame.reformat(format=stream.pix_fmt, **ALONE)
                    frame.pts, frame.time_base = value, Fraction(1, rate)
                    container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def claiming_gif(path: Path, width: int, height: int, count: int) -> Path:
    """A GIF of a few bytes a picture, each of one pixel on a canvas of this size."""
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    for at in range(count):
        data += b"\x21\xf9\x04\0\x0a\0\0\0"  # shown for a tenth of a second
        data += b"\x2c" + struct.pack("<HHHHB", at, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    path.write_bytes(data + b";")
    return path


def damage(path: Path, packet: int) -> Path:
    """Overwrite one packet of the video (by place in the file) so that it cannot be decoded."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    start, size = packets[packet]
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def with_cover(path: Path) -> Path:
    """An MP3 of one second with a cover picture, which FFmpeg reports as a video stream."""
    image = render(path.with_suffix(".png"), 1, codec="png", pix_fmt="rgb24").read_bytes()
    body = b"\0image/png\0\x03\0" + image
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes(len(frame) >> bits & 127 for bits in (21, 14, 7, 0))
    with av.open(str(path), "w", format="mp3") as container:
        sound = container.add_stream("libmp3lame", rate=16000, layout="mono")
        _silence(container, sound, 1)
    path.write_bytes(b"ID3\x03\0\0" + size + frame + path.read_bytes())
    return path
