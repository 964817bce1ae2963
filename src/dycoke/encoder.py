"""What the vision encoder was called with, told to the prefill that takes its features.

`generate` encodes the videos first, and hands the model features alone: their rows, but not in how
many frames they come. The prompt cannot stand in for that: frames may stand right behind each
other, and text in the middle of one. So the methods of the model that encode are wrapped, and note
on their output how many frames each video has.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("video", "image")
PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}
ENCODED = "mm_encoder_outputs"
NOTE = "frame_counts"


@contextmanager
def replaced_encoder(
    base: Any, wrap: Callable[[Callable[..., Any]], Any], name: str
) -> Iterator[None]:
    """Put ``wrap`` of the method ``name`` in its place, and back again what was there before."""
    before = vars(base).get(name)
    setattr(base, name, wrap(getattr(base, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(base, name)
        else:
            setattr(base, name, before)


def frames_given(inputs: Mapping[str, Any], kind: str) -> list[int] | None:
    """Frames (temporal slices) of each video that the encoder gets; None where nothing tells.

    Of images that are filled up with black ones, a row of them per sample, those that are real in
    each row; of other images one each.
    """
    sizes = inputs.get(f"{kind}_grid_thw")
    if sizes is None and kind == "video":
        sizes = inputs.get("num_frames_per_video")
    if isinstance(sizes, Tensor):
        counts: list[int] = sizes.view(len(sizes), -1)[:, 0].tolist()
        return counts
    pixels = inputs.get(PIXELS[kind])
    if not isinstance(pixels, Tensor) or pixels.ndim < 4:
        return None
    if kind == "video":
        return [pixels.shape[1]] * pixels.shape[0]
    if pixels.ndim == 4:
        return [1] * pixels.shape[0]
    real: list[int] = (pixels != 0).flatten(2).any(-1).sum(1).tolist()
    return real


def note_frames(output: Any, inputs: Mapping[str, Any], kind: str) -> None:
    """Note on the encoder's output what `noted_frames` reads."""
    if hasattr(output, "pooler_output"):
        setattr(output, NOTE, frames_given(inputs, kind))


def noted_frames(output: Any) -> list[int] | None:
    """Frames of each video in an encoder's output; None where it was encoded outside the block."""
    return getattr(output, NOTE, None)


class FrameNotes:
    """The notes on one model's encoder outputs, from `install` to `restore`."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.base_model
        self._local = threading.local()
        self._undo = ExitStack()

    def install(self, hook: Callable[[nn.Module, Any, Any], None]) -> None:
        """Wrap; ``hook(module, before, after)`` registers a forward's hooks."""
        for kind in KINDS:
            name = f"get_{kind}_features"
            if hasattr(self.base, name):
                wrap = functools.partial(_noting, kind)
                self._undo.enter_context(replaced_encoder(self.base, wrap, name))
        if self.model is not self.base:
            hook(self.model, self._hand, None)
        hook(self.base, self._take, self._forget)

    def restore(self) -> None:
        """Undo `install`, but for the hooks. Harmless when called twice."""
        self._undo.close()

    # What moves inputs between devices copies outputs without their notes.

    def _hand(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get(ENCODED) or {}
        self._local.notes = {kind: noted_frames(output) for kind, output in given.items()}

    def _take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        notes = getattr(self._local, "notes", {})
        for kind, output in (kwargs.get(ENCODED) or {}).items():
            if noted_frames(output) is None and notes.get(kind) is not None:
                setattr(output, NOTE, notes[kind])

    def _forget(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.notes = {}


def _noting(kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)  # generate inspects its signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a forward that encodes has the pixels themselves
            note_frames(output, dict(zip(names, args, strict=False)) | kwargs, kind)
        return output

    return encode
