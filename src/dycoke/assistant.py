"""From a video file and a question to an answer: load, prompt, generate, stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.video_utils import VideoMetadata

from dycoke import nano
from dycoke.compressor import Compressor
from dycoke.report import Report
from dycoke.tally import Trace
from dycoke.timing import Stopwatch, Timings
from dycoke.video import Video, read

# Sampling's settings are left over in many generation configs, and warned about in greedy search.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


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
    """

    text: str
    tokens: tuple[str, ...]
    report: Report | None
    timings: Timings
    trace: Trace | None = None


def best_device() -> str:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA (float16 on GPUs without it), float16 on MPS, float32 on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if kind == "mps" else torch.float32


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
        dtype : a torch dtype or its name; None for `best_dtype`.
        attention : such as "flash_attention_2"; None for transformers' choice.

        Raises
        ------
        OSError, ValueError
            From transformers, where there is no such checkpoint or it is not an image-text one.
        """
        source = nano.path() if source is None else source
        device = device or best_device()
        if isinstance(dtype, str):
            named = getattr(torch, dtype, None)
            if not isinstance(named, torch.dtype):
                raise ValueError(f"unknown dtype {dtype!r}; try bfloat16, float16 or float32")
            dtype = named
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype or best_dtype(device), attn_implementation=attention
        )
        return cls(model.to(device).eval(), AutoProcessor.from_pretrained(source))

    def prepare(self, video: Video, question: str) -> dict[str, Any]:
        """The model's inputs for one video and one question, on the model's device."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        metadata = VideoMetadata(
            total_num_frames=video.total_frames,
            fps=video.fps,
            frames_indices=list(video.indices),
            height=video.frames.shape[1],
            width=video.frames.shape[2],
            duration=video.duration,
        )
        inputs = self.processor(
            text=[prompt],
            videos=[video.frames],
            video_metadata=[metadata],
            do_sample_frames=False,  # they are sampled already
            return_tensors="pt",
        )
        prepared: dict[str, Any] = inputs.to(self.model.device, self.model.dtype)
        return prepared

    def ask(
        self,
        video: str | os.PathLike[str] | Video,
        question: str,
        compressor: Compressor | None = None,
        frames: int = 32,
        max_new_tokens: int = 128,
        on_text: Callable[[str], None] | None = None,
        trace: bool = False,
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
        generate : further arguments of the model's own ``generate``.

        Raises
        ------
        VideoError
            Where the file cannot be read as a video.
        UnsupportedError
            Where the compressor cannot work on this model.
        """
        watch = Stopwatch(self.model)
        with watch.reading():
            if not isinstance(video, Video):
                video = read(video, frames)
            inputs = self.prepare(video, question)
        if not generate.get("do_sample"):
            generate = GREEDY | generate
        streamer = _Streamer(self.processor.tokenizer, on_text) if on_text else None
        with watch.compressing(compressor, trace) as run:
            output = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **generate
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        return Answer(
            text=tokenizer.decode(new, skip_special_tokens=True).strip(),
            tokens=tuple(tokenizer.convert_ids_to_tokens(new.tolist())),
            report=None if run is None else run.report,
            timings=watch.timings,
            trace=None if run is None else run.trace,
        )


class _Streamer(TextStreamer):
    """Hands finished words to a function, in the caller's thread."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
