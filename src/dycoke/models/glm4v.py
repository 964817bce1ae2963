"""GLM-4.1V, 4.5V and 4.6V: a time behind each frame, and the placeholder of images."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("glm4v", "glm46v", "glm4v_moe")
ROPE = "3-D"
FRAMES = ("videos", "images")
VIDEO_TOKEN = "image_token_id"
VISION = "visual.blocks.*.attn"
NAME = "GLM-4.1V, GLM-4.5V, GLM-4.6V"
CHECKPOINTS = ("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.5V", "zai-org/GLM-4.6V-Flash")
NOTES = ("beams and several answers fail in transformers 5.18 and newer itself",)


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [VideoSpan(*video) for video in prompt.packed(prompt.config.image_token_id)]
