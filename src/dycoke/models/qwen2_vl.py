"""Qwen2-VL and Qwen2.5-VL: a video is one run of placeholders; two frames make one slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
ROPE = "3-D"


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [
        VideoSpan(sample, prompt.frames(places, grid[0] * grid[1]), grid)
        for sample, places, grid in prompt.packed(prompt.config.video_token_id)
    ]
