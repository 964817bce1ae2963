"""Gemma 4: a time before each frame, all frames of a video of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dycoke.compat import cache_argument, cache_of
from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    rows = prompt.encoded
    if rows is None:
        patches = prompt.inputs.get("video_position_ids")
        if patches is None or prompt.pixels is None:
            return []
        # (frames of all videos, patches, 2), or, in older versions, (videos, frames, patches, 2).
        pooled = prompt.config.vision_config.pooling_kernel_size**2
        tokens = (patches != -1).all(-1).sum(-1) // pooled
        frames = prompt.inputs.get("num_frames_per_video")
        videos = tokens if frames is None else tokens.split(frames.tolist())
        rows = [int(video.sum()) for video in videos]
    # generate() drops the patch positions, so a frame's tokens are one row.
    found = prompt.cut(prompt.token_id, rows)
    return [VideoSpan(sample, frames, (1, frames.shape[1])) for sample, frames in found]


def masks(
    config: Any, given: Mapping[str, Any], inputs: Mapping[str, Any], source: Tensor
) -> dict[str, Any] | None:
    """Larger models let the tokens of a frame see each other, in layers with a window."""
    text, types = config.get_text_config(), given.get("mm_token_type_ids")
    if text.use_bidirectional_attention != "vision" or types is None:
        return None
    from transformers.models.gemma4 import modeling_gemma4 as gemma4

    frames = gemma4.get_block_sequence_ids_for_mask(types, device=source.device).gather(1, source)
    make = gemma4.create_masks_for_vision_model
    made: dict[str, Any] = make(
        config=text,
        **{k: inputs[k] for k in ("inputs_embeds", "attention_mask", "position_ids")},
        block_sequence_ids=frames,
        **{cache_argument(make): cache_of(inputs)},
    )
    return made


FAMILY = Family(
    name="Gemma 4",
    model_types=("gemma4",),
    rope="1-D",
    layout=layout,
    checkpoints=("google/gemma-4-E2B-it", "google/gemma-4-12B-it"),
    masks=masks,
    notes=("only full-attention layers are pruned; those with a window see all kept tokens",),
)
