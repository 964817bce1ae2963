"""InternVL3 and 3.5: a video's frames are images, one tile each, as "Frame1: <img> ... </img>"."""

from __future__ import annotations

from math import isqrt

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("internvl",)
ROPE = "1-D"
FRAMES = ("images",)
VISION = "vision_tower.encoder.layer.*.attention"
NAME = "InternVL3, InternVL3.5"
CHECKPOINTS = ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF")
NOTES = ("beams and several answers mix up frames in transformers 5.17 itself",)


def layout(prompt: Prompt) -> list[VideoSpan]:
    rows = prompt.encoded  # per tile
    if rows is None:
        patch, ratio = prompt.config.vision_config.patch_size[0], prompt.config.downsample_ratio
        tiles, _, size, _ = prompt.pixels.shape
        rows = [int(size // patch * ratio) ** 2] * tiles
    spans = []
    for sample, places in prompt.split(prompt.token_id, rows):
        side = isqrt(len(places))
        spans.append(VideoSpan(sample, prompt.frames(places, side * side), (side, side)))
    return spans
