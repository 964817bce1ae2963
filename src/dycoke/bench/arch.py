"""Known architectures: true shapes, random weights, and prompts that need no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLVideoProcessor,
)

TEXT_BEFORE, TEXT_AFTER = 14, 16  # tokens of a chat template's turn and of a question
FIRST_WORD = 10  # text ids start here: beyond padding, below every special token


@dataclass(frozen=True)
class Arch:
    """Shapes of one checkpoint.

    Attributes
    ----------
    name : what commands call it.
    model_type : the family, as ``config.model_type``.
    config : arguments of the family's config, with ``text_config`` and ``vision_config``.
    video : arguments of the family's video processor.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    video: Mapping[str, Any]

    def cut(self, layers: int | None, vision_layers: int | None) -> Arch:
        """The same with only the first layers of the language model and of the vision encoder."""
        config = {**self.config, "text_config": {**self.config["text_config"]}}
        config["vision_config"] = vision = {**self.config["vision_config"]}
        if layers is not None:
            config["text_config"]["num_hidden_layers"] = _fewer(
                "layers", layers, config["text_config"]["num_hidden_layers"]
            )
        if vision_layers is not None:
            depth = "depth" if "depth" in vision else "num_hidden_layers"
            vision[depth] = _fewer("vision layers", vision_layers, vision[depth])
        return replace(self, config=config)

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of the language model and of the vision encoder."""
        vision = self.config["vision_config"]
        depth: int = vision.get("depth") or vision["num_hidden_layers"]
        return self.config["text_config"]["num_hidden_layers"], depth

    def build(self, device: str, dtype: torch.dtype, attention: str | None = None) -> Any:
        """The model with random weights, made straight on the device."""
        config = AutoConfig.for_model(self.model_type, **self.config)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        return model.eval()

    def inputs(self, model: Any, frames: NDArray[np.uint8]) -> dict[str, Any]:
        """A prompt about one video, on the model's device.

        Parameters
        ----------
        frames : uint8, (F, H, W, 3)
        """
        inputs: dict[str, Any] = FAMILIES[self.model_type](self, model.config, frames)
        for name, tensor in inputs.items():
            dtype = model.dtype if tensor.is_floating_point() else None
            inputs[name] = tensor.to(model.device, dtype)
        return inputs


def _fewer(what: str, wanted: int, have: int) -> int:
    if not 1 <= wanted <= have:
        raise ValueError(f"{what} must be in 1 to {have}, got {wanted}")
    return wanted


def _prompt(video: list[int]) -> dict[str, Any]:
    before = list(range(FIRST_WORD, FIRST_WORD + TEXT_BEFORE))
    ids = torch.tensor([before + video + before[:1] * TEXT_AFTER])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava_onevision(arch: Arch, config: Any, frames: NDArray[np.uint8]) -> dict[str, Any]:
    processed = LlavaOnevisionVideoProcessor(**arch.video)([frames], return_tensors="pt")
    vision = config.vision_config
    side = -(-(vision.image_size // vision.patch_size) // 2)  # pooled 2 x 2, rounding up
    rows = len(frames) * side * side + 1  # and a newline
    return {**_prompt([config.video_token_id] * rows), **processed}


def _llava_next_video(arch: Arch, config: Any, frames: NDArray[np.uint8]) -> dict[str, Any]:
    processed = LlavaNextVideoVideoProcessor(**arch.video)([frames], return_tensors="pt")
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.spatial_pool_stride
    return {**_prompt([config.video_token_id] * (len(frames) * side * side)), **processed}


def _qwen_vl(arch: Arch, config: Any, frames: NDArray[np.uint8]) -> dict[str, Any]:
    processed = Qwen2VLVideoProcessor(**arch.video)([frames], return_tensors="pt")
    rows = int(processed["video_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
    prompt = _prompt(
        [
            config.vision_start_token_id,
            *[config.video_token_id] * rows,
            config.vision_end_token_id,
        ]
    )
    kinds = (prompt["input_ids"] == config.video_token_id).long() * 2
    return {**prompt, **processed, "mm_token_type_ids": kinds}


FAMILIES: dict[str, Callable[[Arch, Any, NDArray[np.uint8]], dict[str, Any]]] = {
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
}


def _text(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _onevision(size: str, text: dict[str, Any], tied: bool = False) -> Arch:
    # SigLIP so400m at 384 pixels, its last layer cut off as in the checkpoints.
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = {
        "text_config": {"model_type": "qwen2", "tie_word_embeddings": tied, **text},
        "vision_config": vision,
        "image_token_index": 151646,
        "video_token_index": 151647,
        "tie_word_embeddings": tied,
    }
    processor = {"size": {"height": 384, "width": 384}}
    return Arch(f"llava-onevision-{size}", "llava_onevision", config, processor)


def _next_video() -> Arch:
    # Vicuna 7B and CLIP's large encoder at 336 pixels.
    text = _text(4096, 11008, 32, 32, 32, 32064)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    config = {
        "text_config": {"model_type": "llama", **text},
        "vision_config": vision,
        "video_token_index": 32000,
        "image_token_index": 32001,
    }
    square = {"height": 336, "width": 336}
    processor = {"size": {"shortest_edge": 336}, "crop_size": square}
    return Arch("llava-next-video-7b", "llava_next_video", config, processor)


def _qwen(name: str, text: dict[str, Any], vision: dict[str, Any], tied: bool = False) -> Arch:
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    # Frames of 128 to 768 tokens, as the checkpoints' processors have it.
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    model_type = "qwen2_5_vl" if name.startswith("qwen2.5") else "qwen2_vl"
    return Arch(name, model_type, config, {"size": size})


def _qwen2_5_vl(size: str, text: dict[str, Any], tied: bool = False) -> Arch:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "out_hidden_size": text["hidden_size"],
    }
    return _qwen(f"qwen2.5-vl-{size}", text, vision, tied)


def _qwen2_vl(size: str, text: dict[str, Any], tied: bool = False) -> Arch:
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_size": text["hidden_size"],
    }
    return _qwen(f"qwen2-vl-{size}", text, vision, tied)


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        _onevision("0.5b", _text(896, 4864, 24, 14, 2, 152000), tied=True),
        _onevision("7b", _text(3584, 18944, 28, 28, 4, 152064)),
        _onevision("72b", _text(8192, 29568, 80, 64, 8, 152064)),
        _next_video(),
        _qwen2_vl("2b", _text(1536, 8960, 28, 12, 2, 151936), tied=True),
        _qwen2_vl("7b", _text(3584, 18944, 28, 28, 4, 152064)),
        _qwen2_5_vl("3b", _text(2048, 11008, 36, 16, 2, 151936), tied=True),
        _qwen2_5_vl("7b", _text(3584, 18944, 28, 28, 4, 152064)),
    )
}


def arch_of(name: str) -> Arch:
    """An architecture by its name, or a ValueError that lists those there are."""
    if name not in ARCHS:
        raise ValueError(f"unknown architecture {name!r}; there are {', '.join(ARCHS)}")
    return ARCHS[name]
