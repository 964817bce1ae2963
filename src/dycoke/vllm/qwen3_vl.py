"""Qwen3-VL in vLLM, with DyCoke's counts, masks and exact positions.

A frame's time is text before it, so that a video's placeholder has rows of text, too, and the
features of all its rows come from the model's side. `dycoke.vllm.plugin` has the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as stock

from dycoke.vllm.counts import asked, keep_mask
from dycoke.vllm.places import Media, Placing, columns, tag


class DyCokeQwen3VL(Placing, stock.Qwen3VLForConditionalGeneration):
    """The stock class, whose way for pruned media gets other masks and columns."""

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        merge = self.visual.spatial_merge_size
        out = []
        for rows, grid in zip(
            image_embeds_split, image_input["image_grid_thw"].tolist(), strict=True
        ):
            places = torch.cartesian_prod(
                torch.arange(1), torch.arange(grid[1] // merge), torch.arange(grid[2] // merge)
            )
            out.append(tag(rows, places))
        return tuple(out)

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        method, out = asked(), []
        grids = video_input["video_grid_thw"].tolist()
        for rows, grid, times in zip(
            video_embeds_split, grids, video_input["timestamps"], strict=True
        ):
            # Features of deepstack's levels stand behind the encoder's own, which alone are judged.
            keep = keep_mask(method, rows[:, : self.visual_dim], grid[0])
            out.append(
                self._create_final_video_embeddings(
                    video_embeddings=rows[keep],
                    num_tokens_per_frame=keep.view(grid[0], -1).sum(1).tolist(),
                    timestamps=times,
                    video_grid_thw=grid,
                    retention_mask=keep,
                )
            )
        return tuple(out)

    def _get_expanded_positions(self, *args: Any, **kwargs: Any) -> Tensor:
        # Three axes, then whether a row starts a frame's visual tokens: all before the first of
        # them, and it itself, stand before the first placeholder token.
        known = super()._get_expanded_positions(*args, **kwargs)
        starts = known[:, 3].nonzero().flatten()
        return columns(known[:, :3], lead=int(starts[0]) + 1)

    def media_of(self, tokens: list[int], feature: Any) -> Media:
        place, config = feature.mm_position, self.config
        ids = tokens[place.offset : place.offset + place.length]
        if feature.modality != "video":
            return Media(place.offset, place.length, ids)
        _, height, width = feature.data["video_grid_thw"].data.flatten().tolist()
        rows = height * width // config.vision_config.spatial_merge_size**2
        whole: list[int] = []
        for token in ids:
            if token == config.video_token_id:
                continue
            whole.append(token)
            if token == config.vision_start_token_id:
                whole += [config.video_token_id] * rows
        return Media(place.offset, place.length, whole)
