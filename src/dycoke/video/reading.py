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
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from dycoke.errors import check_count
from dycoke.video.listing import Listing, list_frames, list_packets
from dycoke.video.opening import (
    PICTURE,
    VideoError,
    check_file,
    is_image,
    opened,
    undecodable,
    unreadable,
)
from dycoke.video.upright import shown_size, to_rgb, turn_of, turn_of_image

__all__ = ["MAX_PIXELS", "Video", "VideoError", "read", "sample_indices"]

MAX_PIXELS = 1 << 28  # of all sampled frames together: 32 frames of 4K, 800 MB

SEEK_GAP = 256  # frames that a jump has to save: it empties the pipeline of decoder threads


@dataclass(frozen=True, eq=False)
class Video:
    """Frames sampled from a clip.

    Attributes
    ----------
    frames : uint8 array, shape (F, H, W, 3)
        RGB, as a player shows them: upright, in true proportions.
    indices : tuple of int
        Place of each frame in the clip, in order of presentation, from 0.
    timestamps : tuple of float
        Seconds from the clip's first frame.
    total_frames : int
    fps : float
        Average over the clip. A single frame has the container's, or 1.
    path : str
    tick : float
        Seconds by which the file's clock may round a time.
    notes : tuple of str
        What a user should know of the reading: frames scaled down, another stream as long.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    total_frames: int
    fps: float
    path: str
    tick: float = 1e-3
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Length of the clip in seconds."""
        return self.total_frames / self.fps

    @property
    def even(self) -> bool:
        """Whether each frame is shown when its place and `fps` say so, but for `tick`."""
        pairs = zip(self.indices, self.timestamps, strict=True)
        return all(abs(time - place / self.fps) <= 1.01 * self.tick for place, time in pairs)


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
    stream: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Video:
    """Sample frames evenly from a video file.

    Parameters
    ----------
    path : str or path-like
        A local file of any kind that PyAV decodes.
    frames : int, at least 1
        See `sample_indices`. A shorter clip gives all that it has.
    progress : callable, optional
        ``progress(done, asked)`` is called as each sampled frame arrives; the last call has
        ``done == asked``. It counts anew where a file turns out to need a second reading.
    stream : int, optional
        The stream to read, by its number in the file. By default the one that a person would
        watch: of those that are at least half as long as the longest, the file's default, else the
        first.
    max_pixels : int, at least 1
        All sampled frames together have at most so many; larger ones are scaled down while they are
        read, and `Video.notes` says so. A file whose pictures have more than a quarter of it, and
        more than 2 ** 26, is refused, because a decoder holds several of them.

    Returns
    -------
    Video

    Raises
    ------
    VideoError
        If there is no such file, it is no regular file, holds no video or no such stream, nothing
        decodes it, its pictures are too large, or it breaks off at or before the last frame asked
        for. Damage behind that frame is no error.
    TypeError, ValueError
        For a bad ``frames``, ``stream`` or ``max_pixels``.
    """
    count, most = check_count("frames", frames), check_count("max_pixels", max_pixels)
    wanted = None if stream is None else check_count("stream", stream, least=0)
    file = os.fsdecode(path)
    check_file(file)
    try:
        listing = list_packets(file, wanted, max(PICTURE, most // 4))
        indices = sample_indices(max(listing.total, 1), count)
        taken = _decode(file, listing, indices, most, progress) if listing.timed else None
        if taken is None:
            listing = list_frames(file, listing)
            indices = sample_indices(listing.total, count)
            taken = _decode(file, listing, indices, most, progress)
    except MemoryError as error:
        raise VideoError(
            f"{file}: too little memory for {count} frames; take fewer, or smaller ones: "
            f"max_pixels= (--max-pixels), now {most}"
        ) from error
    except av.FFmpegError as error:
        raise unreadable(file, error) from error
    if taken is None:
        raise VideoError(f"{file}: decodes differently each time; re-encode it")
    images, scaled = taken
    seconds = tuple(float((listing.times[i] - listing.times[0]) * listing.base) for i in indices)
    return Video(
        images,
        tuple(indices),
        seconds,
        listing.total,
        listing.fps,
        file,
        float(listing.base),
        tuple(note for note in (listing.note, scaled) if note),
    )


def _decode(
    file: str,
    listing: Listing,
    indices: list[int],
    most: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.uint8], str] | None:
    """Decode the frames at these places, with a note where they were scaled down.

    None where what comes is not what the list says.
    """
    if indices[-1] >= len(listing.times):
        raise listing.broken(file, len(listing.times), listing.flaw)
    images, note = np.empty(0, np.uint8), ""
    size = 0, 0
    with opened(file) as container:
        stream = listing.take(file, container)
        tagged = turn_of_image(file) if is_image(container) else None
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
            except MemoryError:
                raise
            except av.FFmpegError as error:
                if jumped:  # perhaps the jump went wrong; decoding everything will tell
                    return None
                if not place:
                    raise undecodable(file, stream.codec_context.name, error) from error
                raise listing.broken(file, place, f"damaged ({error.strerror})") from error
            turn = tagged or turn_of(frame)
            if not done:  # a clip may change its size on the way: all take that of the first
                shape = frame.width, frame.height, stream.sample_aspect_ratio, turn
                size, whole = (shown_size(*shape, n) for n in (most // len(indices), 1 << 62))
                images = np.empty((len(indices), *size, 3), np.uint8)
                if size != whole:
                    note = f"frames of {whole[1]} x {whole[0]} pixels are read at {size[1]} x "
                    note += f"{size[0]} (max_pixels=, --max-pixels)"
            images[done] = to_rgb(frame, turn, size)
            if progress is not None:
                progress(done + 1, len(indices))
    return images, note
