"""A video file becomes a few frames, evenly spaced, with the times at which they are shown.

A first pass reads the packets without decoding them and lists when each frame is shown, so the
count of frames never rests on what the container claims. A second pass decodes forward, jumps to
a keyframe where that saves work, checks every frame against the list, and keeps only the sampled
ones. Where packets and frames do not correspond, the frames themselves are counted instead.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dycoke.checks import check_count

SEEK_GAP = 256  # frames that a jump has to save: it empties the pipeline of decoder threads
SLACK = Fraction(1, 20), Fraction(1, 4)  # share and seconds that may lack of the stated length


class VideoError(ValueError):
    """A file that cannot be read as a video; one line that names the file and the cause."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames sampled from a clip.

    Attributes
    ----------
    frames : uint8 array, shape (F, H, W, 3)
        RGB, upright.
    indices : tuple of int
        Place of each frame in the clip, in order of presentation, from 0.
    timestamps : tuple of float
        Seconds from the clip's first frame.
    total_frames : int
    fps : float
        Average over the clip. A single frame has the container's, or 1.
    path : str
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    total_frames: int
    fps: float
    path: str

    @property
    def duration(self) -> float:
        """Length of the clip in seconds."""
        return self.total_frames / self.fps


def sample_indices(total: int, count: int) -> list[int]:
    """Spread ``count`` places evenly over ``total``, the first and the last among them.

    One place is the middle; fewer places than asked for are all of them.

    Parameters
    ----------
    total, count : int, at least 1

    Returns
    -------
    list of int, length min(total, count)
        Strictly increasing, in [0, total).

    Raises
    ------
    TypeError, ValueError
        For a value that is no integer, or below 1.
    """
    total, count = check_count("total", total), check_count("count", count)
    if count == 1:
        return [total // 2]
    count = min(total, count)
    return [place * (total - 1) // max(count - 1, 1) for place in range(count)]


def read(
    path: str | os.PathLike[str],
    frames: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Video:
    """Sample frames evenly from a video file.

    Parameters
    ----------
    path : str or path-like
        A local file of any kind that PyAV decodes; its first video stream is read.
    frames : int, at least 1
        See `sample_indices`. A shorter clip gives all that it has.
    progress : callable, optional
        ``progress(done, asked)`` is called as each sampled frame arrives; the last call has
        ``done == asked``. It counts anew where a file turns out to need a second reading.

    Returns
    -------
    Video

    Raises
    ------
    VideoError
        If there is no such file, it holds no video, nothing decodes it, or it breaks off at or
        before the last frame asked for. Damage behind that frame is no error.
    TypeError, ValueError
        For a bad ``frames``.
    """
    count = check_count("frames", frames)
    file = os.fsdecode(path)
    if not os.path.exists(file):
        raise VideoError(f"{file}: no such file")
    if os.path.isdir(file):
        raise VideoError(f"{file}: a folder, not a video file; name a file in it")
    try:
        listing = _list_packets(file)
        indices = sample_indices(max(listing.total, 1), count)
        images = _decode(file, listing, indices, progress) if listing.timed else None
        if images is None:
            listing = _list_frames(file, listing)
            indices = sample_indices(listing.total, count)
            images = _decode(file, listing, indices, progress)
    except av.FFmpegError as error:
        # FFmpeg cannot tell a file that is no video from one that has lost its index.
        raise VideoError(f"{file}: not a readable video, or cut off ({error.strerror})") from error
    if images is None:
        raise VideoError(f"{file}: decodes differently each time; re-encode it")
    seconds = tuple(float((listing.times[i] - listing.times[0]) * listing.base) for i in indices)
    return Video(images, tuple(indices), seconds, listing.total, listing.fps, file)


@dataclass(frozen=True)
class _Listing:
    """The frames of a clip in order of presentation."""

    times: Sequence[int]  # in units of `base` seconds
    base: Fraction
    rate: Fraction  # frames per second, as the container states it
    timed: bool  # False where the file tells no usable times: `times` are numbers at that rate
    total: int  # what the clip should hold: beyond `times` only where a flaw cuts it short
    flaw: str = ""
    keys: Sequence[tuple[int, int]] = ()  # places of keyframes, each with the time to seek to

    @property
    def fps(self) -> float:
        steps, span = len(self.times) - 1, (self.times[-1] - self.times[0]) * self.base
        # Some containers round times (mkv: to milliseconds); within that, the stated rate is right.
        return float(self.rate if abs(steps / self.rate - span) <= self.base else steps / span)

    def broken(self, file: str, decoded: int, flaw: str) -> VideoError:
        return VideoError(f"{file}: {flaw}: only {decoded} of {self.total} frames can be read")


@contextmanager
def _open(file: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    # "file:" keeps FFmpeg from taking a name such as "a:b.mp4" for a network address.
    with av.open("file:" + file, metadata_errors="ignore") as container:
        if container.format.name == "tty":  # FFmpeg would draw the text, as a terminal does
            raise VideoError(f"{file}: not a readable video, but text")
        # The cover of a sound file comes as a video stream, too.
        covers = Disposition.attached_pic
        videos = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not videos:
            cause = "only sound or other data" if container.streams else "perhaps it is cut off"
            raise VideoError(f"{file}: holds no video stream, {cause}")
        if videos[0].codec_context is None:
            raise VideoError(f"{file}: no decoder for its codec; re-encode it, say to H.264")
        videos[0].thread_type = "AUTO"
        yield container, videos[0]


def _arrange(times: list[int], count: int, stream: VideoStream) -> _Listing:
    rate = stream.average_rate or stream.guessed_rate or Fraction(1)
    whole = 0 < count == len(times) and all(a < b for a, b in pairwise(times))
    if whole and stream.time_base:
        return _Listing(times, stream.time_base, rate, True, count)
    return _Listing(range(count), 1 / rate, rate, False, count)


def _list_packets(file: str) -> _Listing:
    """List the frames that the packets promise, without decoding."""
    times: list[int] = []
    seeks: list[tuple[int, int]] = []
    count, end = 0, Fraction(0)
    with _open(file) as (container, stream):
        # A transport stream is searched by decoding time, everything else by presentation time.
        by_decoding = container.format.name == "mpegts"
        for packet in container.demux(*container.streams.video, *container.streams.audio):
            if not packet.size or packet.is_discard:  # the end, or cut away by an edit list
                continue
            time = packet.pts
            count += packet.stream_index == stream.index
            if time is None:
                continue
            end = max(end, (time + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == stream.index:
                times.append(time)
                if packet.is_keyframe:
                    at = packet.dts if by_decoding and packet.dts is not None else time
                    seeks.append((time, at))
        listing = _arrange(sorted(times), count, stream)
        if not listing.timed:
            return listing
        keys = sorted((bisect_left(listing.times, time), at) for time, at in seeks)
        total, flaw = count, ""
        # Where no stream reaches the length that the file states, its end is missing.
        stated = Fraction(container.duration or 0, av.time_base)
        if stated - end > max(stated * SLACK[0], SLACK[1], 2 / listing.rate):
            guess = round(count * stated / max(end, 1 / listing.rate))
            total, flaw = max(count + 1, stream.frames or guess), "the file ends early"
    return replace(listing, total=total, flaw=flaw, keys=keys)


def _list_frames(file: str, promised: _Listing) -> _Listing:
    """List the frames by decoding all of them: slow, but right where packets mislead."""
    times: list[int] = []
    count, flaw = 0, promised.flaw
    with _open(file) as (container, stream):
        try:
            for frame in container.decode(stream):
                count += 1
                if frame.pts is not None:
                    times.append(frame.pts)
        except av.FFmpegError as error:
            flaw = f"damaged ({error.strerror})"
        listing = _arrange(times, count, stream)
    if flaw:
        listing = replace(listing, total=max(count, promised.total), flaw=flaw)
    if not listing.total:
        raise VideoError(f"{file}: holds no frames")
    return listing


def _decode(
    file: str, listing: _Listing, indices: list[int], progress: Callable[[int, int], None] | None
) -> NDArray[np.uint8] | None:
    """Decode the frames at these places; None where what comes is not what the list says."""
    if indices[-1] >= len(listing.times):
        raise listing.broken(file, len(listing.times), listing.flaw)
    images: NDArray[np.uint8] | None = None
    width = height = 0
    with _open(file) as (container, stream):
        decoded = container.decode(stream)
        place, jumped = 0, False  # place of the next frame; -1 until one tells it after a jump
        for done, index in enumerate(indices):
            key = bisect_right(listing.keys, (index, math.inf)) - 1
            try:
                if key >= 0 and listing.keys[key][0] - place >= SEEK_GAP:
                    jumped = True
                    container.seek(listing.keys[key][1], stream=stream)
                    decoded, place = container.decode(stream), -1
                for frame in decoded:
                    if place < 0:
                        place = bisect_left(listing.times, frame.pts or 0)
                    if place > index or (listing.timed and frame.pts != listing.times[place]):
                        return None
                    place += 1
                    if place > index:
                        break
                else:
                    return None
            except av.FFmpegError as error:
                if jumped:  # perhaps the jump went wrong; decoding everything will tell
                    return None
                raise listing.broken(file, place, f"damaged ({error.strerror})") from error
            # A clip may change its size on the way: all frames take the size of the first.
            width, height = width or frame.width, height or frame.height
            image = frame.to_ndarray(format="rgb24", width=width, height=height)
            image = np.rot90(image, round(frame.rotation / 90))
            if images is None:
                images = np.empty((len(indices), *image.shape), np.uint8)
            images[done] = image
            if progress is not None:
                progress(done + 1, len(indices))
    return images
