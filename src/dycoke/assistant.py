"""From a video file and a question to an answer: load, prompt, generate, stream."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.video_utils import VideoMetadata

from dycoke import nano
from dycoke.compat import cache_name, cache_of, chat_prompt
from dycoke.compressor import Compressor
from dycoke.core.cache_rules import DycokeCache
from dycoke.core.positions import PositionOffset, offset_after
from dycoke.core.records import held_bytes
from dycoke.core.steps import OnStep, Trace
from dycoke.errors import UnsupportedError
from dycoke.models.locate import frame_source_of, processor_options, visual_tokens
from dycoke.precision import choose_format
from dycoke.report import Report
from dycoke.timing import Stopwatch, Timings
from dycoke.video import Video, read
from dycoke.vision.chunks import AUTO, encode_in_chunks
from dycoke.vision.wrap import ENCODED

# Sampling's settings are left over in many generation configs, and warned about in greedy search.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

# What a watched clip's questions bring themselves.
OWN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache", ENCODED)
Turns = Sequence[Mapping[str, Any]]
"""A conversation: a role and a content each, see `dycoke.compat.chat_prompt`."""

CLOCK = 1_000_000  # ticks a second: exact for whole seconds and for the clocks of most files


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes
    ----------
    text : the answer, without special tokens.
    tokens : its pieces, one per generated token, special ones included.
    report : what was compressed; None without a compressor.
    timings : where the time went.
    trace : what was kept and attended to, where it was asked for.
    finish_reason : "stop" where the model ended it, "length" where the limit did.
    """

    text: str
    tokens: tuple[str, ...]
    report: Report | None
    timings: Timings
    trace: Trace | None = None
    finish_reason: str = "stop"


def best_device() -> str:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def ends_of(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def metadata_of(video: Video) -> VideoMetadata:
    """The metadata of a clip from which a processor computes the true times of its frames.

    Processors take index / fps for the time of a frame. Where a frame is not shown at that time,
    its index is that of a clip of `CLOCK` frames a second. Qwen2.5-VL knows one step for all
    frames, length / number of frames: it gets the mean step between those that were sampled.
    """
    indices, fps, total = list(video.indices), video.fps, video.total_frames
    if not video.even:
        indices, fps = [round(time * CLOCK) for time in video.timestamps], float(CLOCK)
        steps = max(len(indices) - 1, 1)
        total = max(round((indices[-1] - indices[0]) / steps * len(indices)), indices[-1] + 1)
    return VideoMetadata(
        total_num_frames=total,
        fps=fps,
        frames_indices=indices,
        height=video.frames.shape[1],
        width=video.frames.shape[2],
        duration=video.duration,
    )


class Assistant:
    """A video LLM with its processor.

    Parameters
    ----------
    model, processor : from transformers, of one checkpoint.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
    ) -> Assistant:
        """Load a checkpoint.

        Parameters
        ----------
        source : directory or hub id; None for the embedded nano model.
        device : such as "cuda:1"; None for `best_device`.
        dtype : a torch dtype or its name; None for the one in which the device computes fastest,
            and float32 for the nano model on a CPU (`dycoke.precision.choose_format`).
        attention : such as "flash_attention_2"; None for transformers' choice.

        Raises
        ------
        OSError, ValueError
            From transformers, where there is no such checkpoint or it is not an image-text one;
            for an unknown dtype.
        """
        source = nano.path() if source is None else source
        device = device or best_device()
        dtype = choose_format(device, dtype, nano.is_at(source)).dtype
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attention
        )
        return cls(model.to(device).eval(), AutoProcessor.from_pretrained(source))

    def reader(self) -> Assistant:
        """The same model for another thread to prepare inputs in.

        Its processor is a copy, since a fast tokenizer cannot be used by two threads at once.
        """
        return Assistant(self.model, copy.deepcopy(self.processor))

    def prepare(self, video: Video, question: str) -> dict[str, Any]:
        """The model's inputs for one video and one question, on the model's device.

        Raises
        ------
        UnsupportedError
            Where the processor does not take these frames.
        """
        return self.prepare_chat(question, [video])

    def prepare_chat(
        self, said: str | Turns, videos: Sequence[Video], images: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """The model's inputs for a conversation, on the model's device.

        Parameters
        ----------
        said : its turns; or a question, for one video.
        videos, images : what its parts of these types are, in their order; images of Pillow.

        Raises
        ------
        UnsupportedError
            Where the processor does not take these frames or images.
        """
        pictures = {"images": [list(images)]} if images else {}
        try:
            inputs = self.processor(
                text=[chat_prompt(self.processor, said)],
                # Per prompt, as SmolVLM's of transformers 5.17 counts them.
                videos=[[video.frames for video in videos]] if videos else None,
                video_metadata=[metadata_of(video) for video in videos] if videos else None,
                do_sample_frames=False,  # they are sampled already
                return_tensors="pt",
                **pictures,
                **processor_options(self.model.config),
            )
        except StopIteration as error:  # of older releases; no future could carry it
            raise UnsupportedError(
                "the processor does not take this prompt: it has more words that stand for images "
                "or videos than it comes with"
            ) from error
        except ValueError as error:
            if not videos:
                raise UnsupportedError(
                    f"the processor does not take this prompt: {error}"
                ) from error
            raise UnsupportedError(self._refused(videos[0], error)) from error
        on_device: dict[str, Any] = inputs.to(self.model.device, self.model.dtype)
        return on_device

    def ask(
        self,
        video: str | os.PathLike[str] | Video,
        question: str,
        compressor: Compressor | None = None,
        frames: int = 32,
        max_new_tokens: int = 128,
        on_text: Callable[[str], None] | None = None,
        trace: bool = False,
        encode_frames: int | str = AUTO,
        on_step: OnStep | None = None,
        **generate: Any,
    ) -> Answer:
        """Answer a question about a video, greedily unless ``generate`` says otherwise.

        Parameters
        ----------
        video : a file, or frames read already.
        question : text of the user's turn.
        compressor : such as ``DyCoke()``; None for the model as it is.
        frames : frames to sample from a file.
        max_new_tokens : length limit of the answer.
        on_text : called with each piece of text as it comes.
        trace : keep what the compressor kept and attended to.
        encode_frames : most frames that the vision encoder takes at once, at least 2; or "auto",
            as many as fit in half of the free memory.
        on_step : called after each forward with a `Step`, see `Compressor.__call__`; never where
            there is no compressor.
        generate : further arguments of the model's own ``generate``.

        Raises
        ------
        VideoError
            Where the file cannot be read as a video.
        UnsupportedError
            Where the compressor cannot work on this model, or the processor does not take the
            frames.
        """
        began = time.perf_counter()
        if not isinstance(video, Video):
            video = read(video, frames)
        decoded = time.perf_counter()
        inputs = self.prepare(video, question)
        before = decoded - began, time.perf_counter() - decoded
        generate |= {"max_new_tokens": max_new_tokens}
        return self._answer(
            inputs, before, compressor, on_text, trace, on_step, encode_frames, generate
        )

    def watch(
        self,
        video: str | os.PathLike[str] | Video,
        compressor: Compressor | None = None,
        frames: int = 32,
        trace: bool = False,
        encode_frames: int | str = AUTO,
        on_step: OnStep | None = None,
        prepared: tuple[str | Turns, Mapping[str, Any]] | None = None,
    ) -> Seen:
        """Encode and prefill a video once, and then ask it any number of questions.

        Parameters
        ----------
        video, compressor, frames, trace, encode_frames, on_step : as in `ask`. ``on_step`` hears
            of the video's own forward, and of every question's.
        prepared : a question, or a conversation that begins with the video, and what
            `prepare_chat` made of it, where that is there already: the processor then has nothing
            more to do.

        Raises
        ------
        VideoError, UnsupportedError
            As in `ask`.
        """
        began = time.perf_counter()
        if not isinstance(video, Video):
            video = read(video, frames)
        return Seen(self, video, compressor, trace, on_step, encode_frames, began, prepared)

    def _refused(self, video: Video, error: ValueError) -> str:
        """What to say where the processor did not take the frames."""
        count, height, width = video.frames.shape[:3]
        least = getattr(self.processor.video_processor, "temporal_patch_size", 1)
        what = f"the {self.model.config.model_type} processor does not take {count} "
        what += f"frame{'s' * (count != 1)} of {width} x {height} pixels"
        if count < least:
            return f"{what}: it needs at least {least}; sample more (--frames, frames=)"
        what += f" here ({error}); if that is about the frames, try another number of them"
        return f"{what} or a clip of another size"

    def _answer(
        self,
        inputs: dict[str, Any],
        before: tuple[float, float],
        compressor: Compressor | None,
        on_text: Callable[[str], None] | None,
        trace: bool,
        on_step: OnStep | None,
        encode_frames: int | str,
        generate: dict[str, Any],
    ) -> Answer:
        """``before``: seconds of decoding and of the processor."""
        watch = Stopwatch(self.model)
        if not generate.get("do_sample"):
            generate = GREEDY | generate
        streamer = _Streamer(self.processor.tokenizer, on_text) if on_text else None
        # Whatever the processor makes of the frames, they are those of one video.
        source = frame_source_of(self.model.config)
        compressing = watch.compressing(compressor, trace, source, on_step)
        # Chunks inside the block: where the encoder leaves cells out, they are whole windows.
        with compressing as run, encode_in_chunks(self.model, encode_frames):
            output = self.model.generate(**inputs, streamer=streamer, **generate)
        watch.timings.add_video(*before)
        new = output[0, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        ended = new.numel() > 0 and int(new[-1]) in ends_of(self.model)
        return Answer(
            text=tokenizer.decode(new, skip_special_tokens=True).strip(),
            tokens=tuple(tokenizer.convert_ids_to_tokens(new.tolist())),
            report=None if run is None else run.report,
            timings=watch.timings,
            trace=None if run is None else run.trace,
            finish_reason="stop" if ended else "length",
        )


class Seen:
    """A video that was encoded and prefilled once; made by `Assistant.watch`.

    Every question starts from a copy of the same KV rows, so that questions know nothing of each
    other, and answers are those of `Assistant.ask`.

    Attributes
    ----------
    report : what was compressed at prefill; None without a compressor.
    visual_tokens : tokens of the video's frames, before compression.
    timings : where the time of watching went.
    """

    def __init__(
        self,
        assistant: Assistant,
        video: Video,
        compressor: Compressor | None,
        trace: bool,
        on_step: OnStep | None,
        encode_frames: int | str,
        began: float,
        prepared: tuple[str | Turns, Mapping[str, Any]] | None,
    ) -> None:
        decoded = time.perf_counter()
        self._assistant, self._video = assistant, video
        self._content = content_of(video)
        self._compressor, self._trace, self._on_step = compressor, trace, on_step
        # After the video a prompt is text, which the tokenizer alone can do, unless it does
        # something else there in the middle of a prompt; then every question takes the processor.
        shared = None
        if prepared is not None:
            inputs, shared = prepared[1], self._before_tail(*prepared)
        if shared is None:
            inputs = assistant.prepare(video, "?")
            shared = self._before_tail("?", inputs)
        ids = inputs["input_ids"]
        self._alone = shared is not None
        if shared is None:
            other = assistant.prepare(video, "what happens")["input_ids"]
            least = min(ids.shape[1], other.shape[1])
            shared = int((ids[0, :least] == other[0, :least]).cumprod(0).sum())
        self._ids = ids[:, :shared]
        prefix = {
            k: v[:, :shared] if getattr(v, "shape", None) == ids.shape else v
            for k, v in inputs.items()
        }
        processed = time.perf_counter()

        model = assistant.model
        stopwatch, frame_source = Stopwatch(model), frame_source_of(model.config)
        given: dict[str, Any] = {}
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
        )
        try:
            watching = stopwatch.compressing(compressor, trace, frame_source, on_step)
            chunks = encode_in_chunks(model, encode_frames)
            with watching as run, chunks, torch.no_grad():
                self._cache = cache_of(model(**prefix, use_cache=True, logits_to_keep=1))
        finally:
            hook.remove()
        # A stock cache leaves the positions after the video to the model, which keeps those of
        # the video that it saw last.
        self._offset: PositionOffset | None = None
        if not isinstance(self._cache, DycokeCache):
            self._offset = offset_after(given.get("position_ids"), None, given["inputs_embeds"])
        self.report: Report | None = None if run is None else run.report
        if self.report is None:
            self.visual_tokens = visual_tokens(model.config, inputs, frame_source)
        else:
            self.visual_tokens = sum(sample.visual_tokens for sample in self.report.samples)
        self.timings: Timings = stopwatch.timings
        self.timings.add_video(decoded - began, processed - decoded)

    def _check(
        self, video: str | os.PathLike[str] | Video | None, generate: dict[str, Any]
    ) -> None:
        given = sorted(name for name in generate if name in OWN or "pixel_values" in name)
        if given:
            raise ValueError(
                f"{', '.join(given)}: the questions of watch() have the inputs of the clip that "
                "was watched; for another clip call watch() again, or ask()"
            )
        if video is None:
            return
        if not isinstance(video, Video):
            video = read(video, len(self._video.frames))
        if content_of(video) != self._content:
            raise ValueError(
                f"{video.path!r} is not the clip that was watched, {self._video.path!r}, or was "
                "read in other frames; call watch() for it"
            )

    @property
    def length(self) -> int:
        """Tokens of the prompt up to the video's end, before compression."""
        return int(self._ids.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that is kept, and of the frames."""
        return held_bytes(self._cache) + self._video.frames.nbytes

    def tokens(self, said: str | Turns, reader: Assistant | None = None) -> torch.Tensor:
        """The whole prompt (1, S) of a question, or of a conversation about the video.

        Parameters
        ----------
        reader : whose processor reads it, in a thread that has one of its own
            (`Assistant.reader`); None for the assistant that watched.

        Raises
        ------
        ValueError
            Where the conversation does not begin with the video, as a question about it does.
        """
        reader = reader or self._assistant
        tail = self._tail(said, reader) if self._alone else None
        if tail is not None:
            return torch.cat([self._ids, self._ids.new_tensor([tail])], dim=1)
        ids: torch.Tensor = reader.prepare_chat(said, [self._video])["input_ids"]
        if not self.begins(ids):
            raise ValueError(
                "this conversation does not begin with the clip that was watched; use "
                "prepare_chat() for it"
            )
        return ids

    def inputs(self, said: str | Turns) -> dict[str, Any]:
        """What the model's generate takes for a question, or a conversation about the video.

        Raises
        ------
        ValueError
            As `tokens`.
        """
        return self.inputs_of(self.tokens(said))

    def inputs_of(self, ids: torch.Tensor) -> dict[str, Any]:
        """What the model's generate takes for a whole prompt (1, S) that begins with the video.

        Raises
        ------
        ValueError
            Where it does not.
        """
        if not self.begins(ids):
            raise ValueError("this prompt does not begin with the clip that was watched")
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            cache_name(self._assistant.model.get_decoder()): copy.deepcopy(self._cache),
        }
        if self._offset is not None:
            new = ids.shape[1] - self._ids.shape[1]
            inputs["position_ids"] = self._offset.positions(None, ids.shape[1], new, 1)
        return inputs

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether a prompt begins with the video that was watched."""
        return torch.equal(ids[:, : self.length], self._ids)

    def _before_tail(self, said: str | Turns, inputs: Mapping[str, Any]) -> int | None:
        """How many tokens a prompt has up to its video's end; None where its text does not tell."""
        ids, tail = inputs["input_ids"][0], self._tail(said, self._assistant)
        if tail is None or ids[len(ids) - len(tail) :].tolist() != tail:
            return None
        return len(ids) - len(tail)

    def _tail(self, said: str | Turns, reader: Assistant) -> list[int] | None:
        """The tokens of a prompt after its video, where the text tells where that is.

        None, too, where something else comes before the video than in a bare question.
        """
        processor = reader.processor
        mark, text = getattr(processor, "video_token", None), chat_prompt(processor, said)
        if not mark or mark not in text:
            return None
        if not isinstance(said, str):
            plain = chat_prompt(processor, "?")
            if text.split(mark, 1)[0] != plain.split(mark, 1)[0] or text.count(mark) > 1:
                return None
        after = text[text.rindex(mark) + len(mark) :]
        tokens: list[int] = processor.tokenizer(after, add_special_tokens=False)["input_ids"]
        # Words of the user's that stand for an image, which the processor refuses.
        if getattr(self._assistant.model.config, "image_token_id", None) in tokens:
            return None
        return tokens

    def ask(
        self,
        question: str,
        max_new_tokens: int = 128,
        on_text: Callable[[str], None] | None = None,
        video: str | os.PathLike[str] | Video | None = None,
        on_step: OnStep | None = None,
        **generate: Any,
    ) -> Answer:
        """Answer a question.

        Parameters
        ----------
        video : the clip that the question is about, where the caller wants that checked. Clips of
            one length and size have equal prompts, so nothing but the frames tells them apart.
        on_step : as in `Assistant.ask`; None for that of `Assistant.watch`.
        question, max_new_tokens, on_text, generate : as in `Assistant.ask`.

        Raises
        ------
        ValueError
            Where ``video`` is not the clip that was watched, or ``generate`` brings another's
            inputs.
        """
        began = time.perf_counter()
        self._check(video, generate)
        inputs = self.inputs(question)
        before = 0.0, time.perf_counter() - began
        generate |= {"max_new_tokens": max_new_tokens}
        return self._assistant._answer(
            inputs,
            before,
            self._compressor,
            on_text,
            self._trace,
            on_step or self._on_step,
            AUTO,
            generate,
        )


def content_of(video: Video) -> bytes:
    """What tells a clip from others of its length and size: a digest of its frames and times."""
    said = repr((video.frames.shape, video.timestamps)).encode()
    return hashlib.blake2b(said + video.frames.tobytes()).digest()


class _Streamer(TextStreamer):
    """Hands finished words to a function, in the caller's thread."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
