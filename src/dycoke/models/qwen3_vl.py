"""Qwen3-VL and its MoE: a timestamp before each slice of two frames, so one run per slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
ROPE = "3-D"
FRAMES = ("videos", "images")
NAME = "Qwen3-VL"
CHECKPOINTS = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct")


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [
        VideoSpan(sample, prompt.runs(places), grid)
        for sample, places, grid in prompt.packed(prompt.token_id)
    ]
