"""LLaVA-OneVision and LLaVA-NeXT-Video in vLLM, with original positions.

vLLM numbers the positions of a model with plain RoPE through. Declared to have three axes
(`dycoke.vllm.plugin.three_axes`) it takes the positions that the model says, the same on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_next_video as next_video
from vllm.model_executor.models import llava_onevision as onevision
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import VideoProcessorItems

from dycoke.vllm.counts import asked, keep_mask, kept_count
from dycoke.vllm.places import Media, Placing, tag

ROPE_FACTOR = 4
"""How many times ``max_position_embeddings`` vLLM's table of rotations for three axes is long."""

FRAMES = "dycoke_frames"
"""Name of the field that has a video's number of frames."""


class _Counting:
    """How many tokens of a video stay, where vLLM asks how many it has."""

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        size = {"image_width": image_width, "image_height": image_height}
        tokens = self._get_num_frame_tokens(**size)  # type: ignore[attr-defined]
        whole = super().get_num_video_tokens(num_frames=num_frames, **size)  # type: ignore[misc]
        newline: int = whole - num_frames * tokens
        return kept_count(asked(), num_frames, tokens) + newline


class _Checking:
    """Refuses a video whose positions, which stay, are beyond the model's table, and notes how
    many frames each has: vLLM drops the pixels of one that its prefix cache holds."""

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        inputs: Any = super()._apply_hf_processor_main(*args, **kwargs)  # type: ignore[misc]
        if "pixel_values_videos" in inputs:
            counts = [len(video) for video in inputs["pixel_values_videos"]]
            inputs[FRAMES] = torch.tensor(counts)
        return inputs

    def _get_mm_fields_config(self, hf_inputs: Any, kwargs: Mapping[str, object]) -> Any:
        known: Any = super()._get_mm_fields_config(hf_inputs, kwargs)  # type: ignore[misc]
        return {**known, FRAMES: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        info: Any = self.info  # type: ignore[attr-defined]
        limit = ROPE_FACTOR * info.get_hf_config().get_text_config().max_position_embeddings
        if "video" in mm_items:
            videos = mm_items.get_items("video", VideoProcessorItems)
            for index in range(videos.get_count()):
                size, frames = videos.get_frame_size(index), videos.get_num_frames(index)
                tokens = info._get_num_frame_tokens(
                    image_width=size.width, image_height=size.height
                )
                if frames * tokens >= limit:
                    raise ValueError(
                        f"{frames} frames of {tokens} tokens reach beyond {limit} positions, "
                        "which is where this model's end; send fewer frames"
                    )
        rest = (mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        updates: Sequence[Any] = super()._get_prompt_updates(*rest)  # type: ignore[misc]
        return updates


class _Pruning(Placing):
    """The stock classes' videos lose tokens, and their rows say where they stand."""

    config: Any

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        method, tokens = asked(), self._per_frame()
        videos = super()._process_video_pixels(inputs)  # type: ignore[misc]
        out = []
        for rows, pixels in zip(videos, inputs["pixel_values_videos"], strict=True):
            rows = rows.reshape(-1, rows.shape[-1])
            visual = len(pixels) * tokens
            keep = keep_mask(method, rows[:visual], len(pixels))
            keep = torch.cat([keep, keep.new_ones(len(rows) - visual)])  # a newline stays
            out.append(tag(rows[keep], keep.nonzero().expand(-1, 3)))
        return out

    def _per_frame(self) -> int:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        stride = getattr(self.config, "spatial_pool_stride", 2)
        return int((-(-side // stride)) ** 2)

    def media_ids(self) -> tuple[int, ...]:
        return self.config.image_token_index, self.config.video_token_index

    def media_of(self, tokens: list[int], feature: Any) -> Media:
        place = feature.mm_position
        rows = place.length
        if feature.modality == "video":
            frames, each = int(feature.data[FRAMES].data), self._per_frame()
            rows += frames * each - kept_count(asked(), frames, each)
        return Media(place.offset, place.length, [0] * rows)

    def whole_rule(self, tokens: list[int], features: list[Any]) -> Tensor:
        return torch.arange(len(tokens)).expand(3, -1)


class _OnevisionInfo(_Counting, onevision.LlavaOnevisionProcessingInfo):
    pass


class _OnevisionProcessor(_Checking, onevision.LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _OnevisionProcessor,
    info=_OnevisionInfo,
    dummy_inputs=onevision.LlavaOnevisionDummyInputsBuilder,
)
class DyCokeLlavaOnevision(
    _Pruning,
    onevision.LlavaOnevisionForConditionalGeneration,
    SupportsMRoPE,  # protocols come last: their __init__ takes nothing
    SupportsMultiModalPruning,
):
    """LLaVA-OneVision, whose images have columns, too."""

    def _process_image_input(self, image_input: Any) -> list[Tensor]:
        return [
            tag(rows, torch.arange(len(rows))[:, None].expand(-1, 3))
            for rows in super()._process_image_input(image_input)
        ]


class _NextVideoInfo(_Counting, next_video.LlavaNextVideoProcessingInfo):
    pass


class _NextVideoProcessor(_Checking, next_video.LlavaNextVideoMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _NextVideoProcessor,
    info=_NextVideoInfo,
    dummy_inputs=next_video.LlavaNextVideoDummyInputsBuilder,
)
class DyCokeLlavaNextVideo(
    _Pruning,
    next_video.LlavaNextVideoForConditionalGeneration,
    SupportsMRoPE,
    SupportsMultiModalPruning,
):
    """LLaVA-NeXT-Video, to which vLLM gives videos alone."""
