"""Qwen3-VL, Qwen3.5 and their MoE: a timestamp before each slice of two frames: a run per slice."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
ROPE = "3-D"
FRAMES = ("videos", "images")
VISION = "visual.blocks.*.attn"
NAME = "Qwen3-VL, Qwen3.5"
CHECKPOINTS = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3.5-27B")
NOTES = ("Qwen3.5: linear attention layers see all that merging left, only the others are pruned",)


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [VideoSpan(*video) for video in prompt.packed(prompt.token_id)]
