"""GLM-4.1V, 4.5V and 4.6V: a time behind each frame, and the placeholder of images."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [VideoSpan(*video) for video in prompt.packed(prompt.config.image_token_id)]


FAMILY = Family(
    name="GLM-4.1V, GLM-4.5V, GLM-4.6V",
    model_types=("glm4v", "glm46v", "glm4v_moe"),
    rope="3-D",
    layout=layout,
    checkpoints=("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.5V", "zai-org/GLM-4.6V-Flash"),
    frame_sources=("videos", "images"),
    vision_attention="visual.blocks.*.attn",
    video_token="image_token_id",
    notes=("beams and several answers fail in transformers 5.18 and newer itself",),
)
