"""When each frame of a clip is shown, listed without decoding it; and whether its end is there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from dycoke.video.opening import (
    PICTURE,
    VideoError,
    choose,
    make_ready,
    opened,
    undecodable,
    videos,
)

SLACK = Fraction(1, 20), Fraction(1, 4)  # share and seconds that may lack of the stated length
FROM_ZERO = ("matroska,webm", "asf")  # state when their last frame ends, not how long they last


@dataclass(frozen=True)
class Listing:
    """The frames of a clip in order of presentation."""

    times: Sequence[int]  # in units of `base` seconds
    base: Fraction
    rate: Fraction  # frames per second, as the container states it
    timed: bool  # False where the file tells no usable times: `times` are numbers at that rate
    total: int  # what the clip should hold: beyond `times` only where a flaw cuts it short
    flaw: str = ""
    stream: int = 0
    max_picture: int = PICTURE
    note: str = ""
    keys: Sequence[tuple[int, int]] = ()  # places of keyframes, each with the time to seek to

    @property
    def fps(self) -> float:
        steps, span = len(self.times) - 1, (self.times[-1] - self.times[0]) * self.base
        # Some containers round times (mkv: to milliseconds); within that, the stated rate is right.
        return float(self.rate if abs(steps / self.rate - span) <= self.base else steps / span)

    def take(self, file: str, container: InputContainer) -> VideoStream:
        """The same stream, in the file opened anew."""
        (stream,) = videos(file, container, self.stream)
        make_ready(file, stream, self.max_picture)
        return stream

    def broken(self, file: str, decoded: int, flaw: str) -> VideoError:
        return VideoError(f"{file}: {flaw}: only {decoded} of {self.total} frames can be read")


@dataclass
class _Packets:
    """What the packets of one stream tell."""

    count: int = 0
    times: list[int] = field(default_factory=list)
    seeks: list[tuple[int, int]] = field(default_factory=list)  # time, and the time to seek to

    def span(self, stream: VideoStream) -> Fraction:
        """Seconds from the first frame to the last."""
        if not self.times or not stream.time_base:
            return Fraction(0)
        return (max(self.times) - min(self.times)) * stream.time_base


def _arrange(times: list[int], count: int, stream: VideoStream) -> Listing:
    rate = stream.average_rate or stream.guessed_rate or Fraction(1)
    whole = 0 < count == len(times) and all(a < b for a, b in pairwise(times))
    if whole and stream.time_base:
        return Listing(times, stream.time_base, rate, True, count, stream=stream.index)
    return Listing(range(count), 1 / rate, rate, False, count, stream=stream.index)


def list_packets(file: str, wanted: int | None, max_picture: int) -> Listing:
    """Choose a stream, and list the frames that its packets promise, without decoding."""
    begin, end = Fraction(1 << 63), Fraction(-1 << 63)  # seconds, of all that the file holds
    with opened(file) as container:
        streams = videos(file, container, wanted)
        found = {stream.index: _Packets() for stream in streams}
        by_decoding = container.format.name == "mpegts"
        for packet in container.demux(*container.streams):
            if not packet.size or packet.is_discard:  # the end, or cut away by an edit list
                continue
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                begin = min(begin, time * packet.time_base)
                end = max(end, (time + (packet.duration or 0)) * packet.time_base)
            packets = found.get(packet.stream_index)
            if packets is None:
                continue
            packets.count += 1
            if packet.pts is not None:
                packets.times.append(packet.pts)
                if packet.is_keyframe:
                    # A transport stream is searched by decoding time, all else by presentation.
                    at = packet.dts if by_decoding and packet.dts is not None else packet.pts
                    packets.seeks.append((packet.pts, at))
        stream, note = choose(streams, {s.index: found[s.index].span(s) for s in streams})
        make_ready(file, stream, max_picture)
        packets = found[stream.index]
        listing = _arrange(sorted(packets.times), packets.count, stream)
        keys: list[tuple[int, int]] = []
        if listing.timed:
            keys = sorted((bisect_left(listing.times, time), at) for time, at in packets.seeks)
        total, flaw = packets.count, ""
        # Where no stream reaches the length that the file states, its end is missing. Most formats
        # state the time from the first to the last, some that from zero.
        stated = Fraction(container.duration or 0, av.time_base)
        if container.format.name in FROM_ZERO:
            stated -= begin
        lacks = stated - (end - begin)
        if end > begin and lacks > max(stated * SLACK[0], SLACK[1], 2 / listing.rate):
            guess = round(total * stated / max(end - begin, 1 / listing.rate))
            total, flaw = max(total + 1, stream.frames or guess), "the file ends early"
    return replace(listing, total=total, flaw=flaw, max_picture=max_picture, note=note, keys=keys)


def list_frames(file: str, promised: Listing) -> Listing:
    """List the frames by decoding all of them: slow, but right where packets mislead."""
    times: list[int] = []
    count, flaw = 0, promised.flaw
    with opened(file) as container:
        stream = promised.take(file, container)
        try:
            for frame in container.decode(stream):
                count += 1
                if frame.pts is not None:
                    times.append(frame.pts)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            if not count:
                raise undecodable(file, stream.codec_context.name, error) from error
            flaw = f"damaged ({error.strerror})"
        found = _arrange(times, count, stream)
    listing = replace(found, max_picture=promised.max_picture, note=promised.note)
    if flaw:
        listing = replace(listing, total=max(count, promised.total), flaw=flaw)
    if not listing.total:
        raise VideoError(f"{file}: holds no frames")
    return listing
