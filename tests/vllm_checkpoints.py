"""Tiny checkpoints that vLLM's engine on a CPU can run: heads of 32, names as hubs have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import checkpoints
import tiny
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from dycoke import nano

HEAD = 32
WIDE = {"hidden_size": 4 * HEAD, "head_dim": HEAD}
SECTION = [4, 6, 6]
SIDE = 48
"""Pixels of a frame's side; 36 tokens of Qwen's."""
LARGE = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * SIDE * SIDE}}


def _renamed(path: Path) -> Path:
    """Transformers 5 names a vision tower's weights anew, and vLLM reads the hubs' names."""
    file = path / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith("vision_tower.") and ".vision_model." not in name
        else name: weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return path


def llava_onevision(folder: Path) -> Path:
    """The embedded model."""
    return _renamed(Path(shutil.copytree(nano.path(), folder / "nano")))


def _wider(model: PreTrainedModel, **text: Any) -> Any:
    """The same model with a decoder whose heads are large enough for vLLM's kernels."""
    config = model.config
    for name, value in {**WIDE, "initializer_range": 0.15, **text}.items():
        setattr(config.text_config, name, value)
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = WIDE["hidden_size"]
    return tiny._build(type(model), config, "sdpa", seed=0)


def _rope(model: PreTrainedModel, **more: Any) -> dict[str, Any]:
    rope = {**model.config.text_config.rope_parameters, "mrope_section": SECTION, **more}
    return {"rope_parameters": rope}


def qwen2_5_vl(folder: Path) -> Path:
    model = tiny.qwen2_5_vl()
    processor = checkpoints.qwen2_5_processor(LARGE)
    return checkpoints._save(_wider(model, **_rope(model)), processor, folder / "qwen2_5_vl")


def qwen3_vl(folder: Path) -> Path:
    half = [0.5] * 3  # vLLM normalises videos as the image processor says, as hubs' say the same
    sizes = {**checkpoints.PATCHES, "temporal_patch_size": 2, **LARGE}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, image_mean=half, image_std=half),
        tokenizer=checkpoints.qwen_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=checkpoints.QWEN_TEMPLATE,
    )
    model = tiny.qwen3_vl()
    return checkpoints._save(
        _wider(model, **_rope(model, mrope_interleaved=True)), processor, folder / "qwen3_vl"
    )


def llava_next_video(folder: Path) -> Path:
    side = tiny.llava_next_video().config.vision_config.image_size
    images = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**images),
        video_processor=LlavaNextVideoVideoProcessor(**images),
        tokenizer=checkpoints._tokenizer({tiny.IMAGE: "<image>", tiny.VIDEO: "<video>"}),
        patch_size=tiny.llava_next_video().config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=checkpoints.template("<video>"),
    )
    model = _wider(tiny.llava_next_video())
    return _renamed(checkpoints._save(model, processor, folder / "llava_next_video"))
