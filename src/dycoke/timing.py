"""Where the time of one generation goes, measured from outside by hooks."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dycoke.compressor import Compressor, Run
from dycoke.core.steps import OnStep
from dycoke.models.locate import FrameSource
from dycoke.vision.wrap import replaced_encoder


@dataclass
class Timings:
    """Seconds per stage of one answer.

    Attributes
    ----------
    decode_s : from the file to the sampled frames; 0 where frames were given.
    process_s : from the frames to the processor's tensors.
    video_s : both.
    vision_s : the vision encoder and projector.
    compress_s : finding and merging the visual tokens, and the vision encoder's scores and keys
        where a method asks for them. What a method drops inside the LLM is part of the prefill.
    prefill_s : the language model over the prompt, without compression.
    ttft_s : time to first token: vision + compress + prefill.
    per_token_s : mean over the tokens after the first; 0 where there are none.
    total_s : everything, from the file to the last token.
    """

    decode_s: float = 0.0
    process_s: float = 0.0
    video_s: float = 0.0
    vision_s: float = 0.0
    compress_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    per_token_s: float = 0.0
    total_s: float = 0.0

    def add_video(self, decode_s: float = 0.0, process_s: float = 0.0) -> None:
        """Count what came before generate."""
        self.decode_s += decode_s
        self.process_s += process_s
        self.video_s += decode_s + process_s
        self.total_s += decode_s + process_s

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Stopwatch:
    """Times one ``generate`` call, with or without a compressor.

    Every mark waits for the device, so that a stage's time is its own.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.decoder = model, model.base_model, model.get_decoder()
        self.timings = Timings()
        self._start = self._prefilled = self._last = self._scored = 0.0
        self._steps = self._encoding = 0

    def now(self) -> float:
        device = self.model.device
        if device.type in ("cuda", "xpu"):
            getattr(torch, device.type).synchronize(device)  # not always the current one
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @contextmanager
    def compressing(
        self,
        compressor: Compressor | None,
        trace: bool = False,
        frame_source: FrameSource | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Run | None]:
        """Time the one generation inside; yields the compressor's run, if there is one.

        ``trace``, ``frame_source`` and ``on_step`` are those of `Compressor.__call__`; what
        ``on_step`` takes is part of a token's time.
        """
        with ExitStack() as stack:
            # Hooks run in the order of their registration: ours around the compressor's.
            self._time_vision(stack)
            self._hook(stack, self.base, self._begin)
            self._hook(stack, self.decoder, self._begin)
            run = None
            if compressor is not None:
                block = compressor(self.model, trace, None, frame_source, on_step)
                run = stack.enter_context(block)
                if run.vision is not None:
                    run.vision.timed = self._scoring
            self._hook(stack, self.base, self._compressed)
            self._hook(stack, self.decoder, self._compressed)
            handle = self.model.register_forward_hook(self._forwarded)
            stack.callback(handle.remove)
            began = self.now()
            yield run
            self._finish(self.now() - began)

    def _hook(self, stack: ExitStack, module: Any, hook: Any) -> None:
        stack.callback(module.register_forward_pre_hook(hook).remove)

    def _time_vision(self, stack: ExitStack) -> None:
        # A video's frames may be images to the model, or its videos go through those.
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self.base, name):
                stack.enter_context(replaced_encoder(self.base, self._timed, name))

    def _timed(self, inner: Any) -> Any:
        @functools.wraps(inner)  # generate inspects its signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, scored, began = self.timings.vision_s, self._scored, self.now()
            self._encoding += 1
            try:
                return inner(*args, **kwargs)
            finally:
                self._encoding -= 1
                # Instead of what a call inside this one has counted.
                self.timings.vision_s = before + self.now() - began - (self._scored - scored)

        return timed

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """What a method asks of the vision encoder's attention is compression, too."""
        began = self.now()
        yield
        took = self.now() - began
        self.timings.compress_s += took
        if self._encoding:  # it is no part of the encoder's own time
            self._scored += took

    def _begin(self, *_: Any) -> None:
        if not self._prefilled:
            self._start = self.now()

    def _compressed(self, *_: Any) -> None:
        if not self._prefilled:
            # What lies between two neighbouring hooks is the compressor's hook.
            began, self._start = self._start, self.now()
            self.timings.compress_s += self._start - began

    def _forwarded(self, *_: Any) -> None:
        now = self.now()
        if not self._prefilled:
            self._prefilled = now
            self.timings.prefill_s = now - self._start
        else:
            self._steps += 1
        self._last = now

    def _finish(self, generate_s: float) -> None:
        t = self.timings
        t.ttft_s = t.vision_s + t.compress_s + t.prefill_s
        t.per_token_s = (self._last - self._prefilled) / self._steps if self._steps else 0.0
        t.total_s += generate_s
