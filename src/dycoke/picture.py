"""A trace as a picture: which tokens stayed, and which frames each word looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dycoke.core.steps import SampleTrace

CELL = 96  # side of a frame in the picture, in pixels
MARGIN = 8
LABEL = 130  # width of the words beside the map
ROW = 18  # height of a word
DIM = 0.22  # how bright a merged token stays
INK, PAPER, HEAT = (30, 30, 30), (255, 255, 255), (200, 50, 20)


def attention_by_frame(sample: SampleTrace) -> NDArray[np.float32]:
    """Attention mass per decode step and frame.

    Returns
    -------
    array, shape (steps, frames)
        Frames of all videos, one after another. A row sums to what the newest token's attention
        spends on visual tokens at all.
    """
    frames, start = [], 0
    for keep in sample.keep:
        frames.append(keep.nonzero()[:, 0] + start)
        start += len(keep)
    owner = torch.cat(frames)
    rows = [
        torch.zeros(start).index_add_(0, owner, attention.float()) for attention in sample.attention
    ]
    mass: NDArray[np.float32] = torch.stack(rows).numpy() if rows else np.zeros((0, start), "f4")
    return mass


def draw(
    frames: NDArray[np.uint8],
    sample: SampleTrace,
    words: Sequence[str],
    title: str,
    grid: tuple[int, int],
) -> Image.Image:
    """Frames with merged tokens dimmed, and below them where each word looked.

    Parameters
    ----------
    frames : uint8, (F, H, W, 3): one picture per temporal slice.
    sample : the trace of a prompt with this one video.
    words : the generated tokens; the first came from the prefill, which has no trace.
    title : one or more lines on top.
    grid : rows and columns of a frame's tokens.
    """
    count = len(frames)
    mass = attention_by_frame(sample)
    width = LABEL + count * CELL + 2 * MARGIN
    top = MARGIN + (2 + title.count("\n")) * ROW
    height = top + CELL + MARGIN + len(mass) * ROW + ROW + MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    pen.text((MARGIN, MARGIN), title, INK, font)
    pen.text((MARGIN, top + CELL // 2 - ROW), "kept tokens", INK, font)
    for f in range(count):
        left = LABEL + f * CELL
        image.paste(_dimmed(frames[f], sample.keep[0][f].view(grid).numpy()), (left, top))
        pen.text((left + 4, top - ROW + 2), f"{f}", INK, font)
    scale = float(mass.max()) or 1.0 if len(mass) else 1.0
    for step, row in enumerate(mass):
        y = top + CELL + MARGIN + step * ROW
        # Step i feeds word i and writes word i + 1.
        word = words[step + 1] if step + 1 < len(words) else ""
        pen.text((MARGIN, y), word[:18], INK, font)
        for f, value in enumerate(row[:count]):
            left, share = LABEL + f * CELL, float(value) / scale
            colour = tuple(round(p + (h - p) * share) for p, h in zip(PAPER, HEAT, strict=True))
            pen.rectangle((left, y, left + CELL - 2, y + ROW - 2), fill=colour)
    note = f"attention of each written word to the frames; darkest = {scale:.1%} of all attention"
    pen.text((MARGIN, height - ROW - MARGIN // 2), note, INK, font)
    return image


def _dimmed(frame: NDArray[np.uint8], keep: NDArray[np.bool_]) -> Image.Image:
    """A frame at CELL pixels, dark where tokens were merged away."""
    picture = np.asarray(Image.fromarray(frame).resize((CELL - 2, CELL - 2)), dtype=np.float32)
    rows = np.arange(CELL - 2) * keep.shape[0] // (CELL - 2)
    columns = np.arange(CELL - 2) * keep.shape[1] // (CELL - 2)
    light = np.where(keep[rows][:, columns], 1.0, DIM)[:, :, None]
    return Image.fromarray((picture * light).astype(np.uint8))
