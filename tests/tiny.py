"""Tiny random models in the real classes, and inputs for them, one row per family."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Model,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

IMAGE, VIDEO, VISION_START, VISION_END, EOS = 90, 91, 92, 93, 94
VIDEO_START, VIDEO_END, AUDIO = 89, 95, 95
VOCABULARY = 96

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Sharp attention, so that near-ties between visual tokens are rare.
    "initializer_range": 0.3,
}


def llava_onevision(attention: str = "sdpa", layers: int = 5, seed: int = 0, **text: Any) -> Any:
    """A side of 6 patches, pooled 2 x 2: 9 tokens per frame. ``text`` overrides the decoder's."""
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**{**TEXT, "num_hidden_layers": layers, **text}),
        vision_config=SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=4,
            vision_use_head=False,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[24, 24]],
    )
    return _build(LlavaOnevisionForConditionalGeneration, config, attention, seed)


def llava_next_video(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """A side of 6 patches and a class token, pooled 2 x 2: 9 tokens per frame."""
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": layers}),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=4,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[24, 24]],
    )
    return _build(LlavaNextVideoForConditionalGeneration, config, attention, seed)


def qwen2_vl(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    config = Qwen2VLConfig(
        text_config=_qwen_text(layers),
        vision_config={
            "depth": 2,
            "embed_dim": 24,
            "hidden_size": TEXT["hidden_size"],
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.3,
        },
        **QWEN_TOKENS,
    )
    return _build(Qwen2VLForConditionalGeneration, config, attention, seed)


def _qwen_text(layers: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return {**TEXT, "num_hidden_layers": layers, "rope_parameters": rope}


QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "pad_token_id": 0,
}


def qwen2_5_vl(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(layers),
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": TEXT["hidden_size"],
            "tokens_per_second": 2,
            "initializer_range": 0.3,
        },
        **QWEN_TOKENS,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, attention, seed)


GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


def glm4v(
    attention: str = "sdpa",
    layers: int = 5,
    seed: int = 0,
    config: Any = Glm4vConfig,
    model: Any = Glm4vForConditionalGeneration,
    **text: Any,
) -> Any:
    # Norms behind both sublayers magnify rounding.
    calm = {"initializer_range": 0.2}
    rope = {**_qwen_text(layers)["rope_parameters"], "partial_rotary_factor": 1.0}
    built = config(
        text_config={**TEXT, "num_hidden_layers": layers, "rope_parameters": rope, **text, **calm},
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "initializer_range": 0.3,
        },
        **GLM_TOKENS,
    )
    return _build(model, built, attention, seed)


glm46v = functools.partial(glm4v, config=Glm46VConfig, model=Glm46VForConditionalGeneration)
glm4v_moe = functools.partial(
    glm4v,
    config=Glm4vMoeConfig,
    model=Glm4vMoeForConditionalGeneration,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
)


def internvl(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """A side of 6 patches and a class token, shuffled 2 x 2: 9 tokens per frame."""
    config = InternVLConfig(
        text_config=Qwen2Config(**{**TEXT, "num_hidden_layers": layers}),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    return _build(InternVLForConditionalGeneration, config, attention, seed)


def smolvlm(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """A side of 6 patches, shuffled 2 x 2: 9 tokens per frame."""
    config = SmolVLMConfig(
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": layers}),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return _build(SmolVLMForConditionalGeneration, config, attention, seed)


def video_llama_3(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    config = VideoLlama3Config(
        text_config=Qwen2Config(**{**TEXT, "num_hidden_layers": layers}),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return _build(VideoLlama3ForConditionalGeneration, config, attention, seed)


QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": TEXT["hidden_size"],
    "initializer_range": 0.3,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def qwen3_vl(attention: str = "sdpa", layers: int = 5, seed: int = 0, moe: bool = False) -> Any:
    """Deepstack features of both vision layers go into the first two decoder layers."""
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    text = {**_qwen_text(layers), "head_dim": 8}
    if moe:
        config = Qwen3VLMoeConfig(
            text_config={**text, **EXPERTS}, vision_config=vision, **QWEN_TOKENS
        )
        return _build(Qwen3VLMoeForConditionalGeneration, config, attention, seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return _build(Qwen3VLForConditionalGeneration, config, attention, seed)


def qwen3_5(attention: str = "sdpa", layers: int = 5, seed: int = 0, moe: bool = False) -> Any:
    """Full attention in layers 1, 3 and 4, linear attention in the others."""
    text: dict[str, Any] = {
        **_qwen_text(layers),
        "head_dim": 16,
        "layer_types": [
            "full_attention" if i % 2 or i == 4 else "linear_attention" for i in range(layers)
        ],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    if moe:
        config = Qwen3_5MoeConfig(
            text_config={**text, **EXPERTS}, vision_config=QWEN3_VISION, **QWEN_TOKENS
        )
        return _build(Qwen3_5MoeForConditionalGeneration, config, attention, seed)
    config = Qwen3_5Config(text_config=text, vision_config=QWEN3_VISION, **QWEN_TOKENS)
    return _build(Qwen3_5ForConditionalGeneration, config, attention, seed)


def gemma4(attention: str = "sdpa", layers: int = 5, seed: int = 0, **text: Any) -> Any:
    """A window of 16 in layers 0 and 2. ``text`` overrides settings of the decoder."""
    config = Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": layers,
            "layer_types": [
                "full_attention" if i % 2 or i == 4 else "sliding_attention" for i in range(layers)
            ],
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 6,
            **text,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )
    return _build(Gemma4ForConditionalGeneration, config, attention, seed)


def _build(cls: Any, config: Any, attention: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the grouped kernels take no float64
    model = cls(config).eval()
    # Biases start at zero, and would hide an error in their use.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            if name.endswith("A_log"):  # linear attention that forgets slowly
                parameter.fill_(-2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def _text(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(1, 89, (count,), generator=generator).tolist()


def slow_noise(generator: torch.Generator, frames: int, *shape: int) -> torch.Tensor:
    """Frames that change a little from one to the next: (frames, *shape)."""
    steps = torch.randn(frames, *shape, generator=generator)
    steps[1:] *= 0.6 * torch.rand(shape, generator=generator)
    return steps.cumsum(0)


def llava_inputs(
    videos: Sequence[Sequence[int]],
    text: Sequence[tuple[int, int]],
    seed: int = 0,
    newline: int = 1,
) -> dict[str, Any]:
    """Inputs for the LLaVA families.

    videos: per sample, the frame counts of its videos (all equal: stock takes one tensor).
    text: per sample, tokens before and after the videos.
    newline: placeholders after a video.
    """
    g = torch.Generator().manual_seed(seed + 1)
    rows, pixels = [], []
    for counts, (before, after) in zip(videos, text, strict=True):
        row = _text(g, before)
        for frames in counts:
            row += [VIDEO] * (frames * 9 + newline)
            pixels.append(slow_noise(g, frames, 3, 24, 24))
        rows.append(row + _text(g, after))
    ids, mask = _pad(rows)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.stack(pixels),
    }


def qwen_inputs(
    videos: Sequence[Sequence[int]],
    text: Sequence[tuple[int, int]],
    seed: int = 0,
    timestamps: bool = False,
) -> dict[str, Any]:
    """Inputs for the Qwen families; frame counts are temporal slices, 2 x 3 tokens each.

    timestamps: whether each slice stands by itself, after some tokens that tell its time.
    """
    g = torch.Generator().manual_seed(seed + 1)
    height, width = 4, 6
    rows, pixels, grids = [], [], []
    for counts, (before, after) in zip(videos, text, strict=True):
        row = _text(g, before)
        for slices in counts:
            for run in [1] * slices if timestamps else [slices]:
                row += _text(g, 2) if timestamps else []
                row += [VISION_START] + [VIDEO] * (run * 6) + [VISION_END]
            patches = slow_noise(g, slices, height * width, 3 * 2 * 4 * 4)
            pixels.append(patches.flatten(0, 1))
            grids.append([slices, height, width])
        rows.append(row + _text(g, after))
    ids, mask = _pad(rows)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.cat(pixels),
        "video_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }


def _framed(
    videos: Sequence[Sequence[int]],
    text: Sequence[tuple[int, int]],
    seed: int,
    frame: Sequence[int],
    shape: tuple[int, ...],
    ends: Sequence[int] = (),
) -> tuple[dict[str, Any], list[list[torch.Tensor]]]:
    """Prompts that write a time behind each frame, and per sample the pixels of its videos.

    frame: its markers and placeholders; shape: of its pixels; ends: markers around a video.
    """
    g = torch.Generator().manual_seed(seed + 1)
    rows: list[list[int]] = []
    clips: list[list[torch.Tensor]] = []
    for counts, (before, after) in zip(videos, text, strict=True):
        row = _text(g, before)
        for frames in counts:
            row += [*ends[:1], *(t for _ in range(frames) for t in (*frame, *_text(g, 1)))]
            row += ends[1:]
        rows.append(row + _text(g, after))
        clips.append([slow_noise(g, frames, *shape) for frames in counts])
    ids, mask = _pad(rows)
    return {"input_ids": ids, "attention_mask": mask}, clips


def _packed(videos: Sequence[Sequence[int]], clips: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Patches of all videos one after the other, 4 x 6 in each frame."""
    grids = [[frames, 4, 6] for counts in videos for frames in counts]
    patches = [clip.flatten(0, 1) for sample in clips for clip in sample]
    return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}


def glm_inputs(videos: Any, text: Any, seed: int = 0) -> dict[str, Any]:
    """Inputs for the GLM families: 2 x 3 tokens per frame, with the placeholder of images."""
    frame = [VISION_START, *[IMAGE] * 6, VISION_END]
    inputs, clips = _framed(videos, text, seed, frame, (24, 96), (VIDEO_START, VIDEO_END))
    types = {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long() * 2}
    return {**inputs, **_packed(videos, clips), **types}


def video_llama_3_inputs(videos: Any, text: Any, seed: int = 0) -> dict[str, Any]:
    """Inputs for VideoLLaMA3 without its own compression: 2 x 3 tokens per frame."""
    inputs, clips = _framed(videos, text, seed, [VIDEO] * 6, (24, 48))
    mask = torch.ones(sum(map(sum, videos)) * 6, dtype=torch.bool)
    merge = torch.full((sum(map(len, videos)),), 2)
    own = {"video_merge_sizes": merge, "video_compression_mask": mask}
    return {**inputs, **_packed(videos, clips), **own}


def image_inputs(videos: Any, text: Any, seed: int = 0, padded: bool = False) -> dict[str, Any]:
    """Inputs for families whose frames are images: 9 tokens each.

    padded: one row of images per sample, filled up with black ones; else all in one row.
    """
    frame = [VISION_START, *[IMAGE] * 9, VISION_END]
    inputs, clips = _framed(videos, text, seed, frame, (3, 24, 24))
    images = [torch.cat([torch.zeros(0, 3, 24, 24), *sample]) for sample in clips]
    if padded:
        pixels = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    else:
        pixels = torch.cat(images)
    return {**inputs, "pixel_values": pixels}


padded_image_inputs = functools.partial(image_inputs, padded=True)

# Frames of all videos in one tensor; before that, (videos, frames, ...).
GEMMA4_PACKS = (
    "num_frames_per_video" in inspect.signature(Gemma4Model.get_video_features).parameters
)


def gemma4_inputs(
    videos: Sequence[Sequence[int]], text: Sequence[tuple[int, int]], seed: int = 0
) -> dict[str, Any]:
    """Inputs for Gemma 4: frames of 4 x 6 patches, pooled 2 x 2."""
    inputs = qwen_inputs(videos, text, seed, timestamps=True)
    slices = inputs.pop("video_grid_thw")[:, 0]
    pixels = inputs["pixel_values_videos"].view(-1, 24, 3 * 2 * 4 * 4)[..., :48]
    y, x = torch.arange(4), torch.arange(6)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, 24, 2)
    inputs["pixel_values_videos"] = pixels
    inputs["video_position_ids"] = places.repeat(len(pixels), 1, 1)
    if GEMMA4_PACKS:
        return {**inputs, "num_frames_per_video": slices}
    for name in ("pixel_values_videos", "video_position_ids"):
        inputs[name] = inputs[name].unflatten(0, (len(slices), -1))
    return inputs


stamped = functools.partial(qwen_inputs, timestamps=True)


# Releases in which generate does not encode the video before the first forward.
OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)


@dataclass(frozen=True)
class Family:
    """A row of the table: how to build a tiny model of the family and inputs for it."""

    name: str
    model: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    tokens_per_frame: int
    rope: str
    unequal_videos: bool  # whether one batch may hold videos of different length
    full: tuple[int, ...] = (0, 1, 2, 3, 4)  # the full-attention layers of 5
    token: int = VIDEO  # the placeholder of a video's tokens
    images: bool = False  # whether frames are images, which a user has to declare

    @property
    def repeats(self) -> bool:
        """Whether stock generate hands a video on to beams and further answers as it is."""
        return not self.name.startswith("internvl" if OLDER else "glm")

    def frame_source(self, videos: Sequence[Sequence[int]]) -> Any:
        """What a user has to say about the frames of these videos (counts per sample)."""
        if not self.images:
            return None
        return max(videos, key=len) if any(len(v) > 1 for v in videos) else "images"

    def follow_up(self, ids: torch.Tensor) -> dict[str, Any]:
        """Inputs for a new turn, whole ids with what was generated."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.rope == "3-D":
            inputs["mm_token_type_ids"] = (ids == self.token).long() * 2
        return inputs


FAMILIES = {
    f.name: f
    for f in (
        Family("llava_onevision", llava_onevision, llava_inputs, 9, "1-D", False),
        Family(
            "llava_next_video",
            llava_next_video,
            functools.partial(llava_inputs, newline=0),
            9,
            "1-D",
            False,
        ),
        Family("qwen2_vl", qwen2_vl, qwen_inputs, 6, "3-D", True),
        Family("qwen2_5_vl", qwen2_5_vl, qwen_inputs, 6, "3-D", True),
        Family("glm4v", glm4v, glm_inputs, 6, "3-D", True, token=IMAGE),
        Family("glm46v", glm46v, glm_inputs, 6, "3-D", True, token=IMAGE),
        Family("glm4v_moe", glm4v_moe, glm_inputs, 6, "3-D", True, token=IMAGE),
        Family("internvl", internvl, image_inputs, 9, "1-D", True, token=IMAGE, images=True),
        Family("smolvlm", smolvlm, padded_image_inputs, 9, "1-D", True, token=IMAGE, images=True),
        Family("video_llama_3", video_llama_3, video_llama_3_inputs, 6, "1-D", True),
        *(
            Family(name, functools.partial(model, moe="moe" in name), stamped, 6, "3-D", True, full)
            for name, model, full in (
                ("qwen3_vl", qwen3_vl, (0, 1, 2, 3, 4)),
                ("qwen3_vl_moe", qwen3_vl, (0, 1, 2, 3, 4)),
                ("qwen3_5", qwen3_5, (1, 3, 4)),
                ("qwen3_5_moe", qwen3_5, (1, 3, 4)),
            )
        ),
        Family("gemma4", gemma4, gemma4_inputs, 6, "1-D", GEMMA4_PACKS, (1, 3, 4)),
    )
}
