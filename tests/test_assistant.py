"""From a file to an answer, on tiny checkpoints loaded as real ones are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import checkpoints
import clips
import pytest
import torch
from support import untouched
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from dycoke import DyCoke, Step, UnsupportedError
from dycoke.assistant import Assistant, metadata_of
from dycoke.video import Video, VideoError, read

FRAMES = 20
FUSED = ("qwen2_5_vl", "glm4v")  # two frames become one slice
every = pytest.mark.parametrize("family", checkpoints.CHECKPOINTS)


@pytest.fixture(scope="module")
def load(tmp_path_factory: Any) -> Any:
    loaded: dict[str, Assistant] = {}

    def get(family: str) -> Assistant:
        if family not in loaded:
            folder = checkpoints.CHECKPOINTS[family](tmp_path_factory.mktemp("checkpoints"))
            loaded[family] = Assistant.load(folder, device="cpu")
        return loaded[family]

    return get


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    return clips.render(tmp_path_factory.mktemp("clips") / "clip.mp4", FRAMES)


@every
def test_the_answer_is_that_of_the_users_own_call(family: str, load: Any, clip: Path) -> None:
    assistant = load(family)
    video = read(clip, 9)
    with untouched(assistant.model):
        answer = assistant.ask(video, "what happens", DyCoke(), max_new_tokens=6)
    inputs = assistant.prepare(video, "what happens")
    source = "images" if family in ("internvl", "smolvlm") else None
    with DyCoke()(assistant.model, frame_source=source) as run:
        ids = assistant.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = assistant.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answer.text == text
    assert answer.report == run.report
    assert answer.report is not None and answer.report.engaged
    frames = answer.report.samples[0].frames
    assert frames == (5 if family in FUSED else 9)


@every
@pytest.mark.parametrize(
    "compressor", [None, DyCoke(0, 0), DyCoke()], ids=["none", "idle", "dycoke"]
)
def test_questions_on_a_watched_video(
    family: str, compressor: DyCoke | None, load: Any, clip: Path, monkeypatch: Any
) -> None:
    """Answers are those of `ask`, another video in between or not, and the encoder ran once."""
    assistant = load(family)
    video, other = read(clip, 9), read(clip, 4)
    questions = ("what happens", "what", "happens w9 w10 what")
    expected = [assistant.ask(video, q, compressor, max_new_tokens=6) for q in questions]
    seen = assistant.watch(video, compressor)
    assistant.watch(other, compressor)
    monkeypatch.setattr(assistant, "prepare", None)
    with untouched(assistant.model):
        for question, answer in zip(questions * 2, expected * 2, strict=True):
            again = seen.ask(question, max_new_tokens=6)
            assert (again.text, again.tokens) == (answer.text, answer.tokens)
            assert again.timings.vision_s == 0 and again.timings.prefill_s > 0
            if compressor is not None and not compressor.idle:
                assert again.report is not None and answer.report is not None
                assert again.report.samples == answer.report.samples
    assert seen.timings.vision_s > 0
    assert (seen.report is None) == (compressor is None)


@every
def test_steps_of_questions_on_a_watched_video(family: str, load: Any, clip: Path) -> None:
    """A question hears of itself, though nobody listened when the video was watched."""
    assistant = load(family)
    video, steps, heard = read(clip, 9), list[Step](), list[Step]()
    expected = assistant.ask(
        video, "what happens", DyCoke(), max_new_tokens=6, trace=True, on_step=steps.append
    )
    assert expected.trace is not None and len(steps) == len(expected.tokens)
    seen = assistant.watch(video, DyCoke())
    again = seen.ask("what happens", max_new_tokens=6, on_step=heard.append)
    assert again.tokens == expected.tokens
    assert [step.index for step in heard] == [step.index for step in steps]
    sample = expected.trace.samples[0]
    for one, other in zip(steps, heard, strict=True):
        assert torch.equal(one.active, other.active)
        assert torch.equal(other.videos[0][0].keep, sample.keep[0])
        if one.index:
            assert torch.equal(other.samples[0].active, sample.active[one.index - 1])
    seen.ask("what", max_new_tokens=2)
    assert len(heard) == len(steps)  # not of another question
    every: list[Step] = []
    seen = assistant.watch(video, DyCoke(), on_step=every.append)
    seen.ask("what", max_new_tokens=2)
    assert [step.index for step in every] == [0, 0, 1]


def test_cells_that_the_encoder_leaves_out(load: Any, clip: Path) -> None:
    """Chunks of frames, which `ask` and `watch` make by themselves, are whole windows then."""
    assistant, method = load("llava_onevision"), DyCoke(skip_ratio=0.5)
    expected = assistant.ask(clip, "what", method, frames=9, encode_frames=9, max_new_tokens=4)
    assert expected.report is not None
    video = expected.report.samples[0].videos[0]
    assert video.encoded_tokens < video.visual_tokens
    for encode_frames in ("auto", 4):
        answer = assistant.ask(
            clip, "what", method, frames=9, encode_frames=encode_frames, max_new_tokens=4
        )
        assert (answer.tokens, answer.report) == (expected.tokens, expected.report)
        seen = assistant.watch(clip, method, frames=9, encode_frames=encode_frames)
        assert seen.ask("what", max_new_tokens=4).tokens == expected.tokens


@every
def test_questions_where_text_is_not_tokenised_alone_take_the_processor(
    family: str, load: Any, clip: Path, monkeypatch: Any
) -> None:
    assistant = load(family)
    expected = assistant.ask(clip, "what happens", DyCoke(), frames=5, max_new_tokens=6)
    monkeypatch.setattr("dycoke.assistant.Seen._tail", lambda self, said, reader: None)
    seen = assistant.watch(clip, DyCoke(), frames=5)
    assert seen.ask("what happens", max_new_tokens=6).tokens == expected.tokens


@every
def test_pieces_arrive_as_they_come(family: str, load: Any, clip: Path) -> None:
    pieces: list[str] = []
    answer = load(family).ask(
        clip, "what happens", DyCoke(), frames=5, max_new_tokens=8, on_text=pieces.append
    )
    assert "".join(pieces).strip() == answer.text


@every
def test_stages_are_timed_apart(family: str, load: Any, clip: Path) -> None:
    for compressor in (None, DyCoke()):
        answer = load(family).ask(clip, "what happens", compressor, frames=5, max_new_tokens=4)
        t = answer.timings
        stages = (t.video_s, t.vision_s, t.prefill_s, t.per_token_s)
        assert all(stage > 0 for stage in stages)
        assert t.ttft_s == t.vision_s + t.compress_s + t.prefill_s
        assert t.total_s > t.video_s + t.ttft_s
        assert (answer.report is None) == (compressor is None)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7, 33])
@every
def test_frame_counts(family: str, frames: int, load: Any, clip: Path) -> None:
    if family == "glm4v" and frames == 1:
        with pytest.raises(UnsupportedError, match=r"1 frame of .* at least 2; sample more"):
            load(family).ask(clip, "what happens", frames=frames)
        return
    answer = load(family).ask(clip, "what happens", DyCoke(), frames=frames, max_new_tokens=3)
    assert answer.report is not None
    taken = min(frames, FRAMES)
    expected = -(-taken // 2) if family in FUSED else taken
    assert answer.report.samples[0].frames == expected


# Times in the prompt

SLOWING = [40 * i for i in range(30)] + [1200 + 7300 * i for i in range(10)]  # milliseconds


def told(assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """The prompt as the processor hands it to the tokenizer, and the inputs."""
    texts: list[Any] = []
    kind = type(assistant.processor.tokenizer)
    call = kind.__call__

    def spy(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        texts.append(text)
        return call(self, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", spy)
        inputs = assistant.prepare(video, "what happens")
    return texts[-1][0], inputs


@pytest.mark.parametrize("name", ["slowing.mkv", "slowing.mp4"])
@every
def test_a_prompt_tells_when_a_frame_is_shown(
    family: str, name: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = read(clips.render(tmp_path / name, 40, times=SLOWING), 8)
    seconds = [SLOWING[i] / 1000 for i in video.indices]
    prompt, inputs = told(load(family), video, monkeypatch)
    clocks = [f"{int(s // 60):02d}:{int(s % 60):02d}" for s in seconds]
    expected: list[Any] = {
        "video_llama_3": [f"{s:.1f}" for s in seconds],
        "smolvlm": clocks,
        "glm4v": [str(int(s)) for s in seconds[::2]],  # of each two frames the first
    }.get(family, [])
    pattern = {
        "video_llama_3": r"Time ([\d.]+)s:",
        "smolvlm": r"Frame from (\d\d:\d\d):",
        "glm4v": r"<\|end_of_image\|>(\d+)",
    }.get(family, r"^\b$")
    assert re.findall(pattern, prompt) == expected
    seen = load(family).watch(video)._ids
    assert torch.equal(seen, inputs["input_ids"][:, : seen.shape[1]])
    if family == "qwen2_5_vl":  # one step for all: of two frames, the mean
        step = 2 * (seconds[-1] - seconds[0]) / 7
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([step], rel=1e-5)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.flv"])
@every
def test_a_clip_of_even_rate_gets_the_prompt_of_a_stock_call(
    family: str, name: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte, though times in some of these files are rounded to milliseconds."""
    assistant = load(family)
    video = read(clips.render(tmp_path / name, 40, rate=30), 7)
    prompt, inputs = told(assistant, video, monkeypatch)
    stock = VideoMetadata(
        total_num_frames=40, fps=30.0, duration=40 / 30, frames_indices=list(video.indices)
    )
    monkeypatch.setattr("dycoke.assistant.metadata_of", lambda video: stock)
    text, expected = told(assistant, video, monkeypatch)
    assert prompt == text
    assert inputs.keys() == expected.keys()
    assert all((inputs[key] == expected[key]).all() for key in inputs)


def test_what_every_other_processor_is_told(tmp_path: Path) -> None:
    video = read(clips.render(tmp_path / "slowing.mp4", 40, times=SLOWING), 7)
    seconds = [SLOWING[i] / 1000 for i in video.indices]
    metadata = metadata_of(video)
    assert metadata.timestamps == seconds
    # Gemma 4 reads `timestamps`; Qwen3-VL and Qwen3.5 take the middle of two frames.
    pairs = Qwen3VLProcessor._calculate_timestamps(
        None, list(metadata.frames_indices), metadata.fps, 2
    )
    padded = [*seconds, seconds[-1]]
    assert pairs == pytest.approx(
        [(a + b) / 2 for a, b in zip(padded[::2], padded[1::2], strict=True)]
    )
    assert metadata.duration == video.duration
    assert max(metadata.frames_indices) < metadata.total_num_frames


def test_one_frame_of_an_uneven_clip(load: Any, tmp_path: Path) -> None:
    video = read(clips.render(tmp_path / "slowing.mp4", 40, times=SLOWING), 1)
    assert metadata_of(video).timestamps == [SLOWING[20] / 1000]
    load("qwen2_5_vl").prepare(video, "what happens")


class _Refusing:
    """A processor that takes no frames."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **_: Any) -> None:
        raise ValueError("too wide")


def test_frames_that_a_processor_refuses(load: Any, clip: Path, monkeypatch: Any) -> None:
    assistant = load("llava_onevision")
    monkeypatch.setattr(assistant, "processor", _Refusing(assistant.processor))
    message = (
        r"llava_onevision processor does not take 5 frames of \d+ x \d+ pixels here \(too wide\)"
    )
    for ask in (assistant.ask, lambda video, question: assistant.watch(video)):
        with pytest.raises(UnsupportedError, match=message):
            ask(read(clip, 5), "what happens")


def test_devices_and_dtypes() -> None:
    assert Assistant.load(dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'float99'"):
        Assistant.load(dtype="float99", device="cpu")


def test_errors_come_through(load: Any, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"none\.mp4"):
        load("llava_onevision").ask(tmp_path / "none.mp4", "what happens")
