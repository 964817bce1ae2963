"""An image beside the video of a tiny prompt, for families whose image inputs are told by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch


def image_of(model: Any, seed: int = 0) -> dict[str, Any]:
    """The image inputs of one image; skips a family that takes others than those known here."""
    g = torch.Generator().manual_seed(seed + 50)
    known = set(inspect.signature(model.base_model.get_image_features).parameters)
    vision = model.config.vision_config
    if "image_grid_thw" in known and hasattr(vision, "spatial_merge_size"):
        merge, temporal = vision.spatial_merge_size, getattr(vision, "temporal_patch_size", 1)
        height, width = 2 * merge, 3 * merge
        patches = torch.randn(height * width, 3 * temporal * vision.patch_size**2, generator=g)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}
    if "image_sizes" in known and "vision_feature_layer" in known:
        side = vision.image_size
        pixels = torch.randn(1, 2, 3, side, side, generator=g)  # the whole, and one tile
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]])}
    pytest.skip(f"no image inputs for {model.config.model_type} here yet")


@torch.no_grad()
def image_rows(model: Any, image: dict[str, Any]) -> torch.Tensor:
    """What the model puts in the place of an image's tokens: (rows, D)."""
    rows = model.base_model.get_image_features(**image, return_dict=True).pooler_output
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


def insert(model: Any, inputs: dict[str, Any], image: dict[str, Any], at: int) -> dict[str, Any]:
    """The same prompt of one sample with an image before its token ``at`` (may be negative)."""
    count = len(image_rows(model, image))
    marks = "image_grid_thw" in image
    tokens = [tiny.VISION_START] * marks + [tiny.IMAGE] * count + [tiny.VISION_END] * marks
    kinds = [0] * marks + [1] * count + [0] * marks
    fill = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "mm_token_type_ids": kinds}
    mixed = {**inputs, **image}
    for name, new in fill.items():
        if name in inputs:
            left, right = inputs[name][:, :at], inputs[name][:, at:]
            mixed[name] = torch.cat([left, torch.tensor([new]), right], 1)
    return mixed
