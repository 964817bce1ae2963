"""A clip is decoded while the model loads, and a bad one is refused before."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest

import dycoke.video
from dycoke.assistant import Assistant
from dycoke.cli.clip import ReadingClip
from dycoke.cli.console import BadInput
from dycoke.video import VideoError

PATIENCE = 60.0  # seconds until a test that hangs is one that fails


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    return clips.render(tmp_path_factory.mktemp("clips") / "clip.mp4", 12)


def test_the_frames_are_those_of_a_plain_reading(path: Path) -> None:
    with ReadingClip(path, 5) as reading:
        video, seconds = reading.video()
    assert np.array_equal(video.frames, dycoke.video.read(path, 5).frames) and seconds > 0


@pytest.fixture
def reader(monkeypatch: Any) -> Callable[[Any], None]:
    """Put something in place of `dycoke.video.read`, with the true one to call."""
    true = dycoke.video.read

    def replace(instead: Any) -> None:
        monkeypatch.setattr(dycoke.video, "read", lambda path, *how: instead(true, path, *how))

    return replace


def test_decoding_goes_on_while_the_model_loads(
    reader: Any, monkeypatch: Any, run: Any, path: Path
) -> None:
    loading, loaded = threading.Event(), threading.Event()
    load = Assistant.load

    def slowly(true: Any, path: Path, frames: int, progress: Any, *how: Any) -> Any:
        progress(1, frames)
        assert loading.wait(PATIENCE)  # would wait for ever if it had to end first
        video = true(path, frames, progress, *how)
        loaded.set()
        return video

    def loads(*args: Any) -> Any:
        loading.set()
        assert loaded.wait(PATIENCE)
        return load(*args)

    reader(slowly)
    monkeypatch.setattr(Assistant, "load", loads)
    code, out, err = run("run", path, "--frames", 4, "--max-new-tokens", 1, "--json")
    assert code == 0, err
    timings = json.loads(out)["timings"]
    assert timings["decode_s"] > 0 and timings["process_s"] > 0
    both = timings["decode_s"] + timings["process_s"]
    assert timings["video_s"] == pytest.approx(both) and timings["total_s"] > both


def test_a_bad_file_is_refused_before_the_block(tmp_path: Path) -> None:
    bad = tmp_path / "no.mp4"
    bad.write_text("no video")
    with pytest.raises(BadInput, match=r"no\.mp4"):
        with ReadingClip(bad, 4):
            pytest.fail("entered")
    assert not [thread for thread in threading.enumerate() if thread.name == "decoding"]


def test_a_file_that_breaks_off_is_refused_when_asked_for(reader: Any, path: Path) -> None:
    def breaks(true: Any, path: Path, frames: int, progress: Any, *how: Any) -> Any:
        progress(1, frames)
        assert entered.wait(PATIENCE)
        raise VideoError("only 1 of 4 frames")

    entered = threading.Event()
    reader(breaks)
    with pytest.raises(BadInput, match="only 1 of 4"):
        with ReadingClip(path, 4) as reading:
            entered.set()
            reading.video()


def test_other_errors_are_not_taken_for_the_files(reader: Any, path: Path) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a fault")

    reader(fails)
    with pytest.raises(RuntimeError, match="a fault"):
        with ReadingClip(path, 4):
            pytest.fail("entered")


def test_decoding_stops_where_the_block_is_left(reader: Any, path: Path) -> None:
    stopped = threading.Event()

    def endless(true: Any, path: Path, frames: int, progress: Any, *how: Any) -> Any:
        try:
            for _ in range(round(PATIENCE * 1000)):
                progress(1, frames)
                time.sleep(0.001)
        except Exception:
            stopped.set()
            raise

    reader(endless)
    with pytest.raises(KeyError):
        with ReadingClip(path, 4):
            raise KeyError
    assert stopped.is_set()
