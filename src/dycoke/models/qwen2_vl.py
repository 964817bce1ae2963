"""Qwen2-VL and Qwen2.5-VL: a video is one run of placeholders; two frames make one slice."""

from __future__ import annotations

from torch import Tensor

from dycoke.errors import UnsupportedError
from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
ROPE = "3-D"


def layout(prompt: Prompt) -> list[VideoSpan]:
    merge = prompt.config.vision_config.spatial_merge_size
    grids = prompt.inputs.get("video_grid_thw")
    rows = prompt.encoded
    if rows is None:
        if grids is None or prompt.inputs.get("pixel_values_videos") is None:
            return []
        rows = (grids.prod(-1) // merge**2).tolist()
    videos = prompt.split(prompt.config.video_token_id, rows)
    if grids is not None:
        shapes = [(height // merge, width // merge) for _, height, width in grids.tolist()]
    else:
        shapes = [_grid(prompt.position_ids, sample, places) for sample, places in videos]
    return [
        VideoSpan(sample, prompt.frames(places, shape[0] * shape[1]), shape)
        for (sample, places), shape in zip(videos, shapes, strict=True)
    ]


def _grid(position_ids: Tensor | None, sample: int, places: Tensor) -> tuple[int, int]:
    """Rows and columns of a frame, from the height and width positions of its video.

    `generate` of transformers 5.18 and newer drops the grid once it has encoded the video. The
    temporal positions cannot stand in for it: slow sampling gives several slices the same value.
    """
    if position_ids is None or position_ids.ndim != 3 or position_ids.shape[0] < 3:
        raise UnsupportedError(
            "the video's grid is neither in video_grid_thw nor in 3-D position_ids; pass the "
            "processor's whole output to generate()"
        )
    height, width = position_ids[-2:, sample, places]
    return int(height.max() - height.min()) + 1, int(width.max() - width.min()) + 1
