"""LLaVA-OneVision: a video is one run of F * N placeholders, then one newline token."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    vision = prompt.config.vision_config
    # The model pools each frame's square of patches 2 x 2, rounding up.
    side = -(-(vision.image_size // vision.patch_size) // 2)
    rows = prompt.encoded
    if rows is None:
        pixels = prompt.inputs.get("pixel_values_videos")
        if pixels is None:
            return []
        rows = [pixels.shape[1] * side * side + 1] * pixels.shape[0]
    return [
        VideoSpan(sample, prompt.whole_frames(places[:-1], side * side), (side, side))
        for sample, places in prompt.split(prompt.config.video_token_id, rows)
    ]


FAMILY = Family(
    name="LLaVA-OneVision",
    model_types=("llava_onevision",),
    rope="1-D",
    layout=layout,
    checkpoints=(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    ),
    vision_attention="vision_tower.encoder.layers.*.self_attn",
    token_side=lambda config, side: -(-side // 2),
)
