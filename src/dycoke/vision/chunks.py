"""The vision encoder in chunks of frames, so that its activations stop growing with the clip.

Frames do not see each other in the encoders that take them side by side or as packed patches, so a
chunk's features are the whole's, to rounding. What is kept of a chunk is what the language model
gets: pooled features, and features for deeper layers where a family has such.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dycoke.errors import check_count
from dycoke.vision.memory import frames_that_fit
from dycoke.vision.notes import NOTES, Note, regroup
from dycoke.vision.wrap import note_frames, replaced_encoder

NAME = "get_video_features"
NAMES = (NAME, "get_image_features")  # a video's frames may be images to the model
# How many slices each video (image) has: a grid (T, H, W) of patches, or a number of frames.
SIZES = ("video_grid_thw", "image_grid_thw", "num_frames_per_video")
AUTO = "auto"
CPU_FRAMES = 32  # more at once are slower there: what is between two layers leaves the caches


@contextmanager
def encode_in_chunks(model: Any, frames: int | str = AUTO) -> Iterator[None]:
    """Let ``model`` encode at most ``frames`` frames (or temporal slices) at once, of all videos.

    Parameters
    ----------
    model : a transformers model with ``get_video_features`` or ``get_image_features``.
    frames : int, at least 2; or "auto", as many as fit in half of the memory that is free when the
        encoder is called, see `dycoke.vision.memory`, on a CPU at most `CPU_FRAMES`.

    Notes
    -----
    Works under ``generate`` and bare forwards. Chunked are videos as (B, F, C, H, W), images as
    (n, C, H, W) or, with the padding images of Idefics, (B, n, C, H, W), and packed patches with
    their grids or frame counts. Other inputs are encoded as the model does it.
    """
    frames = check_frames(frames)
    base = model.base_model

    def most(patches: int, device: torch.device) -> int:
        if isinstance(frames, int):
            return frames
        fit = frames_that_fit(model.config, patches, base.dtype.itemsize, device)
        return min(fit, CPU_FRAMES) if device.type == "cpu" else fit

    with ExitStack() as stack:
        for name in NAMES:
            if hasattr(base, name):
                wrap = functools.partial(
                    _in_chunks, videos=name == NAME, config=model.config, most=most, base=base
                )
                stack.enter_context(replaced_encoder(base, wrap, name))
        yield


def check_frames(frames: object) -> int | str:
    """``frames`` as "auto" or an int of at least 2, or say what is wrong with it."""
    if isinstance(frames, str):
        if frames != AUTO:
            raise ValueError(f'frames must be "auto" or an integer of at least 2, got {frames!r}')
        return frames
    return check_count("frames", frames, least=2)


class _Limit(NamedTuple):
    """Most frames of a chunk, and the number whose multiples all chunks but a video's last are."""

    most: int
    step: int


class _Form(NamedTuple):
    """What takes such inputs in chunks, how many frames they are, and a frame's patches.

    ``videos`` has the frames of each video; None where every frame is an image of its own.
    """

    chunked: Callable[[Callable[..., Any], dict[str, Any], str, _Limit], Any]
    frames: int
    patches: int
    videos: list[int] | None = None


def _in_chunks(
    inner: Callable[..., Any],
    videos: bool,
    config: Any,
    most: Callable[[int, torch.device], int],
    base: Any,
) -> Callable[..., Any]:
    names = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)  # generate inspects its signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        name = next((n for n in inputs if n.startswith("pixel_values")), None)
        pixels = None if name is None else inputs[name]
        if not isinstance(pixels, Tensor) or inputs.get("return_dict") is False:
            return inner(*args, **kwargs)
        form = _form(inputs, pixels, names, videos, config)
        if form is None or form.frames <= (count := most(form.patches, pixels.device)):
            return inner(*args, **kwargs)
        # Where an encoder leaves cells out, a chunk must not begin inside a window.
        limit = _Limit(count, vars(base).get("encoded_window", 1))
        seen: dict[str, list[Note]] = {}

        def part(**chunk: Any) -> Any:
            output = inner(**chunk)
            for note in NOTES:
                if hasattr(output, note):
                    seen.setdefault(note, []).extend(getattr(output, note))
            return output

        output = form.chunked(part, inputs, str(name), limit)
        note_frames(output, inputs, "video" if videos else "image")
        for note, parts in seen.items():
            videos_of = form.videos or [1] * sum(len(part[0]) for part in parts)
            setattr(output, note, regroup(parts, videos_of))
        return output

    encode.in_chunks = True  # type: ignore[attr-defined]
    return encode


def _form(
    inputs: dict[str, Any], pixels: Tensor, names: list[str], videos: bool, config: Any
) -> _Form | None:
    """The form of an encoder's inputs; None where it is none of those known here."""
    shape, ndim = pixels.shape, pixels.ndim
    if name := _sizes(inputs):
        slices, rows = _slices(inputs[name])
        if sum(n * r for n, r in zip(slices, rows, strict=True)) != shape[0]:
            return None
        return _Form(_packed, sum(slices), max(rows) if ndim == 2 else shape[1], slices)
    if ndim == 4 and "video_position_ids" in names:  # Gemma 4 before it packed
        return _Form(_stacked, shape[0] * shape[1], shape[2], [shape[1]] * shape[0])
    patch = getattr(getattr(config, "vision_config", None), "patch_size", 1)
    side = patch if isinstance(patch, int) else min(patch)
    patches = shape[-2] * shape[-1] // side**2
    if videos:
        every = [shape[1]] * shape[0]
        return _Form(_stacked, sum(every), patches, every) if ndim == 5 else None
    if ndim == 5 and "pixel_attention_mask" in names:
        return _Form(_padded, shape[0] * shape[1], patches)
    alone = not any(isinstance(v, Tensor) for v in inputs.values() if v is not pixels)
    return _Form(_images, shape[0], patches) if ndim == 4 and alone else None


def _sizes(inputs: dict[str, Any]) -> str | None:
    return next((name for name in SIZES if inputs.get(name) is not None), None)


def _slices(sizes: Tensor) -> tuple[list[int], list[int]]:
    """Slices of each video, and rows of pixels per slice; of grids (videos, 3) or counts (videos,).

    A slice of a grid has a row per patch, and a counted frame is a row of its own.
    """
    table = sizes.view(len(sizes), -1)
    return table[:, 0].tolist(), table[:, 1:].prod(-1).tolist()


def _even(count: int, limit: _Limit) -> list[int]:
    """Parts of ``count`` within the limit, as even as can be."""
    steps, most = -(-count // limit.step), max(1, limit.most // limit.step)
    parts = -(-steps // most)
    sizes = [limit.step * (steps // parts + (i < steps % parts)) for i in range(parts)]
    sizes[-1] -= sum(sizes) - count
    return sizes


def _cuts(parts: Sequence[int]) -> list[slice]:
    """Where parts of these sizes stand one after the other."""
    ends = list(accumulate(parts))
    return [slice(end - part, end) for part, end in zip(parts, ends, strict=True)]


def _stacked(inner: Callable[..., Any], inputs: dict[str, Any], name: str, limit: _Limit) -> Any:
    """Videos as one tensor, (B, F, ...), features (B, rows, D) or one (rows, D) per video.

    Chunks go in the order of videos and their frames: several short videos, or parts of a long one.
    """
    count, frames = inputs[name].shape[:2]
    framed = {
        k: v
        for k, v in inputs.items()
        if isinstance(v, Tensor) and v.shape[:2] == inputs[name].shape[:2]
    }
    sizes = _even(frames, limit)
    videos: list[Tensor] = []
    together = max(1, limit.most // frames)
    for first in range(0, count, together):
        rows: list[list[Tensor]] = []
        for part in _cuts(sizes):
            chunk = {k: v[first : first + together, part] for k, v in framed.items()}
            output = inner(**inputs | {k: v.contiguous() for k, v in chunk.items()})
            # A token that closes a video (a newline) comes once.
            pooled = output.pooler_output
            ends = len(pooled[0]) % (part.stop - part.start) if part.stop < frames else 0
            rows.append([video[: len(video) - ends] for video in pooled])
        videos += [torch.cat(parts) for parts in zip(*rows, strict=True)]
    return _only(output, torch.stack(videos) if isinstance(pooled, Tensor) else tuple(videos))


def _images(inner: Callable[..., Any], inputs: dict[str, Any], name: str, limit: _Limit) -> Any:
    """Images side by side, (n, C, H, W), features (n, N, D) or one (N, D) per image."""
    pooled: list[Any] = []
    count = len(inputs[name])
    for part in _cuts(_even(count, limit)):
        output = inner(**inputs | {name: inputs[name][part]})
        pooled.append(output.pooler_output)
    return _only(output, _joined(range(count), pooled))


def _padded(inner: Callable[..., Any], inputs: dict[str, Any], name: str, limit: _Limit) -> Any:
    """Images of each sample in a row filled up with zeros, (B, n, C, H, W).

    Features (images, N, D), or in newer releases one (rows, D) per sample; none for the zeros.
    """
    real = (inputs[name] != 0).flatten(2).any(-1)  # (B, n)
    if not real.any():
        return inner(**inputs)
    mask = inputs.get("pixel_attention_mask")
    given = {name: inputs[name], **({} if mask is None else {"pixel_attention_mask": mask})}
    images = {k: v[real][None] for k, v in given.items()}
    rows: list[Tensor] = []
    count = int(real.sum())
    for part in _cuts(_even(count, limit)):
        output = inner(**inputs | {k: v[:, part] for k, v in images.items()})
        rows.append(_whole(output.pooler_output))
    pooled: Any = torch.cat(rows)
    if not isinstance(output.pooler_output, Tensor):
        counts = real.sum(1) * (len(pooled) // count)
        pooled = list(pooled.split(counts.tolist()))
    return _only(output, pooled)


def _packed(inner: Callable[..., Any], inputs: dict[str, Any], name: str, limit: _Limit) -> Any:
    """Patches of all videos (images) in one row, and a grid (T, H, W) for each; or frames of all.

    A chunk holds parts of one or more videos, in order.
    """
    sizes_name = str(_sizes(inputs))
    sizes, pixels = inputs[sizes_name], inputs[name]
    slices, per_slice = _slices(sizes)
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    owners: list[int] = []
    pooled: list[Any] = []
    deeper: list[list[Any]] = []
    start = 0
    for chunk in _chunks(slices, limit):
        videos = [video for video, _ in chunk]
        end = start + sum(part * per_slice[video] for video, part in chunk)
        # What there is one of per patch is cut, what there is one of per video goes with each part.
        own = {k: v[videos] for k, v in tensors.items() if len(v) == len(sizes)}
        own |= {k: v[start:end] for k, v in tensors.items() if len(v) == len(pixels)}
        own[sizes_name] = sizes[videos]
        own[sizes_name].view(len(chunk), -1)[:, 0] = sizes.new_tensor([part for _, part in chunk])
        output, start = inner(**inputs | own), end
        owners += videos
        pooled.append(output.pooler_output)
        deeper.append(list(getattr(output, "deepstack_features", None) or []))
    if deeper[0]:
        levels = zip(*deeper, strict=True)
        output.deepstack_features = [_joined(owners, level) for level in levels]
    return _only(output, _joined(owners, pooled))


def _chunks(slices: Sequence[int], limit: _Limit) -> list[list[tuple[int, int]]]:
    """Chunks of slices within the limit: which videos, and how many slices of each."""
    chunks: list[list[tuple[int, int]]] = []
    room = 0
    for video, count in enumerate(slices):
        for part in _even(count, limit):
            if part > room:
                chunks.append([])
                room = max(limit)
            chunks[-1].append((video, part))
            room -= part
    return chunks


def _joined(owners: Sequence[int], chunks: Sequence[Any]) -> Tensor | tuple[Tensor, ...]:
    """What chunks gave, in its form: all rows in one, or parts of videos, joined per video."""
    if isinstance(chunks[0], Tensor):
        return torch.cat(list(chunks))
    videos: dict[int, list[Tensor]] = {}
    for owner, part in zip(owners, chain.from_iterable(chunks), strict=True):
        videos.setdefault(owner, []).append(part)
    return tuple(torch.cat(rows) for rows in videos.values())


def _whole(rows: Any) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.cat(list(rows))


def _only(output: Any, pooled: Any) -> Any:
    """The last chunk's output, holding what all chunks gave and nothing else."""
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        if name in output:
            output[name] = None
    output.pooler_output = pooled
    return output
