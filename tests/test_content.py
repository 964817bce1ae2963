"""A watched clip is told from another by its frames: their prompts are equal."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import checkpoints
import clips
import numpy as np
import pytest
import torch

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.evaluate.storyqa import StoryQA
from dycoke.nano import build, stories
from dycoke.video import Video, read


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: Any) -> Assistant:
    folder = checkpoints.CHECKPOINTS["qwen2_5_vl"](tmp_path_factory.mktemp("checkpoints"))
    return Assistant.load(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    return clips.render(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


def another(video: Video) -> Video:
    """As many frames of one size at the same times, of something else."""
    return dataclasses.replace(video, frames=np.ascontiguousarray(255 - video.frames))


@pytest.mark.parametrize("compressor", [None, DyCoke()], ids=["none", "dycoke"])
def test_another_clip_of_the_same_length_is_refused(
    assistant: Assistant, clip: Path, compressor: DyCoke | None
) -> None:
    video = read(clip, 6)
    other = another(video)
    ids = [assistant.prepare(v, "what")["input_ids"] for v in (video, other)]
    assert torch.equal(*ids)  # nothing in the prompt tells
    seen = assistant.watch(video, compressor)
    expected = seen.ask("what happens", max_new_tokens=3).tokens
    for same in (video, copy.deepcopy(video), clip, str(clip)):
        assert seen.ask("what happens", max_new_tokens=3, video=same).tokens == expected
    for wrong in (other, read(clip, 5)):
        with pytest.raises(ValueError, match=r"is not the clip that was watched"):
            seen.ask("what happens", max_new_tokens=3, video=wrong)
    # The frames of the watched clip may have been overwritten since.
    kept = video.frames.copy()
    video.frames[:] = other.frames
    with pytest.raises(ValueError, match=r"is not the clip that was watched"):
        seen.ask("what happens", max_new_tokens=3, video=video)
    assert seen.ask("what happens", max_new_tokens=3).tokens == expected
    video.frames[:] = kept


def test_inputs_of_another_clip_are_refused(assistant: Assistant, clip: Path) -> None:
    seen = assistant.watch(clip, DyCoke(), frames=6)
    inputs = assistant.prepare(another(read(clip, 6)), "what")
    for name in ("input_ids", "pixel_values_videos"):
        with pytest.raises(ValueError, match=rf"{name}: the questions of watch\(\)"):
            seen.ask("what", max_new_tokens=2, **{name: inputs[name]})


def test_stories_of_one_seed_have_their_own_features(tmp_path: Path) -> None:
    """A story is more than its seed: both splits number theirs from 0."""
    folder = build.build(tmp_path / "nano", seed=3)
    task = StoryQA(Assistant.load(folder, device="cpu"), "seen", 0, 2)
    told = [stories.make(split, 0) for split in ("seen", "unseen")]  # type: ignore[arg-type]
    with torch.inference_mode():
        first, second = (task._encode(story).features for story in told)
        again = task._encode(told[0]).features
    assert not torch.equal(first, second)
    assert again is first
