"""LLaVA-NeXT-Video: a video is one run of F * N placeholders."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    vision = prompt.config.vision_config
    side = vision.image_size // vision.patch_size // prompt.config.spatial_pool_stride
    rows = prompt.encoded
    if rows is None:
        pixels = prompt.inputs.get("pixel_values_videos")
        if pixels is None:
            return []
        rows = [pixels.shape[1] * side * side] * pixels.shape[0]
    return [
        VideoSpan(sample, prompt.whole_frames(places, side * side), (side, side))
        for sample, places in prompt.split(prompt.config.video_token_id, rows)
    ]


FAMILY = Family(
    name="LLaVA-NeXT-Video",
    model_types=("llava_next_video",),
    rope="1-D",
    layout=layout,
    checkpoints=("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava-hf/LLaVA-NeXT-Video-34B-hf"),
    vision_attention="vision_tower.encoder.layers.*.self_attn",
    token_side=lambda config, side: side // config.spatial_pool_stride,
)
