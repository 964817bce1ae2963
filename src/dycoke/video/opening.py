"""A file is opened, and one of its video streams chosen; what is no clip, or unsafe, is refused.

Nothing but the named file is ever opened: no address, playlist or list of other files is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

PICTURE = 1 << 26  # pixels that one picture may have at least: a decoder holds several at once
# Demuxers that open what a file names, take the name for a pattern, draw text, or run it.
FOLLOWING = {
    "avisynth", "concat", "dash", "dvdvideo", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap",
    "sdp", "tty", "vapoursynth", "vobsub", "webm_dash_manifest",
}  # fmt: skip
# Pictures beside the film: a cover, thumbnails along it, tiles that only make a picture together.
BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
UNSUPPORTED = (
    av.error.LookupError,  # no such demuxer, decoder, option
    av.error.NotImplementedError,
    av.error.PatchWelcomeError,
    av.error.ExperimentalError,
)
CONVERT = "convert it, say to H.264 in an mp4"


class VideoError(ValueError):
    """A file that cannot be read as a video; one line that names the file and the cause."""


def check_file(file: str) -> None:
    """Refuse what is no regular file, before anything opens it: a pipe would block for ever."""
    try:
        mode = os.stat(file).st_mode
        if stat.S_ISREG(mode):
            with open(file, "rb"):
                return
    except FileNotFoundError:
        hint = "; a clip is not read from standard input, save it to a file" * (file == "-")
        raise VideoError(f"{file}: no such file{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise VideoError(f"{file!r}: cannot be opened ({cause})") from None
    if stat.S_ISDIR(mode):
        raise VideoError(f"{file}: a folder, not a video file; name a file in it")
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    raise VideoError(f"{file}: a {kind}, and a clip is read twice; save it to a file first")


@contextmanager
def opened(file: str) -> Iterator[InputContainer]:
    """The file's container.

    FFmpeg decodes one picture here where a header tells too little; by itself it takes none of more
    than 2 ** 28 pixels. PyAV 15 crashes where a decoder is given options already now.
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(sorted(av.formats_available - FOLLOWING)),
    }
    # "file:" keeps FFmpeg from taking a name such as "a:b.mp4" for a network address.
    name = "file:" + file
    with av.open(name, metadata_errors="ignore", container_options=options) as container:
        yield container


def videos(file: str, container: InputContainer, wanted: int | None) -> list[VideoStream]:
    """The streams that may be the clip: the one asked for, or those that are not beside it."""
    every = container.streams.video
    if wanted is not None:
        named = [stream for stream in every if stream.index == wanted]
        if not named:
            there = ", ".join(str(stream.index) for stream in every) or "none"
            raise VideoError(
                f"{file}: stream {wanted} is no video stream; of that kind are: {there}"
            )
        return named
    found = [stream for stream in every if not stream.disposition & BESIDE]
    if any(stream.disposition & Disposition.dependent for stream in every) and not found:
        raise VideoError(f"{file}: a picture in tiles, which cannot be joined here; {CONVERT}")
    if not found:
        cause = "only sound or other data" if container.streams else "perhaps it is cut off"
        raise VideoError(f"{file}: holds no video stream, {cause}")
    return [stream for stream in found if stream.codec_context is not None] or found


def choose(
    streams: Sequence[VideoStream], spans: Mapping[int, Fraction]
) -> tuple[VideoStream, str]:
    """The stream that a person would watch, and a note where another is as long.

    Parameters
    ----------
    streams : at least one.
    spans : seconds from the first to the last frame of each, by its index; a still has none.
    """
    longest = max(spans[stream.index] for stream in streams)
    # A preview is much shorter than its film; two views of one scene hardly differ.
    moving = [stream for stream in streams if spans[stream.index] >= longest / 2]
    chosen = max(moving, key=lambda stream: bool(stream.disposition & Disposition.default))
    if len(moving) == 1 or not longest:
        return chosen, ""
    those = ", ".join(str(stream.index) for stream in moving)
    note = f"video streams {those}, of which {chosen.index} is read; name one by its number: "
    return chosen, f"{note}stream= (--stream)"


def make_ready(file: str, stream: VideoStream, max_picture: int = PICTURE) -> None:
    """Refuse a stream that cannot be decoded, or not within bounds; else set its threads."""
    codec = stream.codec_context
    if codec is None:
        raise VideoError(f"{file}: no decoder for its codec; re-encode it, say to H.264")
    pixels = codec.width * codec.height
    if pixels > max_picture:
        raise VideoError(
            f"{file}: pictures of {codec.width} x {codec.height} pixels, more than the limit of "
            f"{max_picture}; scale it down, or allow max_pixels={4 * pixels} (--max-pixels)"
        )
    codec.options = {**codec.options, "max_pixels": str(max_picture)}
    stream.thread_type = "AUTO"
    threads = max(1, 4 * PICTURE // max(pixels, 1))  # each thread holds a picture
    if threads < (os.cpu_count() or 1):
        codec.thread_count = threads


def is_image(container: InputContainer) -> bool:
    """Whether it is a file of a kind that Pillow may know the orientation of."""
    brand = container.metadata.get("major_brand", "")
    return container.format.name.endswith("_pipe") or brand in ("avif", "avis", "mif1")


def unreadable(file: str, error: av.FFmpegError) -> VideoError:
    """What to say where FFmpeg cannot open a file or take it apart."""
    if error.errno == errno.EINVAL:
        return VideoError(
            f"{file}: not a readable video, but text, too large, or a list of other files, none "
            f"of which is followed ({error.strerror})"
        )
    if isinstance(error, UNSUPPORTED):
        return VideoError(f"{file}: not supported by this FFmpeg ({error.strerror}); {CONVERT}")
    # FFmpeg cannot tell a file that is no video from one that has lost its index.
    return VideoError(
        f"{file}: not a readable video, of an unknown kind, or cut off ({error.strerror})"
    )


def undecodable(file: str, codec: str, error: av.FFmpegError) -> VideoError:
    """What to say where not even the first frame decodes."""
    with open(file, "rb") as data, suppress(IndexError):
        head = data.read(21)
        if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20] & 2:
            return VideoError(f"{file}: an animated WebP, which FFmpeg does not decode; {CONVERT}")
    return VideoError(
        f"{file}: none of its {codec} frames decodes ({error.strerror}): damaged, encrypted, too "
        f"large, or not supported by this FFmpeg; {CONVERT}"
    )
