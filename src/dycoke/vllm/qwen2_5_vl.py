"""Qwen2.5-VL in vLLM, with DyCoke's counts, masks and exact positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from dycoke.vllm.counts import asked, keep_mask, kept_count
from dycoke.vllm.places import Media, Placing, tag


class Processor(stock.Qwen2_5_VLMultiModalProcessor):
    """Writes as many placeholders for a video as tokens will stay."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        merge = self.info.get_image_processor(**hf_processor_mm_kwargs).merge_size
        token = self.info.get_hf_config().video_token_id
        method = asked()

        def placeholders(index: int) -> list[int]:
            frames, height, width = map(
                int, out_mm_kwargs["video"][index]["video_grid_thw"].data.flatten()
            )
            return [token] * kept_count(method, frames, (height // merge) * (width // merge))

        return [
            replace(update, replacement=placeholders) if update.modality == "video" else update
            for update in updates
        ]


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=stock.Qwen2_5_VLProcessingInfo,
    dummy_inputs=stock.Qwen2_5_VLDummyInputsBuilder,
)
class DyCokeQwen2_5_VL(Placing, stock.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The stock class, whose way for pruned media gets other masks and other columns."""

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        grids = image_input["image_grid_thw"].tolist()
        return tuple(
            tag(rows, self._offsets(grid, 1.0))
            for rows, grid in zip(image_embeds_split, grids, strict=True)
        )

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        method = asked()
        grids = video_input["video_grid_thw"].tolist()
        seconds = video_input.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        out = []
        for rows, grid, step in zip(video_embeds_split, grids, seconds, strict=True):
            keep = keep_mask(method, rows, grid[0])
            offsets = self._offsets(grid, step * per_second).to(keep.device)
            out.append(tag(rows[keep], offsets[keep]))
        return tuple(out)

    def _offsets(self, grid: Sequence[int], per_frame: float) -> Tensor:
        """Positions in a media of a grid of patches: (T * H * W, 3), as the stock class does."""
        merge = self.config.vision_config.spatial_merge_size
        frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
        axes = torch.meshgrid(
            torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
        )
        time = (axes[0].double() * per_frame).long()
        return torch.stack([time, axes[1], axes[2]], -1).flatten(0, 2)

    def media_of(self, tokens: list[int], feature: Any) -> Media:
        kind = feature.modality
        merge = self.config.vision_config.spatial_merge_size
        rows = int(feature.data[f"{kind}_grid_thw"].data.prod()) // merge**2
        token = self.config.video_token_id if kind == "video" else self.config.image_token_id
        return Media(feature.mm_position.offset, feature.mm_position.length, [token] * rows)
