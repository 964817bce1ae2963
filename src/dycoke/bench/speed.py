"""Methods run in turn in one process, each time from the file to the last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dycoke.assistant import GREEDY, Assistant
from dycoke.bench.plan import Plan
from dycoke.compat import cache_of
from dycoke.compressor import Compressor
from dycoke.core.records import held_bytes
from dycoke.models.locate import Finder, frame_source_of
from dycoke.report import Report
from dycoke.timing import Stopwatch, Timings
from dycoke.video import Video, read

QUESTION = "Describe what happens in this video."


class BenchError(Exception):
    """What was asked for cannot be measured here; the message names the way out."""


@dataclass
class Sample:
    """One generation.

    Attributes
    ----------
    timings : seconds per stage.
    kv_bytes : bytes of the cache's tensors after the last token.
    peak_bytes : most memory that torch held on a CUDA device, weights included; else None.
    report : what was compressed; None for the full model.
    frames, visual_tokens, prompt_tokens : of one row of the batch.
    """

    timings: Timings
    kv_bytes: int
    peak_bytes: int | None
    report: Report | None
    frames: int
    visual_tokens: int
    prompt_tokens: int


class Bench:
    """A model, and its inputs for a video.

    Parameters
    ----------
    plan : what to measure; the model is built or loaded here.

    Raises
    ------
    BenchError
        Where the model cannot be built or loaded.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.prepare: Callable[[Video], dict[str, Any]]
        device, dtype = plan.chosen_device, plan.number_format.dtype
        try:
            if plan.arch is not None:
                arch = plan.arch
                self.model = arch.build(device, dtype, plan.attention)
                self.prepare = lambda video: arch.inputs(self.model, video.frames)
            else:
                assistant = Assistant.load(plan.model, device, dtype, plan.attention)
                self.model = assistant.model
                self.prepare = lambda video: assistant.prepare(video, QUESTION)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            name = plan.arch.name if plan.arch else plan.model
            raise BenchError(f"cannot load the model {name!r}: {error}") from None

    @torch.inference_mode()
    def once(self, path: str, compressor: Compressor | None, new_tokens: int) -> Sample:
        """One generation, from the file at ``path`` on."""
        device, watch = self.model.device, Stopwatch(self.model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        plan, began = self.plan, watch.now()
        video = read(path, plan.frames, stream=plan.stream, max_pixels=plan.max_pixels)
        decoded = watch.now()
        inputs = {k: _repeated(v, plan.batch) for k, v in self.prepare(video).items()}
        watch.timings.add_video(decoded - began, watch.now() - decoded)
        with watch.compressing(compressor, frame_source=frame_source_of(self.model.config)) as run:
            output = self.model.generate(
                **inputs,
                **GREEDY,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
        return Sample(
            timings=watch.timings,
            kv_bytes=held_bytes(cache_of(output)),
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            report=None if run is None else run.report,
            frames=len(video.frames),
            visual_tokens=self._visual_tokens(inputs) // plan.batch,
            prompt_tokens=inputs["input_ids"].shape[1],
        )

    def _visual_tokens(self, inputs: dict[str, Any]) -> int:
        config = self.model.base_model.config
        spans = Finder(config, None, frame_source_of(config)).find(config, inputs)
        return sum(span.positions.numel() for span in spans)

    def measure(
        self, path: str, on_run: Callable[[str], None] | None = None
    ) -> dict[str, list[Sample]]:
        """Every method once per turn, A B A B; the warm-up before the first turn is left out.

        Parameters
        ----------
        path : the video.
        on_run : called before each run, with words that say which it is.

        Raises
        ------
        VideoError, UnsupportedError
            Where the file cannot be read, or a method cannot work on this model.
        BenchError
            Where memory runs out.
        """
        plan, tell = self.plan, on_run or (lambda *_: None)
        ready = plan.lines()
        samples: dict[str, list[Sample]] = {name: [] for name in ready}
        try:
            for name, compressor in ready.items():
                tell(f"warm-up: {name}")
                self.once(path, compressor, min(2, plan.new_tokens))
            for turn in range(plan.repeat):
                for name, compressor in ready.items():
                    tell(f"turn {turn + 1} of {plan.repeat}: {name}")
                    samples[name].append(self.once(path, compressor, plan.new_tokens))
        except torch.OutOfMemoryError:
            raise BenchError(
                f"{plan.chosen_device} has too little memory for {name}; take fewer "
                "frames, a smaller batch, or fewer layers"
            ) from None
        return samples


def _repeated(value: Any, times: int) -> Any:
    """The same prompt and video ``times`` times in one batch."""
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value * times if isinstance(value, list) else value
