"""The worker's model: `dycoke.assistant.Assistant`, with videos read ahead and batches."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dycoke.assistant import Answer, Assistant
from dycoke.batch.items import Item, Member
from dycoke.batch.rows import Clip, Reply, Stamp
from dycoke.batch.worker import Loaded
from dycoke.batching import Row as Place
from dycoke.batching import answer_rows, collate, pad_of, shapes
from dycoke.compressor import Compressor
from dycoke.models.locate import frame_source_of, visual_tokens
from dycoke.report import Report
from dycoke.timing import Timings
from dycoke.video import Video, read

NANO = "nano"


@dataclass(frozen=True)
class ModelSpec:
    """What a process needs to load the model.

    Attributes
    ----------
    model, device, dtype : as in `Assistant.load`.
    compressor : None for the model as it is.
    method : what rows call it.
    max_new_tokens : length limit of an answer.
    threads : of torch; None for its own choice.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    compressor: Compressor | None = None
    method: str = "full"
    max_new_tokens: int = 128
    threads: int | None = None

    def build(self) -> ModelAnswerer:
        """The model with its processor.

        Raises
        ------
        OSError, ValueError
            As `Assistant.load`.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return ModelAnswerer(Assistant.load(self.model, self.device, self.dtype), self)

    def on(self, worker: int, workers: int) -> ModelSpec:
        """One worker's: a GPU each, in turn; on the CPU a share of its cores."""
        if self.device is None and torch.cuda.is_available():
            return replace(self, device=f"cuda:{worker % torch.cuda.device_count()}")
        if self.device == "cpu" or not (self.device or torch.backends.mps.is_available()):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            most = min(torch.get_num_threads(), max(1, cores // workers))
            return replace(self, threads=self.threads or most)
        return self


@dataclass
class _Content:
    """A video that is read: inputs for its first question, and what reading took.

    ``tokens`` are the full model's, where no compressor will count them.
    """

    video: Video
    inputs: dict[str, Any]
    tokens: dict[str, int]
    seconds: float


class ModelAnswerer:
    """Answers with a video LLM; see `dycoke.batch.worker.Answerer`."""

    def __init__(self, assistant: Assistant, spec: ModelSpec) -> None:
        self.assistant, self.spec = assistant, spec
        self._reader = assistant.reader()
        settings = {} if spec.compressor is None else spec.compressor.to_dict()
        self.stamp = Stamp(spec.method, settings, spec.model or NANO)

    def load(self, item: Item, scratch: str) -> Loaded:
        """Sample a video's frames, and make the inputs of its first question.

        Raises
        ------
        VideoError, UnsupportedError
            As `Assistant.ask`.
        """
        began = time.perf_counter()
        with _file(item, scratch) as path:
            video = read(path, item.frames)
        inputs = self._reader.prepare(video, item.questions[0].prompt)
        alone = len(item.questions) > 1
        key = None if alone else (len(video.frames), shapes(inputs))
        tokens = {} if self.spec.compressor is not None else self._all_tokens(inputs)
        content = _Content(video, inputs, tokens, time.perf_counter() - began)
        return Loaded(Clip(len(video.frames), video.duration), key, content)

    def _all_tokens(self, inputs: dict[str, Any]) -> dict[str, int]:
        """The visual tokens of a prompt, all of which the full model keeps and attends to."""
        config = self.assistant.model.config
        count = visual_tokens(config, inputs, frame_source_of(config))
        return dict.fromkeys(("visual", "kept", "active"), count) if count else {}

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        """One left-padded batch of videos with a question each; or all questions of one video."""
        contents: list[_Content] = [one.content for one in loaded]
        if len(items[0].questions) > 1:
            return [
                self._watched(item, content) for item, content in zip(items, contents, strict=True)
            ]
        inputs = [content.inputs for content in contents]
        batch = inputs[0] if len(inputs) == 1 else collate(inputs, pad_of(self.assistant))
        answers = self._answer(batch, len(items))
        return [
            [self._reply(answer, content, content.inputs["input_ids"].shape[1], len(items))]
            for answer, content in zip(answers, contents, strict=True)
        ]

    def broken(self, error: Exception) -> bool:
        """Whether the GPU's context is lost; too little memory for one video is no such thing."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return False
        return isinstance(error, getattr(torch, "AcceleratorError", ()))

    def _answer(self, inputs: dict[str, Any], count: int) -> list[Answer]:
        rows = [Place(self.spec.max_new_tokens) for _ in range(count)]
        return answer_rows(self.assistant, inputs, rows, self.spec.compressor)

    def _watched(self, item: Item, content: _Content) -> list[Reply]:
        """All questions of a video, which is encoded and prefilled once."""
        prepared = item.questions[0].prompt, content.inputs
        seen = self.assistant.watch(content.video, self.spec.compressor, prepared=prepared)
        count, replies = len(item.questions), []
        shared = replace(content, seconds=content.seconds / count)
        for question in item.questions:
            began = time.perf_counter()
            inputs = seen.inputs(question.prompt)
            asking = time.perf_counter() - began
            answer = self._answer(inputs, 1)[0]
            own = replace(shared, seconds=shared.seconds + asking)
            reply = self._reply(answer, own, inputs["input_ids"].shape[1], 1)
            replies.append(_with_share(reply, seen.timings, count, seen.report))
        return replies

    def _reply(self, answer: Answer, content: _Content, length: int, count: int) -> Reply:
        times, read_s = answer.timings, content.seconds
        counts = {**content.tokens, **_tokens(answer.report)}
        return Reply(
            answer.text,
            answer.finish_reason,
            {**counts, "prompt": length, "new": len(answer.tokens)},
            {
                "decode": read_s,
                "encode": times.vision_s / count,
                "prefill": (times.compress_s + times.prefill_s) / count,
                "decode_step": times.per_token_s,
                "total": read_s + times.total_s / count,
            },
        )


def _tokens(report: Report | None) -> dict[str, int | None]:
    """Visual tokens that a compressor counted."""
    if report is None:
        return {}
    return {
        "visual": sum(sample.visual_tokens for sample in report.samples),
        "kept": sum(sample.kept_tokens for sample in report.samples),
        "active": sum(sample.active_tokens for sample in report.samples),
    }


def _with_share(reply: Reply, watching: Timings, count: int, report: Report | None) -> Reply:
    """A reply with its share of what all questions of the video have in common."""
    seconds = dict(reply.seconds)
    seconds["decode"] += watching.video_s / count
    seconds["encode"] += watching.vision_s / count
    seconds["prefill"] += (watching.compress_s + watching.prefill_s) / count
    seconds["total"] += watching.total_s / count
    tokens = {**reply.tokens}
    if report is not None and not tokens.get("visual"):
        tokens.update(_tokens(report))
    return replace(reply, seconds=seconds, tokens=tokens)


@contextmanager
def _file(item: Item, scratch: str) -> Iterator[str]:
    """The video's path; of a tar's member a copy, for as long as it is needed."""
    if item.member is None:
        yield item.video
        return
    os.makedirs(scratch, exist_ok=True)
    suffix = os.path.splitext(item.video)[1]
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="video-", suffix=suffix) as copied:
        _extract(item.member, copied)
        yield copied.name


def _extract(member: Member, to: Any) -> None:
    with open(member.tar, "rb") as tar:
        tar.seek(member.offset)
        left = member.size
        while left and (block := tar.read(min(left, 1 << 20))):
            to.write(block)
            left -= len(block)
    to.flush()
