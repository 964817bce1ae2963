"""Qwen3-VL, Qwen3.5 and their MoE: a timestamp before each slice of two frames: a run per slice."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [VideoSpan(*video) for video in prompt.packed(prompt.token_id)]


FAMILY = Family(
    name="Qwen3-VL, Qwen3.5",
    model_types=("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    rope="3-D",
    layout=layout,
    checkpoints=("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3.5-27B"),
    frame_sources=("videos", "images"),
    vision_attention="visual.blocks.*.attn",
    notes=("Qwen3.5: only full-attention layers are pruned; linear ones see all kept tokens",),
)
