"""What a family states, and what its layout gets and returns.

`Family` is what a file of this folder ends in. Its ``layout`` takes a `Prompt` and returns a
`VideoSpan` per video; `Prompt` has the helpers that most layouts are made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dycoke.errors import UnsupportedError, check_one_of
from dycoke.vision.wrap import PIXELS

Rope = Literal["1-D", "3-D"]
Source = Literal["videos", "images"]


@dataclass(frozen=True, eq=False)
class VideoSpan:
    """The visual tokens of one video in a prompt.

    Attributes
    ----------
    sample : int
        Row of the batch.
    positions : Tensor, long, shape (F, N)
        Where each frame's tokens stand in the prompt, frames in order, row-major inside a frame.
    grid : (int, int)
        Rows and columns of one frame; their product is N. (1, N) where they are not known.
    source : "videos" or "images"
        What the frames were given as.
    """

    sample: int
    positions: Tensor
    grid: tuple[int, int]
    source: str = "videos"

    def __post_init__(self) -> None:
        if self.positions.ndim != 2 or 0 in self.positions.shape:
            raise ValueError(
                f"positions must have the shape (F, N), got {tuple(self.positions.shape)}"
            )
        if self.grid[0] * self.grid[1] != self.positions.shape[1]:
            raise ValueError(
                f"a grid of {self.grid} does not hold {self.positions.shape[1]} tokens per frame"
            )


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a family may look at to find the video tokens.

    Attributes
    ----------
    config : the model's config.
    input_ids : Tensor, long, shape (B, S)
    position_ids : Tensor or None
        As `generate` passes them, (..., B, S).
    inputs : mapping
        Everything else that the model's forward received.
    encoded : sequence of int or None
        Rows of each video (image) in the vision encoder's output, in prompt order, where `generate`
        encoded it before the forward (transformers 5.18 and newer).
    kind : "video" or "image"
        What the layout has to find: videos, or images where the user said that they are frames.
    counts : sequence of int or None
        Frames of each video (image) that the vision encoder got, in its order; None where it was
        called outside the block. Beams and further answers repeat a video, but not its count; see
        `counts_of`.
    """

    config: Any
    input_ids: Tensor
    position_ids: Tensor | None
    inputs: Mapping[str, Any]
    encoded: Sequence[int] | None
    kind: str = "video"
    counts: Sequence[int] | None = None

    @property
    def pixels(self) -> Any:
        """What the processor made of the videos (images), where `generate` did not encode them."""
        return self.inputs.get(PIXELS[self.kind])

    @property
    def grids(self) -> Tensor | None:
        """Slices, rows and columns of patches, (videos or images, 3), where they are passed on."""
        return self.inputs.get(f"{self.kind}_grid_thw")

    @property
    def token_id(self) -> int:
        """The placeholder of a video (image)."""
        token: int = getattr(self.config, f"{self.kind}_token_id")
        return token

    def split(self, token_id: int, rows: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Cut the placeholders of ``token_id`` into videos of ``rows`` tokens each.

        Videos fill placeholders in prompt order, as the model scatters them. Counts come from the
        encoder, never from gaps in the prompt: adjacent videos have none.

        Returns
        -------
        list of (sample, positions), positions long of shape (rows[i],); none for rows of 0
        """
        places = (self.input_ids == token_id).nonzero()
        rows = [n for n in rows if n]  # a sample without images may have an entry of its own
        if len(places) != sum(rows):
            raise UnsupportedError(
                f"the prompt has {len(places)} {self.kind} placeholders where the {self.kind}s "
                f"fill {sum(rows)}: it was cut or built by hand; pass the processor's output "
                "unchanged"
            )
        videos = []
        for video in torch.split(places, list(rows)):
            sample = int(video[0, 0])
            if int(video[-1, 0]) != sample:
                raise UnsupportedError(
                    f"a {self.kind} runs over the end of its prompt into the next one; pass the "
                    "processor's output unchanged"
                )
            videos.append((sample, video[:, 1]))
        return videos

    def whole_frames(self, positions: Tensor, tokens_per_frame: int) -> Tensor:
        """Cut one video's positions into whole frames: (F * N,) -> (F, N)."""
        if tokens_per_frame < 1 or len(positions) == 0 or len(positions) % tokens_per_frame:
            raise UnsupportedError(
                f"{len(positions)} video tokens are not a whole number of frames of "
                f"{tokens_per_frame}; was the prompt cut (prefill_chunk_size)? Prefill it at once"
            )
        return positions.view(-1, tokens_per_frame)

    def counts_of(self, samples: Sequence[int]) -> list[int] | None:
        """Frames of each video, for videos in these samples; None where they are not known."""
        if self.counts is None:
            return None
        counts = [n for n in self.counts if n]
        repeats = max(1, len(samples) // max(1, len(counts)))
        if repeats * len(counts) != len(samples):
            raise UnsupportedError(
                f"the prompt has {len(samples)} {self.kind}s where the encoder got {len(counts)}; "
                "pass the processor's output unchanged"
            )
        # Of a repeated sample the first has the counts.
        known: dict[int, list[int]] = {}
        firsts = [sample for sample in samples if sample % repeats == 0]
        for sample, count in zip(firsts, counts, strict=True):
            known.setdefault(sample, []).append(count)
        left = {sample: iter(known[sample - sample % repeats]) for sample in samples}
        return [next(left[sample]) for sample in samples]

    def cut(self, token_id: int, rows: Sequence[int]) -> list[tuple[int, Tensor]]:
        """The videos of ``token_id`` in the frames that the encoder got.

        For families whose frames are of any size, and whose prompts need not show where one ends.

        Returns
        -------
        list of (sample, positions), positions long of shape (F, N)
        """
        videos = self.split(token_id, rows)
        counts = self.counts_of([sample for sample, _ in videos])
        if counts is None:
            raise UnsupportedError(
                f"nothing tells how many frames each {self.kind} has: its features were encoded "
                "outside the block, or cut by prefill_chunk_size. Call generate() with the "
                "processor's output inside the block, and prefill at once, or pass layout="
            )
        for (_, places), count in zip(videos, counts, strict=True):
            if len(places) % count:
                raise UnsupportedError(
                    f"{len(places)} {self.kind} tokens are not {count} frames of one size, as the "
                    "encoder got them; pass the processor's output unchanged"
                )
        return [
            (sample, places.view(count, -1))
            for (sample, places), count in zip(videos, counts, strict=True)
        ]

    def packed(self, token_id: int) -> list[tuple[int, Tensor, tuple[int, int]]]:
        """The videos of a family that takes all patches as one list, with a grid per video.

        Returns
        -------
        list of (sample, positions, grid), positions long of shape (F, N), grid as in `VideoSpan`
        """
        merge = self.config.vision_config.spatial_merge_size
        grids, rows = self.grids, self.encoded
        filled = None if grids is None else (grids.prod(-1) // merge**2).tolist()
        if rows is None:
            if filled is None or self.pixels is None:
                return []
            rows = filled
        elif filled is not None and list(rows) != filled:
            raise UnsupportedError(
                f"{self.kind}_grid_thw is of {filled} tokens per {self.kind}, and the encoder made "
                f"{list(rows)} of them; pass the grids of what was encoded"
            )
        videos = self.split(token_id, rows)
        if grids is None:
            shapes = [self._grid(sample, places) for sample, places in videos]
        else:
            shapes = [(height // merge, width // merge) for _, height, width in grids.tolist()]
        return [
            (sample, self.whole_frames(places, shape[0] * shape[1]), shape)
            for (sample, places), shape in zip(videos, shapes, strict=True)
        ]

    def _grid(self, sample: int, places: Tensor) -> tuple[int, int]:
        """Rows and columns of a frame, from the height and width positions of its video.

        `generate` of transformers 5.18 and newer drops the grid once it has encoded the video. The
        temporal positions cannot stand in for it: slow sampling gives several slices the same
        value. The first run is the first frame, or all of them, which share these positions.
        """
        ids = self.position_ids
        if ids is None or ids.ndim != 3 or ids.shape[0] < 3:
            raise UnsupportedError(
                f"the grid is neither in {self.kind}_grid_thw nor in 3-D position_ids; pass the "
                "processor's whole output to generate()"
            )
        run = places[: int((places.diff() == 1).long().cumprod(0).sum()) + 1]
        sides = [int(side.max() - side.min()) + 1 for side in ids[-2:, sample, run]]
        if len(run) % (sides[0] * sides[1]):
            raise UnsupportedError(
                f"{len(run)} {self.kind} tokens behind each other do not have the positions of "
                f"whole frames; pass the processor's mm_token_type_ids, or {self.kind}_grid_thw, "
                "and prefill at once, without prefill_chunk_size"
            )
        return sides[0], sides[1]


Layout = Callable[[Prompt], list[VideoSpan]]
"""Finds the videos of a prompt; a family's own, or one that a user passes."""

Masks = Callable[[Any, Mapping[str, Any], Mapping[str, Any], Tensor], dict[str, Any] | None]
"""Makes a prompt's masks anew once it is shortened, or returns None where the usual ones do.

Takes the model's config, what the model received, what its decoder will receive (shortened), and
the prompt position of each row that stayed, (B, R). Returns a mask per kind of layer.
"""

EncoderOrder = Callable[[Any, tuple[int, int, int]], Tensor]
"""The vision encoder's order of a video's tokens, where that is not the prompt's.

Takes the vision config and the video's (slices, rows, columns) of tokens. Returns a permutation,
long (tokens,): the token at place i of the encoder is token order[i] of the prompt.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """What has to be known of a model family; each file of this folder makes one.

    Attributes
    ----------
    name : str
        The family's name for people.
    model_types : tuple of str
        The values of ``config.model_type`` that it serves.
    rope : "1-D" or "3-D"
        Whether a token has one rotary position, or one each for time, height and width.
    layout : callable
        Finds the videos of a `Prompt`: a `VideoSpan` per video, or, where the prompt's ``kind`` is
        "image", per image. An empty list says that there are none.
    checkpoints : tuple of str
        A few that people use, as "owner/name".
    frame_sources : tuple of "videos" and "images"
        What the frames of a video may be given as; what the family's own processor makes of a video
        comes first. Images count as frames only where the user says ``frame_source="images"``.
    vision_attention : str or None
        Path of the vision encoder's attention modules in the base model, with ``.*.`` for the
        layer. Without it the family cannot serve methods that need the encoder's attention.
    token_side : callable or None
        The side of the square of tokens that the encoder's square of patches becomes, from the
        model's config and the square's side. None where patches come packed, as many consecutive
        ones to a token as ``spatial_merge_size`` says.
    encoder_order : callable or None
        The order of a video's tokens in the vision encoder (`EncoderOrder`), where that is not the
        prompt's.
    masks : callable or None
        Makes the masks of a shortened prompt (`Masks`), where they are more than causal and
        windowed.
    video_token : str
        The config's name for the placeholder of a video.
    processor_options : mapping
        Arguments that the processor has to be called with, for prompts that can be compressed.
    notes : tuple of str
        What does not apply to this family, and why, for ``dycoke models``.

    Raises
    ------
    ValueError, TypeError
        For a field that cannot be right.
    """

    name: str
    model_types: tuple[str, ...]
    rope: Rope
    layout: Layout
    checkpoints: tuple[str, ...]
    frame_sources: tuple[Source, ...] = ("videos",)
    vision_attention: str | None = None
    token_side: Callable[[Any, int], int] | None = None
    encoder_order: EncoderOrder | None = None
    masks: Masks | None = None
    video_token: str = "video_token_id"
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("rope", self.rope, get_args(Rope))
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a word or more, got {self.name!r}")
        if not isinstance(self.video_token, str) or not self.video_token.isidentifier():
            raise ValueError(
                f"video_token must be the name of a config's field, got {self.video_token!r}"
            )
        options = self.processor_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise TypeError(f"processor_options must map names to values, got {options!r}")
        for label in ("model_types", "checkpoints", "frame_sources", "notes"):
            words = getattr(self, label)
            if not isinstance(words, tuple) or not all(isinstance(w, str) and w for w in words):
                raise TypeError(f"{label} must be a tuple of words, got {words!r}")
            if len(set(words)) < len(words) or (not words and label != "notes"):
                raise ValueError(
                    f"{label} must have at least one word, and none twice; got {words!r}"
                )
        for source in self.frame_sources:
            check_one_of("frame_sources", source, get_args(Source))
        for checkpoint in self.checkpoints:
            if checkpoint.count("/") != 1:
                raise ValueError(f'checkpoints must be "owner/name", got {checkpoint!r}')
        path = self.vision_attention
        if path is not None and not re.fullmatch(r"\w+(\.\w+)*\.\*(\.\w+)+", path):
            raise ValueError(
                'vision_attention must be the path of a module with ".*." for the layer, such as '
                f'"visual.blocks.*.attn"; got {path!r}'
            )
        for label in ("layout", "token_side", "encoder_order", "masks"):
            function = getattr(self, label)
            if not callable(function) and (function is not None or label == "layout"):
                raise TypeError(f"{label} must be a function, got {function!r}")


def square(tokens: int) -> tuple[int, int]:
    """The grid of a frame of so many tokens: a square where they make one, else a row."""
    side = isqrt(tokens)
    return (side, side) if side**2 == tokens else (1, tokens)
