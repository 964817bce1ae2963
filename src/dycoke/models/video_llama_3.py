"""VideoLLaMA3: "Time 1.0s:" before each frame; its own token compression has to be off."""

from __future__ import annotations

from dycoke.errors import UnsupportedError
from dycoke.models.base import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    mask = prompt.inputs.get("video_compression_mask")
    if mask is not None and not mask.all():
        raise UnsupportedError(
            "VideoLLaMA3's processor dropped tokens itself, and its frames do not match any more; "
            "call it with use_token_compression=False"
        )
    rows = prompt.encoded
    if rows is None:
        merge = prompt.inputs.get("video_merge_sizes")
        if prompt.grids is None or merge is None:
            return []
        rows = (prompt.grids.prod(-1) // merge**2).tolist()
    return [
        VideoSpan(sample, frames, (1, frames.shape[1]))
        for sample, frames in prompt.cut(prompt.token_id, rows)
    ]


FAMILY = Family(
    name="VideoLLaMA3",
    model_types=("video_llama_3",),
    rope="1-D",
    layout=layout,
    checkpoints=("lkhl/VideoLLaMA3-2B-Image-HF",),
    vision_attention="vision_model.encoder.layers.*.self_attn",
    processor_options={"use_token_compression": False},
    notes=("its own token compression must be off: use_token_compression=False",),
)
