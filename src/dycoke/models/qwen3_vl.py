"""Qwen3-VL and its MoE: a timestamp before each slice of two frames, so one run per slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
ROPE = "3-D"


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [
        VideoSpan(sample, prompt.runs(places), grid)
        for sample, places, grid in prompt.packed(prompt.config.video_token_id)
    ]
