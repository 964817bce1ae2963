"""SmolVLM2: a video's frames are images, each behind a time and a marker."""

from __future__ import annotations

from dycoke.models.base import Family, Prompt, VideoSpan, square


def layout(prompt: Prompt) -> list[VideoSpan]:
    # The encoder gives one block of rows per sample, however many images it holds, or, in older
    # versions, one per image.
    rows = (prompt.input_ids == prompt.token_id).sum(1).tolist()
    if prompt.encoded is not None and sum(prompt.encoded) != sum(rows):
        rows = list(prompt.encoded)  # which `cut` refuses
    return [
        VideoSpan(sample, images, square(images.shape[1]))
        for sample, images in prompt.cut(prompt.token_id, rows)
    ]


FAMILY = Family(
    name="SmolVLM2",
    model_types=("smolvlm",),
    rope="1-D",
    layout=layout,
    checkpoints=(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    ),
    frame_sources=("images",),
    vision_attention="vision_model.encoder.layers.*.self_attn",
    token_side=lambda config, side: side // config.scale_factor,
    notes=("its processor needs the package num2words",),
)
