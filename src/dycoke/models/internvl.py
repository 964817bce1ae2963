"""InternVL3 and 3.5: a video's frames are images, one tile each, as "Frame1: <img> ... </img>"."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan, square


def layout(prompt: Prompt) -> list[VideoSpan]:
    rows = prompt.encoded  # per tile
    if rows is None:
        patches, ratio = prompt.config.vision_config.patch_size, prompt.config.downsample_ratio
        tiles, _, *sides = prompt.pixels.shape
        height, width = (int(s // p * ratio) for s, p in zip(sides, patches, strict=True))
        rows = [height * width] * tiles
    return [
        VideoSpan(sample, places[None], square(len(places)))
        for sample, places in prompt.split(prompt.token_id, rows)
    ]


FAMILY = Family(
    name="InternVL3, InternVL3.5",
    model_types=("internvl",),
    rope="1-D",
    layout=layout,
    checkpoints=("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF"),
    frame_sources=("images",),
    vision_attention="vision_tower.encoder.layer.*.attention",
    token_side=lambda config, side: int(side * config.downsample_ratio),
    notes=("beams and several answers mix up frames in transformers 5.17 itself",),
)
