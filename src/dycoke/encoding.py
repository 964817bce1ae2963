"""The vision encoder in chunks of frames, so that its activations stop growing with the clip.

Frames do not see each other in the encoders that take them side by side or as packed patches, so a
chunk's features are the whole's, to rounding. What is kept of a chunk is what the language model
gets: pooled features, and features for deeper layers where a family has such.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dycoke.checks import check_count
from dycoke.clip import Seen, joined

NAME = "get_video_features"


@contextmanager
def encode_in_chunks(model: Any, frames: int) -> Iterator[None]:
    """Let ``model`` encode at most about ``frames`` frames (or temporal slices) at once.

    Parameters
    ----------
    model : a transformers model with ``get_video_features``.
    frames : int, at least 2.

    Notes
    -----
    Works under ``generate`` and bare forwards. Inputs that are neither (B, F, C, H, W) nor packed
    patches with ``video_grid_thw`` are encoded as the model does it.
    """
    frames = check_count("frames", frames, least=2)
    if not hasattr(model.base_model, NAME):  # frames that are images only
        yield
        return
    with replaced_encoder(model.base_model, lambda inner: _in_chunks(inner, frames)):
        yield


@contextmanager
def replaced_encoder(
    base: Any, wrap: Callable[[Callable[..., Any]], Any], name: str = NAME
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


def _in_chunks(inner: Callable[..., Any], most: int) -> Callable[..., Any]:
    names = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)  # generate inspects its signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        name = next((n for n in inputs if n.startswith("pixel_values")), None)
        pixels = None if name is None else inputs[name]
        grids = inputs.get("video_grid_thw")
        if not isinstance(pixels, Tensor) or inputs.get("return_dict") is False:
            return inner(*args, **kwargs)
        seen: list[Seen] = []

        def part(**chunk: Any) -> Any:
            output = inner(**chunk)
            seen.extend(getattr(output, "vision", []))
            return output

        if grids is not None and pixels.ndim == 2 and max(grids[:, 0]) > most:
            output, counts = _packed(part, inputs, str(name), most), grids[:, 0].tolist()
        elif grids is None and pixels.ndim == 5 and pixels.shape[1] > most:
            output = _stacked(part, inputs, str(name), most)
            counts = [pixels.shape[1]] * len(pixels)
        else:
            return inner(*args, **kwargs)
        if seen:  # what a method asked for (`vision.py`)
            output.vision = joined(seen, counts)
        return output

    return encode


def _even(count: int, most: int) -> list[int]:
    """Parts of ``count``, at most ``most`` each, as even as can be."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]


def _stacked(inner: Callable[..., Any], inputs: dict[str, Any], name: str, most: int) -> Any:
    """Videos as one tensor, (B, F, C, H, W), features (B, rows, D) or one (rows, D) per video.

    One video after the other, so that whatever is noted meanwhile comes in the order of frames.
    """
    together: list[Tensor] = []
    sizes = _even(inputs[name].shape[1], most)
    for video in inputs[name]:
        rows: list[Tensor] = []
        for i, pixels in enumerate(video.split(sizes)):
            output = inner(**inputs | {name: pixels[None].contiguous()})
            # A token that closes a video (a newline) comes once.
            part = output.pooler_output[0]
            ends = len(part) % sizes[i] if i + 1 < len(sizes) else 0
            rows.append(part[: len(part) - ends])
        together.append(torch.cat(rows))
    return _only(output, torch.stack(together))


def _packed(inner: Callable[..., Any], inputs: dict[str, Any], name: str, most: int) -> Any:
    """Patches of all videos in one row, and a grid (T, H, W) for each."""
    grids: Tensor = inputs["video_grid_thw"]
    pooled: list[Tensor] = []
    deeper: list[list[Tensor]] = []
    start = 0
    for video, (slices, height, width) in enumerate(grids.tolist()):
        # What there is one of per video goes with each of its chunks.
        own = {
            k: v[video : video + 1]
            for k, v in inputs.items()
            if isinstance(v, Tensor) and k != name and len(v) == len(grids)
        }
        parts = []
        for part in _even(slices, most):
            end = start + part * height * width
            grid = grids.new_tensor([[part, height, width]])
            chunk = {name: inputs[name][start:end], "video_grid_thw": grid}
            output, start = inner(**inputs | own | chunk), end
            levels = getattr(output, "deepstack_features", None) or []
            parts.append([_whole(output.pooler_output), *map(_whole, levels)])
        first, *others = (torch.cat(level) for level in zip(*parts, strict=True))
        pooled.append(first)
        deeper.append(others)
    if deeper[0]:
        # In the form that the model gives: per level all videos in one row, or one by one.
        split = not isinstance(output.deepstack_features[0], Tensor)
        levels = [list(level) for level in zip(*deeper, strict=True)]
        output.deepstack_features = [x if split else torch.cat(x) for x in levels]
    return _only(output, tuple(pooled))


def _whole(rows: Any) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.cat(list(rows))


def _only(output: Any, pooled: Any) -> Any:
    """The last chunk's output, holding what all chunks gave and nothing else."""
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        if name in output:
            output[name] = None
    output.pooler_output = pooled
    return output
