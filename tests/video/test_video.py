"""Video files: which frames, at which times, how much memory, and what each bad file is told.

The oracle is naive: decode everything in order with `container.decode`, and index.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from dycoke.video import Video, VideoError, read, sample_indices, upright
from dycoke.video import reading as video

COUNTS = (1, 2, 3, 5, 7, 33)
SHARED = Path(__file__).parents[3] / "shared" / "videos"


def digest(image: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()


@cache
def oracle(path: Path) -> list[tuple[str, float | None]]:
    """Digest and time of every frame, decoded one after the other; what precedes an error."""
    frames = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(container.streams.video[0]):
                image = frame.to_ndarray(format="rgb24", **upright.ALONE)
                image = np.rot90(image, frame.rotation // 90)
                frames.append((digest(image), frame.time))
        except av.FFmpegError:
            pass
    return frames


def check(clip: Video, path: Path, count: int, total: int | None = None) -> None:
    """The places are right, and the frames are the oracle's at these places."""
    truth = oracle(path)
    total = total or len(truth)
    assert clip.path == str(path)
    assert clip.total_frames == total
    assert list(clip.indices) == sample_indices(total, count)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.ndim == 4
    assert clip.frames.shape[3] == 3
    assert [digest(image) for image in clip.frames] == [truth[i][0] for i in clip.indices]
    if truth[0][1] is not None:
        expected = [truth[i][1] - truth[0][1] for i in clip.indices]
        np.testing.assert_allclose(clip.timestamps, expected, atol=1e-9)


def numbers(clip: Video) -> list[int]:
    return [clips.number(image) for image in clip.frames]


class Spy:
    """Stands in for `av.open`: counts frames as they are decoded, jumps, and open files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int | None = 0) -> None:
        self.decoded = self.open = self.opened = self.most_alive = 0
        self.jumps: list[int] = []
        self.late = late  # makes every jump aim this much too late; None makes it fail
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.av_open = av.open
        monkeypatch.setattr(av, "open", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        container, spy = self.av_open(*args, **kwargs), self

        class Delegate:
            def __init__(self, target: Any) -> None:
                self.target = target

            def __getattr__(self, name: str) -> Any:
                return getattr(self.target, name)

        class Container(Delegate):
            def __enter__(self) -> Container:
                spy.open, spy.opened = spy.open + 1, spy.opened + 1
                return self

            def __exit__(self, *_: object) -> None:
                spy.open -= 1
                container.close()

            def decode(self, *streams: Any) -> Iterator[Delegate]:
                for frame in container.decode(*streams):
                    seen = Delegate(frame)
                    spy.alive.add(seen)
                    spy.decoded += 1
                    spy.most_alive = max(spy.most_alive, len(spy.alive))
                    del frame
                    yield seen

            def seek(self, offset: int, **kwargs: Any) -> None:
                spy.jumps.append(offset)
                if spy.late is None:
                    raise av.error.PermissionError(1, "Operation not permitted")
                container.seek(offset + spy.late, **kwargs)

        return Container(container)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


# Which places


@given(st.integers(1, 5000), st.integers(1, 300))
def test_places_are_even_and_hold_both_ends(total: int, count: int) -> None:
    places = sample_indices(total, count)
    assert len(places) == min(total, count)
    assert all(a < b for a, b in pairwise(places))
    assert 0 <= places[0] <= places[-1] < total
    if count >= 2:
        assert (places[0], places[-1]) == (0, total - 1)
        step = (total - 1) / max(len(places) - 1, 1)
        assert all(abs(place - i * step) < 1 for i, place in enumerate(places))
    else:
        assert abs(places[0] - (total - 1) / 2) <= 0.5


@given(st.integers(1, 300), st.integers(0, 300))
def test_a_short_clip_gives_all_it_has(total: int, more: int) -> None:
    if total + more > 1:
        assert sample_indices(total, total + more) == list(range(total))


def test_known_places() -> None:
    assert sample_indices(10, 1) == [5]
    assert sample_indices(1, 1) == sample_indices(1, 8) == [0]
    assert sample_indices(10, 4) == [0, 3, 6, 9]
    assert sample_indices(100, 3) == [0, 49, 99]


@pytest.mark.parametrize("value", [0, -1, -32])
def test_places_below_one_are_refused(value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"total must be at least 1, got {value}"):
        sample_indices(value, 1)
    with pytest.raises(ValueError, match=f"count must be at least 1, got {value}"):
        sample_indices(1, value)
    with pytest.raises(ValueError, match=f"frames must be at least 1, got {value}"):
        read(clips.render(tmp_path / "clip.mp4", 2), value)


@pytest.mark.parametrize("value", [2.5, "8", None, True])
def test_places_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"count must be an integer of at least 1, got {value!r}"):
        sample_indices(1, value)


# Rendered clips

ODD = (47, 65)
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "sound.mp4": {"sound": 2},
    "fragmented.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "odd444.mp4": {"pix_fmt": "yuv444p", "size": ODD},
    "open-gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "mpeg4.mp4": {"codec": "mpeg4", "size": ODD},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "h264.mkv": {},
    "sound.mkv": {"sound": 2},
    "av1.mkv": {"codec": "libsvtav1", "size": (64, 64)},
    "lossless.mkv": {"codec": "ffv1", "size": ODD},
    "vp9.webm": {"codec": "libvpx-vp9", "size": ODD, "options": {"deadline": "realtime"}},
    "vp8.webm": {"codec": "libvpx", "size": ODD, "options": {"deadline": "realtime"}},
    "moving.gif": {"codec": "gif", "pix_fmt": "rgb8", "size": ODD},
    "h264.flv": {},
    "h264.ts": {},
    "refresh.ts": {"options": {"x264-params": "intra-refresh=1"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "bare.h264": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


Rendered = Callable[..., Path]


@pytest.fixture(scope="module")
def rendered(folder: Path) -> Rendered:
    """A clip that several cases start from, rendered once."""

    def call(name: str, count: int, **how: Any) -> Path:
        path = folder / name
        return path if path.exists() else clips.render(path, count, **how)

    return call


@pytest.mark.parametrize("size", [(48, 64), (31, 50)])
def test_frames_are_those_of_ffmpegs_own_threads(size: tuple[int, int], tmp_path: Path) -> None:
    """Scaled in one thread or in as many as FFmpeg likes, whole or smaller."""
    path = clips.render(tmp_path / "clip.mp4", 3, size=(480, 640))
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            height, width = size
            one = upright.to_rgb(frame, upright.TURNS[0], size)
            np.testing.assert_array_equal(
                one, frame.to_ndarray(format="rgb24", width=width, height=height)
            )


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_clip(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not clips.can_encode(KINDS[name].get("codec", "libx264")):
        pytest.skip("this PyAV has no such encoder")
    path = clips.render(folder / name, 50, **KINDS[name])
    height, width = KINDS[name].get("size", (48, 64))
    for gap in (video.SEEK_GAP, 1):  # with 1 it jumps wherever it can
        monkeypatch.setattr(video, "SEEK_GAP", gap)
        for count in COUNTS:
            clip = read(path, count)
            check(clip, path, count, total=50)
            assert numbers(clip) == list(clip.indices)
            assert clip.frames.shape[1:] == (height, width, 3)
            assert clip.fps == pytest.approx(25)
            assert clip.duration == pytest.approx(2)
            np.testing.assert_allclose(clip.timestamps, np.array(clip.indices) / 25, atol=1e-3)
            assert clip.even


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_variable_frame_rate(name: str, tmp_path: Path) -> None:
    times = [40 * i + 3 * i * i for i in range(40)]  # milliseconds: ever slower
    path = clips.render(tmp_path / name, 40, times=times)
    for count in COUNTS:
        clip = read(path, count)
        check(clip, path, count, total=40)
        assert numbers(clip) == list(clip.indices)
        np.testing.assert_allclose(
            clip.timestamps, [times[i] / 1000 for i in clip.indices], atol=1e-3
        )
        assert clip.fps == pytest.approx(39 / (times[-1] / 1000), rel=1e-3)
        assert clip.even == (count == 2)  # the first and the last, of which the rate is made


def test_matroska_states_no_frame_count_and_none_is_needed(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mkv", 21)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert read(path, 4).indices == (0, 6, 13, 20)


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.flv"])
def test_sound_may_outlast_the_picture(name: str, tmp_path: Path) -> None:
    clip = read(clips.render(tmp_path / name, 25, sound=4), 5)
    assert (clip.indices, clip.total_frames) == ((0, 6, 12, 18, 24), 25)
    assert clip.duration == pytest.approx(1)


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    clip = read(clips.render(tmp_path / "one.mp4", 1), 8)
    assert (clip.indices, clip.timestamps, clip.total_frames) == ((0,), (0.0,), 1)
    assert (clip.fps, clip.duration) == (25.0, 1 / 25)
    assert clip.frames.shape == (1, 48, 64, 3)


def test_default_is_32_frames(tmp_path: Path) -> None:
    assert len(read(clips.render(tmp_path / "clip.mp4", 40)).frames) == 32


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(degrees: int, tmp_path: Path) -> None:
    path = clips.turn(clips.render(tmp_path / "turned.mp4", 12), degrees)
    clip = read(path, 4)
    check(clip, path, 4)
    assert clip.frames.shape[1:3] == ((48, 64) if degrees == 180 else (64, 48))
    turned_back = np.rot90(clip.frames, degrees // 90, axes=(1, 2))  # rot90 turns to the left
    assert [clips.number(image) for image in turned_back] == list(clip.indices)


# Right is what the matrix says of each corner: (x, y) is shown at (a x + c y, b x + d y).
MATRICES = [
    (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
    (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0),
]  # fmt: skip


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_orientation(matrix: tuple[int, int, int, int], name: str, tmp_path: Path) -> None:
    a, b, c, d = matrix
    path = clips.render(tmp_path / "source.mp4", 12)
    stored = read(path, 4).frames
    # Matroska has roll and yaw instead, which FFmpeg writes and reads.
    path = clips.remux(clips.place(path, a, b, c, d), tmp_path / name)
    shown = read(path, 4).frames
    height, width = stored.shape[1:3]
    y, x = np.mgrid[:height, :width]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    expected = np.empty((4, down.max() + 1, right.max() + 1, 3), np.uint8)
    expected[:, down, right] = stored[:, y, x]
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize(
    ("matrix", "nearest"),
    [
        ((0.98, 0.17, -0.17, 0.98), (1, 0, 0, 1)),  # 10 degrees
        ((0.17, 0.98, -0.98, 0.17), (0, 1, -1, 0)),  # 80 degrees
        ((-0.98, 0.17, 0.17, 0.98), (-1, 0, 0, 1)),  # a mirror, and 10 degrees
        ((0, 0, 0, 0), (1, 0, 0, 1)),  # nonsense
    ],
)
def test_another_angle_is_taken_for_the_nearest(matrix: Any, nearest: Any, tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mp4", 3)
    expected = read(clips.place(path, *nearest), 3).frames
    np.testing.assert_array_equal(read(clips.place(path, *matrix), 3).frames, expected)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_an_image(kind: str, orientation: int, tmp_path: Path) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    path, exif = tmp_path / f"image.{kind}", Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, Any] = {"webp": {"lossless": True}}.get(kind, {})
    Image.fromarray(clips.picture(0b0001_1001_0111_0010, 48, 64)).save(path, exif=exif, **lossless)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    clip = read(path, 4)
    assert clip.frames.shape == (1, *expected.shape)
    # Light or dark: FFmpeg 7 takes the full range of an AVIF for the limited one.
    assert ((clip.frames[0] < 128) == (expected < 128)).mean() > 0.98


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize(
    ("aspect", "turned", "size"),
    [
        (Fraction(4, 3), False, (48, 85)),
        (Fraction(3, 4), False, (64, 64)),
        (Fraction(4, 3), True, (85, 48)),
        (Fraction(100, 1), False, (48, 64)),  # a fault: no player shows it so
    ],
)
def test_pixels_that_are_not_square(
    name: str, aspect: Fraction, turned: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    if turned and name != "clip.mp4":
        pytest.skip("only an mp4 is turned by clips.turn")
    path = clips.render(tmp_path / name, 6, aspect=aspect)
    clip = read(clips.turn(path, 90) if turned else path, 3)
    assert clip.frames.shape == (3, *size, 3)
    upright = np.rot90(clip.frames, axes=(1, 2)) if turned else clip.frames
    assert [clips.number(image) for image in upright] == list(clip.indices)


def test_a_turn_is_told_beside_side_data_that_has_no_name(tmp_path: Path) -> None:
    """A frame that carries what PyAV has no name for still tells its turn."""

    class Frame:
        rotation = 90

        @property
        def side_data(self) -> Any:
            raise ValueError("31 is not a valid Type")

    turn = upright.turn_of(Frame())  # type: ignore[arg-type]
    image = np.arange(6).reshape(2, 3)
    turned = image.T[:: -1 if turn.flip else 1, :: -1 if turn.mirror else 1]
    np.testing.assert_array_equal(turned, np.rot90(image))


# Starts and ends

WRAP = (1 << 33) // 90000  # seconds until the clock of a transport stream begins anew


@pytest.mark.parametrize("seconds", [-4, 0, 30, 1000])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.mkv", "clip.flv"])
def test_a_clip_that_starts_late_or_early(
    name: str, seconds: int, rendered: Rendered, tmp_path: Path
) -> None:
    """Whole it is read, cut it is refused, whatever time it starts at."""
    if seconds < 0 and name == "clip.flv":
        pytest.skip("its times have no sign")
    path = clips.remux(
        rendered("late.mp4", 400),
        tmp_path / name,
        shift=-seconds * 12800,
        muxer={"movflags": "faststart"} if name[5:] in ("mp4", "mov") else None,
    )
    clip = read(path, 5)
    check(clip, path, 5)
    assert clip.total_frames == (300 if seconds < 0 and name[5:] in ("mp4", "mov") else 400)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert "the file ends early" in refused(path)


@pytest.mark.parametrize("seconds", [-4, 30, WRAP - 1, WRAP - 40, WRAP - 200])
def test_a_transport_stream_across_the_wrap_of_its_clock(
    seconds: int, rendered: Rendered, tmp_path: Path
) -> None:
    source = rendered("wrap.ts", 1500, gop=50, options={"preset": "veryfast"})
    path = clips.remux(source, tmp_path / "clip.ts", shift=-seconds * 90000)
    clip = read(path, 4)
    assert (clip.total_frames, numbers(clip)) == (1500, [0, 499, 999, 1499])
    np.testing.assert_allclose(clip.timestamps, np.array(clip.indices) / 25, atol=1e-3)


# Which stream


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("counts", [(1, 60), (60, 1), (5, 60), (1, 1, 60)])
def test_a_preview_beside_the_film(suffix: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    path = clips.side_by_side(tmp_path / f"clip.{suffix}", *counts)
    clip, film = read(path, 4), counts.index(60)
    assert numbers(clip) == [1000 * film + i for i in (0, 19, 39, 59)]
    assert clip.total_frames == 60
    assert clip.notes == ()


def test_an_animated_image_with_a_still(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    path = tmp_path / "clip.avif"
    first, *rest = (Image.fromarray(clips.picture(i, 48, 64)) for i in range(20))
    first.save(path, save_all=True, append_images=rest, duration=100)
    clip = read(path, 4)
    assert (clip.total_frames, numbers(clip)) == (20, [0, 6, 12, 19])
    assert clip.fps == pytest.approx(10)


def test_two_films_in_a_file(tmp_path: Path) -> None:
    path = clips.side_by_side(tmp_path / "clip.mkv", 50, 60)
    clip = read(path, 2)
    assert numbers(clip) == [0, 49]
    (note,) = clip.notes
    assert note.startswith("video streams 0, 1, of which 0 is read; ") and "--stream" in note
    named = read(path, 2, stream=1)
    assert (numbers(named), named.notes) == ([1000, 1059], ())
    assert numbers(read(clips.side_by_side(path, 50, 60, default=1), 2)) == [1000, 1059]


def test_a_stream_that_is_not_there(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mkv", 5, sound=1)
    for stream in (1, 7):
        with pytest.raises(VideoError, match=rf"stream {stream} is no video stream; .*: 0$"):
            read(path, 2, stream=stream)
    with pytest.raises(ValueError, match="stream must be at least 0, got -1"):
        read(path, 2, stream=-1)
    with pytest.raises(TypeError, match="stream must be an integer of at least 0, got 'a'"):
        read(path, 2, stream="a")  # type: ignore[arg-type]


def test_a_stream_that_something_decodes_is_preferred(tmp_path: Path) -> None:
    path = clips.side_by_side(tmp_path / "clip.mkv", 60, 50)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC", 1))
    assert numbers(read(path, 2)) == [1000, 1049]
    with pytest.raises(VideoError, match="no decoder for its codec"):
        read(path, 2, stream=0)


# Memory


@given(
    st.integers(1, 1 << 16),
    st.integers(1, 1 << 16),
    st.none() | st.fractions(0, 100),
    st.booleans(),
    st.integers(1, 1 << 28),
)
def test_a_shown_size_is_bounded(
    width: int, height: int, aspect: Fraction | None, transpose: bool, most: int
) -> None:
    turn = upright.Turn(transpose)
    high, wide = upright.shown_size(width, height, aspect, turn, most)
    assert min(high, wide) >= 1
    assert high * wide <= most
    if aspect in (None, 1) and width * height <= most:
        assert (high, wide) == ((width, height) if transpose else (height, width))
    if min(high, wide) >= 100:
        ratio = (width / height) * float(aspect if aspect and 0.1 <= aspect <= 10 else 1)
        assert (high / wide if transpose else wide / high) == pytest.approx(ratio, rel=0.02)


def test_frames_are_scaled_down_to_the_pixels_allowed(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mp4", 12, size=(96, 128))
    whole = read(path, 4, max_pixels=4 * 96 * 128)
    assert (whole.frames.shape, whole.notes) == ((4, 96, 128, 3), ())
    scaled = read(path, 4, max_pixels=96 * 128)
    assert (scaled.frames.shape, numbers(scaled)) == ((4, 48, 64, 3), list(scaled.indices))
    (note,) = scaled.notes
    assert note == "frames of 128 x 96 pixels are read at 64 x 48 (max_pixels=, --max-pixels)"
    assert read(clips.turn(path, 90), 4, max_pixels=96 * 128).frames.shape == (4, 64, 48, 3)
    assert read(path, 1, max_pixels=1).frames.shape == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        read(path, 1, max_pixels=0)


@pytest.mark.parametrize("size", [(16000, 16000), (65535, 2000)])
def test_what_a_file_claims_takes_no_memory(size: tuple[int, int], tmp_path: Path) -> None:
    path = clips.claiming_gif(tmp_path / "clip.gif", *size, 80)
    message = refused(path, 80)
    assert f"pictures of {size[0]} x {size[1]} pixels, more than the limit of 67108864" in message
    assert f"max_pixels={4 * size[0] * size[1]} (--max-pixels)" in message


def test_many_large_frames_together_are_bounded(tmp_path: Path) -> None:
    path = clips.claiming_gif(tmp_path / "clip.gif", 3000, 2000, 20)
    clip = read(path, 20, max_pixels=20 * 300 * 200)
    assert clip.frames.shape == (20, 200, 300, 3)


def test_too_little_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    path = clips.render(tmp_path / "clip.mp4", 5)
    monkeypatch.setattr(np, "empty", full)
    assert "too little memory for 4 frames; take fewer, or smaller ones" in refused(path)


def test_frames_outside_an_edit_list_do_not_count(tmp_path: Path, spy: Spy) -> None:
    source = clips.render(tmp_path / "whole.mp4", 60)
    path = clips.remux(source, tmp_path / "edited.mp4", shift=20 * 512)  # 512 ticks a frame
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 60
    assert len(oracle(path)) == 40
    spy.opened = 0
    for count in COUNTS:
        clip = read(path, count)
        check(clip, path, count, total=40)
        assert numbers(clip) == [20 + i for i in clip.indices]
    assert spy.opened == 2 * len(COUNTS)  # seen from the packets: nothing is decoded twice


def test_packets_that_give_no_frame_do_not_count(tmp_path: Path, spy: Spy) -> None:
    """A recording that starts between keyframes: its first packets decode to nothing."""
    source = clips.render(tmp_path / "whole.ts", 60)
    path = clips.remux(source, tmp_path / "tail.ts", skip=5)
    for count in COUNTS:
        clip = read(path, count)
        check(clip, path, count, total=48)
        assert numbers(clip) == [12 + i for i in clip.indices]
    assert spy.open == 0


def test_a_change_of_size_takes_the_first_size(tmp_path: Path) -> None:
    path = tmp_path / "both.h264"
    small = clips.render(tmp_path / "small.h264", 10, size=(48, 64))
    large = clips.render(tmp_path / "large.h264", 10, size=(96, 128))
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read(path, 20)
    assert clip.frames.shape == (20, 48, 64, 3)
    assert numbers(clip) == [*range(10), *range(10)]


@pytest.mark.parametrize("name", ["a:b.mp4", "with space %03d [x].mp4", "ünï.mp4"])
def test_awkward_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips.render(tmp_path / "clip.mp4", 5).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert read(name, 2).indices == (0, 4)
    assert read(Path(name), 2).path == name


def test_metadata_in_another_encoding_is_no_error(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mkv", 5, metadata={"title": "caf??"})
    path.write_bytes(path.read_bytes().replace(b"caf??", b"caf\xe9\xe8"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert read(path, 2).indices == (0, 4)


# Long clips


@pytest.fixture(scope="module", params=["long.mp4", "long.mkv", "long.ts"])
def long(request: pytest.FixtureRequest, folder: Path) -> Path:
    path = folder / request.param
    return clips.render(path, 2000, gop=50, options={"preset": "veryfast"})


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_a_long_clip_is_read_by_jumps_to_the_exact_frames(long: Path, count: int, spy: Spy) -> None:
    clip = read(long, count)
    assert list(clip.indices) == sample_indices(2000, count) == numbers(clip)
    assert spy.jumps
    assert spy.decoded < count * 60
    assert spy.opened == 2
    check(clip, long, count, total=2000)


def test_many_frames_of_a_long_clip_need_no_jump(long: Path, spy: Spy) -> None:
    clip = read(long, 33)
    assert list(clip.indices) == numbers(clip)
    assert not spy.jumps


@pytest.mark.parametrize("late", [-4000, 4000, 10**9, None])
def test_a_jump_that_goes_wrong_is_noticed(
    late: int | None, long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch, late)
    clip = read(long, 3)
    assert spy.jumps
    assert numbers(clip) == list(clip.indices) == [0, 999, 1999]
    assert spy.open == 0
    if late == -4000 and long.suffix == ".mkv":  # four seconds: the keyframe before the last
        assert spy.opened == 2  # all is well, only later


def test_only_the_sampled_frames_are_held(tmp_path: Path, spy: Spy) -> None:
    size = (480, 640)
    path = clips.render(tmp_path / "clip.mp4", 120, size=size, options={"preset": "ultrafast"})
    tracemalloc.start()
    try:
        clip = read(path, 6)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spy.decoded == 120
    assert spy.most_alive <= 3
    assert peak < clip.frames.nbytes + 3 * clip.frames[0].nbytes


# Progress, and closing


def test_progress_counts_to_the_frames_that_there_are(tmp_path: Path) -> None:
    path, seen = clips.render(tmp_path / "clip.mp4", 5), []
    read(path, 3, lambda done, asked: seen.append((done, asked)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    read(path, 32, lambda done, asked: seen.append((done, asked)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_an_error_in_progress_passes_and_the_file_is_closed(tmp_path: Path, spy: Spy) -> None:
    def stop(done: int, asked: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(clips.render(tmp_path / "clip.mp4", 5), 3, stop)
    assert spy.opened > 0
    assert spy.open == 0


# Bad files


def refused(path: Path, count: int = 4) -> str:
    """What the error says of this file, after its name."""
    with pytest.raises(VideoError) as caught:
        read(path, count)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_no_such_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.mp4") == "no such file"


def test_a_folder(tmp_path: Path) -> None:
    assert "a folder, not a video file" in refused(tmp_path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # nobody writes: whoever opens it waits for ever
    assert refused(tmp_path / "pipe.mp4") == (
        "a pipe, and a clip is read twice; save it to a file first"
    )
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s"))
        assert "a socket, and a clip is read twice" in refused(tmp_path / "s")
    for device in ("/dev/zero", "/dev/null"):
        assert "a device, and a clip is read twice" in refused(Path(device))
    assert "not read from standard input, save it to a file" in refused(Path("-"))
    reader, writer = os.pipe()
    try:
        assert "a pipe, and" in refused(Path(f"/dev/fd/{reader}"))
    finally:
        os.close(reader)
        os.close(writer)


def test_names_that_cannot_be_opened(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mp4", 2)
    with pytest.raises(VideoError, match=r"cannot be opened \(Not a directory\)"):
        read(path / "more", 2)
    null = "embedded null byte|stat: embedded null character in path"  # Python 3.13's words
    with pytest.raises(VideoError, match=rf"cannot be opened \(({null})\)"):
        read("a\0b", 2)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    assert refused(tmp_path / "link.mp4") == "no such file"
    (tmp_path / "good.mp4").symlink_to(path)
    assert read(tmp_path / "good.mp4", 2).total_frames == 2


def test_no_other_file_is_opened(tmp_path: Path) -> None:
    """Playlists, lists of files and name patterns: the files that they mean are good, and near."""
    clips.render(tmp_path / "clip.ts", 5)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    assert "not a readable video" in refused(tmp_path / "list.mp4")
    (tmp_path / "list.m3u8").write_text(playlist)
    assert "a list of other files, none of which is followed" in refused(tmp_path / "list.m3u8")
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile clip.ts\n")
    assert "a list of other files, none of which is followed" in refused(tmp_path / "list.txt")
    for name in ("image0.png", "image1.png", "image%d.png"):
        Image.fromarray(clips.picture(0, 48, 64)).save(tmp_path / name)
    assert "a list of other files, none of which is followed" in refused(tmp_path / "image%d.png")


def test_an_animated_webp(tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(clips.picture(i, 48, 64)) for i in range(5))
    first.save(tmp_path / "still.webp", lossless=True)
    assert numbers(read(tmp_path / "still.webp", 4)) == [0]
    first.save(tmp_path / "clip.webp", save_all=True, append_images=rest, duration=100)
    message = refused(tmp_path / "clip.webp")
    assert message.startswith("an animated WebP, which FFmpeg does not decode; convert it")


def test_a_file_of_which_nothing_decodes(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mp4", 10, codec="mpeg4")
    clips.damage(path, 0)
    message = refused(path)
    assert message.startswith("none of its mpeg4 frames decodes (")
    assert "not supported by this FFmpeg; convert it" in message


@pytest.mark.parametrize("content", [b"", b"Some text.\n" * 50, bytes(range(256)) * 50])
@pytest.mark.parametrize("name", ["file.mp4", "file.txt", "file"])
def test_not_a_video(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert "not a readable video" in refused(path)


def test_sound_alone(tmp_path: Path, spy: Spy) -> None:
    for name in ("sound.m4a", "sound.mkv"):
        path = clips.render(tmp_path / name, 0, sound=1)
        assert refused(path) == "holds no video stream, only sound or other data"
    assert spy.open == 0


def test_sound_with_a_cover_picture(tmp_path: Path) -> None:
    path = clips.with_cover(tmp_path / "song.mp3")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert "no video stream" in refused(path)


@pytest.mark.parametrize(
    ("name", "known", "unknown"),
    [("a.mp4", b"avc1", b"zzzz"), ("a.mkv", b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC")],
)
def test_a_codec_that_nothing_decodes(
    name: str, known: bytes, unknown: bytes, tmp_path: Path
) -> None:
    path = clips.render(tmp_path / name, 5)
    path.write_bytes(path.read_bytes().replace(known, unknown))
    assert "no decoder for its codec; re-encode it" in refused(path)


def test_sound_that_nothing_decodes_does_not_matter(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mkv", 50, sound=1)
    path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_XXX"))
    assert read(path, 2).indices == (0, 49)


def test_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "empty.mkv"
    source = clips.render(tmp_path / "clip.mkv", 5, sound=1)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(audio=0):
            if packet.size:
                packet.stream = sound
                new.mux(packet)
    assert refused(path) == "holds no frames"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("index-first.mp4", {"muxer": {"movflags": "faststart"}}),
        ("index-first-sound.mp4", {"muxer": {"movflags": "faststart"}, "sound": 16}),
        ("cut.mkv", {}),
        ("cut-sound.mkv", {"sound": 16}),
        ("cut.flv", {}),
    ],
)
def test_a_file_that_ends_early(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = clips.render(tmp_path / name, 400, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 4 // 5])  # x264 writes a few bytes more or less
    for count in COUNTS[1:]:
        message = refused(path, count)
        assert "the file ends early: only" in message
        there, total = (int(word) for word in message.split() if word.isdigit())
        assert 100 < there < 380 < total < 420
    clip = read(path, 1)  # the middle of what should be there is there
    assert numbers(clip) == list(clip.indices)
    assert clip.total_frames == total


def test_a_file_that_lost_its_index(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "index-last.mp4", 60)
    path.write_bytes(path.read_bytes()[:-200])
    assert "cut off" in refused(path)


def test_a_count_that_is_off_by_a_little_is_no_error(tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.webm", 100, codec="libvpx-vp9", gop=10)
    with av.open(str(path)) as container:
        last = [packet.pos for packet in container.demux(video=0) if packet.size][-3]
    path.write_bytes(path.read_bytes()[:last])
    clip = read(path, 5)
    check(clip, path, 5, total=len(oracle(path)))
    assert 95 <= clip.total_frames < 100


@pytest.mark.parametrize("name", ["clip.mp4", "bare.h264"])
def test_damage_counts_only_up_to_the_last_sampled_frame(name: str, tmp_path: Path) -> None:
    path = clips.render(tmp_path / "clip.mp4", 60, codec="mpeg4")
    clips.damage(path, 40)
    if name != path.name:
        path = clips.remux(path, tmp_path / "clip.m4v")  # bare, without times
    assert len(oracle(path)) == 40
    clip = read(path, 1)
    check(clip, path, 1, total=60)
    for count in COUNTS[1:]:
        message = refused(path, count)
        assert message.startswith("damaged (")
        assert message.endswith("only 40 of 60 frames can be read")


def test_damage_behind_a_jump_is_told_by_its_true_place(tmp_path: Path, spy: Spy) -> None:
    path = clips.render(tmp_path / "clip.mp4", 1000, codec="mpeg4", gop=50)
    clips.damage(path, 970)
    assert refused(path, 2).endswith("only 970 of 1000 frames can be read")
    assert spy.jumps
    assert spy.open == 0


# Real clips, where the folder is there


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("car-detection.mp4", 377),
        ("bottle-detection.mp4", 1189),
        ("asl-walk.mkv", 89),
        ("nasa.mp4", 325),
        ("nasa-rotated.mp4", 17),
        ("av1.mkv", 125),
        ("h265.mp4", 10),
        ("non-zero-start.mp4", 12),
    ],
)
def test_real_clips(name: str, total: int) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the folder of real clips is missing: {os.path.relpath(SHARED)}")
    for count in COUNTS:
        clip = read(SHARED / name, count)
        check(clip, SHARED / name, count, total=total)
        assert clip.fps == pytest.approx(clip.total_frames / clip.duration)


def test_real_damage() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the folder of real clips is missing: {os.path.relpath(SHARED)}")
    path = SHARED / "corrupted.mp4"
    check(read(path, 1), path, 1, total=50)
    for count in COUNTS[1:]:
        assert refused(path, count).endswith("only 28 of 50 frames can be read")
