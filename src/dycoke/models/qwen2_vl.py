"""Qwen2-VL and Qwen2.5-VL: a video is one run of placeholders; two frames make one slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    return [VideoSpan(*video) for video in prompt.packed(prompt.token_id)]


def encoder_order(vision: Any, grid: tuple[int, int, int]) -> Tensor:
    """Qwen2.5-VL's encoder goes through a slice window by window, Qwen2-VL's row by row."""
    slices, height, width = grid
    places = torch.arange(slices * height * width).view(slices, -1)
    if not hasattr(vision, "window_size"):
        return places.flatten()
    side = vision.window_size // vision.spatial_merge_size // vision.patch_size
    window = (torch.arange(height)[:, None] // side) * width + torch.arange(width) // side
    return places[:, window.flatten().argsort(stable=True)].flatten()


FAMILY = Family(
    name="Qwen2-VL, Qwen2.5-VL",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    rope="3-D",
    layout=layout,
    checkpoints=("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    frame_sources=("videos", "images"),
    vision_attention="visual.blocks.*.attn",
    encoder_order=encoder_order,
)
