"""Find the frames of a forward: its videos, and its images where these were declared frames."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dycoke.errors import UnsupportedError
from dycoke.models import families, family_of
from dycoke.models.base import Family, Layout, Prompt, VideoSpan
from dycoke.vision.wrap import ENCODED, PIXELS, frames_given, noted_frames

NO_VIDEO = "no video in the prompt"

FrameSource = str | Sequence[int]
"""Where the frames are: "videos", "images", or how many images each video of a prompt has."""

_KINDS = {"videos": "video", "images": "image"}


class Finder:
    """Finds the frames of a prompt, for one model and what its user said of them.

    Parameters
    ----------
    config : the model's config.
    layout : the user's own, in place of a known family's.
    frame_source : None and "videos" leave images alone; see `join_images` for the others.

    Attributes
    ----------
    family : Family or None
        None where the user's own layout finds the videos.
    kinds : list of str
        What may hold frames, of "video" and "image".
    """

    def __init__(
        self, config: Any, layout: Layout | None, frame_source: FrameSource | None
    ) -> None:
        self.frame_source = check_frame_source(frame_source)
        if layout is not None and frame_source is not None:
            raise ValueError(
                f"layout= finds the frames itself, so frame_source={frame_source!r} would say "
                "nothing; drop one"
            )
        self.family: Family | None = None
        self.sources: tuple[str, ...] = tuple(_KINDS)
        if layout is None:
            self.family = family_of(config)
            layout, self.sources = self.family.layout, self.family.frame_sources
        self.layout = layout
        images = self.frame_source != "videos"
        if images and "images" not in self.sources:
            raise UnsupportedError(
                f"frame_source={frame_source!r}: the images of {config.model_type} are not known "
                "as frames; give the processor a video, or pass layout="
            )
        # A layout of the user's own is called for whatever came.
        images = images or self.family is None
        self.kinds = [_KINDS[s] for s in self.sources if images or s != "images"]
        video_token = "video_token_id" if self.family is None else self.family.video_token
        names = {"video": video_token, "image": "image_token_id"}
        tokens = [getattr(config, names[kind], None) for kind in self.kinds]
        self.token_ids = {token for token in tokens if token is not None}
        self.image_token_id = getattr(config, "image_token_id", None)

    def arrived(self, inputs: Mapping[str, Any]) -> bool:
        """Whether anything that may hold frames came with this forward."""
        return any(_arrived(inputs, kind) for kind in self.kinds)

    def lacks_video(self, ids: Tensor, inputs: Mapping[str, Any]) -> bool:
        """Whether placeholders stand here for which nothing came; ids of shape (B, S)."""
        # An image may have come for them, where videos use the same placeholder.
        known = {self.image_token_id} if _arrived(inputs, "image") else set()
        return any(bool((ids == token).any()) for token in self.token_ids - known)

    def why_untouched(self, inputs: Mapping[str, Any]) -> str:
        """Why a forward without frames stays as it is."""
        if not _arrived(inputs, "image") or "image" in self.kinds:
            return NO_VIDEO
        if "images" not in self.sources:
            return f"{NO_VIDEO}, and images are not merged"
        return (
            f"{NO_VIDEO}, and images are not merged by default: where they are frames of one, say "
            'frame_source="images"'
        )

    def videos(
        self,
        module: Any,
        inputs: Mapping[str, Any],
        cache: Any,
        labels: bool,
        speculative: bool,
    ) -> tuple[list[VideoSpan], str | None]:
        """Where the videos of this prompt are, or why there are none; ``cache`` is the KV cache."""
        if labels or module.training:
            return [], "labels were given or the model is in training mode"
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        filled = cache is not None and cache.get_seq_length() > 0
        if ids is None:
            if not filled and embeds is not None and embeds.shape[1] > 1:
                warnings.warn(
                    "DyCoke got inputs_embeds without input_ids and cannot find the video tokens; "
                    "pass input_ids and pixels instead",
                    stacklevel=2,
                )
            return [], "inputs_embeds without input_ids: video tokens cannot be found"
        if not self.arrived(inputs):
            # One wait for the device, at prefill only. Candidates may repeat a placeholder.
            if ids.shape[1] > 1 and not speculative and self.lacks_video(ids, inputs):
                raise UnsupportedError(
                    "the prompt has video placeholders and no video came with them; pass the "
                    "processor's whole output, and prefill at once, without prefill_chunk_size"
                )
            return [], self.why_untouched(inputs)
        if filled:
            raise UnsupportedError(
                "video tokens arrived for a cache that is not empty: prefill a video in one go, "
                "without prefill_chunk_size, and start a new cache for a new video"
            )
        videos = self.find(module.config, inputs)
        return videos, None if videos else self.why_untouched(inputs)

    def find(self, config: Any, inputs: Mapping[str, Any]) -> list[VideoSpan]:
        """The videos of a prompt."""
        spans = []
        for kind in self.kinds:
            rows = _encoded_rows(inputs, kind)
            if not _arrived(inputs, kind) or rows == []:
                continue  # generate lost them on the way to beams; the model will say so
            ids, position_ids = inputs["input_ids"], inputs.get("position_ids")
            output = _encoded(inputs, kind)
            counts = noted_frames(output) or frames_given(inputs, kind)
            prompt = Prompt(config, ids, position_ids, inputs, rows, kind, counts)
            found = self.layout(prompt)
            if self.family is None:
                return found
            _check_counts(prompt, found)
            spans += join_images(prompt, found, self.frame_source) if kind == "image" else found
        return spans


def visual_tokens(config: Any, inputs: Mapping[str, Any], frame_source: FrameSource | None) -> int:
    """How many tokens of a prompt are its videos' frames, by what the processor made of it.

    For the full model, which has no report. 0 where they are not found, which it does not mind.
    """
    try:
        spans = Finder(config, None, frame_source).find(config, inputs)
    except UnsupportedError:
        return 0
    return sum(span.positions.numel() for span in spans)


def frame_source_of(config: Any) -> str | None:
    """What a family's processor makes of a video; None for a family that is not known."""
    family = families().get(str(getattr(config, "model_type", None)))
    return None if family is None else family.frame_sources[0]


def processor_options(config: Any) -> dict[str, Any]:
    """What a family's processor has to be called with, for prompts that can be compressed."""
    family = families().get(str(getattr(config, "model_type", None)))
    return {} if family is None else dict(family.processor_options)


def check_frame_source(value: Any) -> FrameSource:
    """``frame_source`` in one of its forms, or a ValueError."""
    if value is None or value in ("videos", "images"):
        return value or "videos"
    counts = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not counts or not all(type(n) is int and n > 0 for n in counts):
        raise ValueError(
            'frame_source must be "videos", "images", or how many images each video of a prompt '
            f"has, such as [8, 8]; got {value!r}"
        )
    return tuple(counts)


def join_images(
    prompt: Prompt, images: Sequence[VideoSpan], frame_source: FrameSource
) -> list[VideoSpan]:
    """Make videos of a prompt's images, as their user declared them.

    Parameters
    ----------
    prompt : where they stand.
    images : spans of one or more frames, in prompt order.
    frame_source : "images": all of a sample's images are one video. Or how many images each video
        of a sample has, in order; a sample may have fewer videos than that, but only whole ones.
    """
    by_sample: dict[int, list[tuple[Tensor, tuple[int, int]]]] = {}
    for image in images:
        found = by_sample.setdefault(image.sample, [])
        found += [(frame, image.grid) for frame in image.positions]
    videos = []
    for sample, found in by_sample.items():
        _check_whole(prompt, sample, [places for places, _ in found])
        counts = [len(found)] if isinstance(frame_source, str) else frame_source
        start = 0
        for count in counts:
            if start >= len(found):
                break
            video = found[start : start + count]
            start += count
            grids = sorted({grid for _, grid in video})
            if len(grids) > 1:
                raise UnsupportedError(
                    f"images of {grids[0]} and of {grids[-1]} tokens cannot be frames of one "
                    "video; resize them alike, or say which belong together: "
                    "frame_source=[8, 8] for two videos of 8 images"
                )
            places = torch.stack([places for places, _ in video])
            videos.append(VideoSpan(sample, places, grids[0], "images"))
        if start != len(found):
            raise UnsupportedError(
                f"frame_source={list(frame_source)} does not fit a prompt with {len(found)} "
                "images; give the number of images in each of its videos, in order"
            )
    return videos


def _check_counts(prompt: Prompt, found: Sequence[VideoSpan]) -> None:
    """Refuse a layout that finds other frames than the encoder got."""
    if not found:
        return
    counts = prompt.counts_of([span.sample for span in found])
    frames = [len(span.positions) for span in found]
    if counts is not None and counts != frames:
        raise UnsupportedError(
            f"the prompt's {prompt.kind}s have {frames} frames of "
            f"{[span.positions.shape[1] for span in found]} tokens, where the encoder got {counts} "
            "frames; pass the processor's output unchanged, or layout="
        )


def _check_whole(prompt: Prompt, sample: int, frames: Sequence[Tensor]) -> None:
    """Refuse parts of images: what stands before a frame is one and the same marker.

    Tiles of a large image follow each other without one, or each has a marker of its own.
    """
    first = torch.stack([places[0] for places in frames])
    before = prompt.input_ids[sample, (first - 1).clamp_min(0)]
    if (before != before[0]).any():
        raise UnsupportedError(
            "images that are frames must be whole, each behind the same marker, and these are cut "
            "into tiles or touch each other; tell the processor not to split images "
            "(do_image_splitting=False, crop_to_patches=False), or pass layout="
        )


def _arrived(inputs: Mapping[str, Any], kind: str) -> bool:
    """Whether videos (images) came, raw or encoded by `generate`."""
    return inputs.get(PIXELS[kind]) is not None or _encoded(inputs, kind) is not None


def _encoded(inputs: Mapping[str, Any], kind: str) -> Any:
    return (inputs.get(ENCODED) or {}).get(kind)


def _encoded_rows(inputs: Mapping[str, Any], kind: str) -> list[int] | None:
    """Rows per video (image) of `generate`'s pre-encoded features; None where there are none."""
    output = _encoded(inputs, kind)
    # Some releases give a video as (F, N, D), others as (R, D).
    return None if output is None else [rows.shape[:-1].numel() for rows in output.pooler_output]
