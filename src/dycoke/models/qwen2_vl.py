"""Qwen2-VL and Qwen2.5-VL: a video is one run of placeholders; two frames make one slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
ROPE = "3-D"
FRAMES = ("videos", "images")
NAME = "Qwen2-VL, Qwen2.5-VL"
CHECKPOINTS = ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [
        VideoSpan(sample, prompt.frames(places, grid[0] * grid[1]), grid)
        for sample, places, grid in prompt.packed(prompt.token_id)
    ]
