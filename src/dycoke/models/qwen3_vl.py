"""Qwen3-VL, Qwen3.5 and their MoE: a timestamp before each slice of two frames: a run per slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
ROPE = "3-D"


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [
        VideoSpan(sample, prompt.runs(places), grid)
        for sample, places, grid in prompt.packed(prompt.config.video_token_id)
    ]
