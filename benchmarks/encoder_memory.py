"""What vision encoders hold per frame, against the formula that "auto" chunks rely on.

Every family's encoder at true width, ``--layers`` deep, random weights, on the CPU. Counted is the
peak of the bytes of live tensors that the encoder makes, for 1 and for 3 frames (or slices); half
of the difference is a frame's. One JSON line comes last.

    python benchmarks/encoder_memory.py
    python benchmarks/encoder_memory.py --families smolvlm --dtypes float32 --layers 1

What came of it: the first formula, 6 hidden + 3 MLP width, lay below what is counted for Qwen2-VL,
Qwen2.5-VL, Qwen3-VL and VideoLLaMA3 in bfloat16 (0.99, 0.77, 0.85 and 0.94 of it), which rotate q
and k in float32; hence 12 hidden.
"""

from __future__ import annotations

import argparse
import inspect
import json
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dycoke.vision.memory import frame_bytes

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
GRID, SQUARE = (20, 30), 24  # patches of a packed frame; of Gemma 4's, a side


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that were alive at once, ``known`` ones left out."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place and place not in self.seen:
            self.seen.add(place)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.live -= size
        self.seen.discard(place)


def vision(hidden: int, inner: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
            "num_hidden_layers": layers, "patch_size": 14, **more}  # fmt: skip


def stacked(frames: int) -> dict[str, Any]:
    return {"pixel_values_videos": torch.rand(1, frames, 3, 384, 384)}


def packed(frames: int, row: int = 3 * 2 * 14 * 14) -> dict[str, Any]:
    pixels = torch.rand(frames * GRID[0] * GRID[1], row)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, *GRID]])}


def llama(frames: int) -> dict[str, Any]:
    return {**packed(frames, 3 * 14 * 14), "video_merge_sizes": torch.tensor([2])}


def gemma(frames: int) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.arange(SQUARE), torch.arange(SQUARE)).flip(-1)
    return {
        "pixel_values_videos": torch.rand(frames, SQUARE**2, 3 * 16 * 16),
        "video_position_ids": places.repeat(frames, 1, 1),
        "num_frames_per_video": torch.tensor([frames]),
    }


def fused(name: str, **sizes: Any) -> Callable[[int], Any]:
    """A family that fuses two frames, and takes packed patches."""
    more = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    text = {**TEXT, "rope_parameters": ROPE, "head_dim": 16}

    def build(layers: int) -> Any:
        # Those named in the settings of a family are counted from the last.
        own = {k: [layers + i for i in v if layers + i >= 0] if k in NAMED else v
               for k, v in sizes.items()}  # fmt: skip
        config = getattr(t, f"{name}Config")(
            text_config=text, vision_config={"out_hidden_size": 64, "depth": layers, **more, **own}
        )
        return getattr(t, f"{name}ForConditionalGeneration")(config)

    return build


def llava_onevision(layers: int) -> Any:
    tower = t.SiglipVisionConfig(
        **vision(1152, 4304, 16, layers, image_size=384), vision_use_head=False
    )
    config = t.LlavaOnevisionConfig(text_config=t.Qwen2Config(**TEXT), vision_config=tower)
    return t.LlavaOnevisionForConditionalGeneration(config)


def internvl(layers: int) -> Any:
    tower = vision(1024, 4096, 16, layers, image_size=448)
    config = t.InternVLConfig(text_config=t.Qwen2Config(**TEXT), vision_config=tower)
    return t.InternVLForConditionalGeneration(config)


def smolvlm(layers: int) -> Any:
    tower = vision(768, 3072, 12, layers, image_size=512) | {"patch_size": 16}
    text = t.LlamaConfig(**TEXT)
    config = t.SmolVLMConfig(text_config=text, vision_config=tower, scale_factor=4)
    return t.SmolVLMForConditionalGeneration(config)


def video_llama_3(layers: int) -> Any:
    text, tower = t.Qwen2Config(**TEXT), vision(1152, 4304, 16, layers)
    config = t.VideoLlama3Config(text_config=text, vision_config=tower)
    return t.VideoLlama3ForConditionalGeneration(config)


def gemma4(layers: int) -> Any:
    tower = vision(
        768, 3072, 12, layers, num_key_value_heads=12, head_dim=64, pooling_kernel_size=3
    )
    own = {"layer_types": ["full_attention"], "head_dim": 16, "global_head_dim": 16,
           "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}  # fmt: skip
    tower |= {"patch_size": 16, "position_embedding_size": 128}
    config = t.Gemma4Config(text_config={**TEXT, **own}, vision_config=tower)
    return t.Gemma4ForConditionalGeneration(config)


QWEN2_5 = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN3 = {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
GLM = {"hidden_size": 1536, "intermediate_size": 13696, "num_heads": 12, "image_size": 336}
QWEN2 = {"embed_dim": 1280, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 16}
PACKED = GRID[0] * GRID[1]
NAMED = ("fullatt_block_indexes", "deepstack_visual_indexes")  # lists of layers
# Model, inputs of so many frames, patches per frame.
FAMILIES: dict[str, tuple[Callable[[int], Any], Callable[[int], dict[str, Any]], int]] = {
    "llava_onevision": (llava_onevision, stacked, 27**2),
    "qwen2_vl": (fused("Qwen2VL", **QWEN2), packed, PACKED),
    "qwen2_5_vl": (fused("Qwen2_5_VL", **QWEN2_5, fullatt_block_indexes=[-1]), packed, PACKED),
    "qwen3_vl": (fused("Qwen3VL", **QWEN3, deepstack_visual_indexes=[-3, -2]), packed, PACKED),
    "glm4v": (fused("Glm4v", **GLM), packed, PACKED),
    "internvl": (internvl, lambda n: {"pixel_values": torch.rand(n, 3, 448, 448)}, 32**2),
    "smolvlm": (smolvlm, lambda n: {"pixel_values": torch.rand(1, n, 3, 512, 512)}, 32**2),
    "video_llama_3": (video_llama_3, llama, PACKED),
    "gemma4": (gemma4, gemma, SQUARE**2),
}


def peak(model: Any, inputs: dict[str, Any]) -> int:
    name = "get_image_features" if "pixel_values" in inputs else "get_video_features"
    encode = getattr(model.base_model, name)
    if "pixel_values" in inspect.signature(encode).parameters:  # also videos' older name
        inputs = {k.removesuffix("_videos"): v for k, v in inputs.items()}
    with torch.no_grad(), Peak([*model.parameters(), *model.buffers(), *inputs.values()]) as bytes_:
        encode(**inputs, return_dict=True)
    most: int = bytes_.peak
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4, help="how deep the encoders are")
    args = parser.parse_args()
    lines = []
    for name in args.families:
        build, inputs, patches = FAMILIES[name]
        for dtype in (getattr(torch, name) for name in args.dtypes):
            model = build(args.layers).to(dtype).eval()
            counted = (peak(model, inputs(3)) - peak(model, inputs(1))) / 2
            formula = frame_bytes(model.config, patches, dtype.itemsize)
            assert formula is not None
            line = {"family": name, "dtype": str(dtype), "patches": patches}
            line |= {"counted_mib": round(counted / 2**20, 1)}
            line |= {"formula_mib": round(formula / 2**20, 1), "ratio": round(formula / counted, 2)}
            lines.append(line)
            print(line, flush=True)
    versions = {"torch": torch.__version__, "transformers": t.__version__}
    print(json.dumps({**versions, "lines": lines}))


if __name__ == "__main__":
    main()
