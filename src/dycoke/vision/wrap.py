"""What the vision encoder was called with, told to the prefill that takes its features.

`generate` encodes the videos first, and hands the model features alone: their rows, but not in how
many frames they come. The prompt cannot stand in for that: frames may stand right behind each
other, and text in the middle of one. So the methods of the model that encode are wrapped, and note
on their output how many frames each video has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dycoke.patching import Patches

KINDS = ("video", "image")
PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}
ENCODED = "mm_encoder_outputs"
NOTE = "frame_counts"


@contextmanager
def replaced_encoder(
    base: Any, wrap: Callable[[Callable[..., Any]], Any], name: str
) -> Iterator[None]:
    """Put ``wrap`` of the method ``name`` in its place, and back again what was there before."""
    patches = Patches()
    patches.replace(base, name, wrap(getattr(base, name)))
    try:
        yield
    finally:
        patches.undo()


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


def carry_notes(seen: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> None:
    """Put the notes of outputs as the outermost module got them on those that arrived inside.

    What moves inputs between devices copies outputs without their notes.
    """
    if not seen or not given:
        return
    for kind, output in given.items():
        if noted_frames(output) is None and (notes := noted_frames(seen.get(kind))) is not None:
            setattr(output, NOTE, notes)


def note_encoded(patches: Patches, base: Any) -> None:
    """Let the methods of ``base`` that encode note their frames, until ``patches`` are undone."""
    for kind in KINDS:
        name = f"get_{kind}_features"
        if hasattr(base, name):
            patches.replace(base, name, _noting(kind, getattr(base, name)))


def _noting(kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)  # generate inspects its signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a forward that encodes has the pixels themselves
            note_frames(output, dict(zip(names, args, strict=False)) | kwargs, kind)
        return output

    return encode
