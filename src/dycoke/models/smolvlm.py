"""SmolVLM2: a video's frames are images, each behind a time and a marker."""

from __future__ import annotations

from dycoke.models import Prompt, VideoSpan

MODEL_TYPES = ("smolvlm",)
ROPE = "1-D"
FRAMES = ("images",)
VISION = "vision_model.encoder.layers.*.self_attn"
NAME = "SmolVLM2"
NOTES = ("its processor needs the package num2words",)
CHECKPOINTS = ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct")


def layout(prompt: Prompt) -> list[VideoSpan]:
    vision = prompt.config.vision_config
    side = vision.image_size // vision.patch_size // prompt.config.scale_factor
    # The encoder gives one block of rows per sample, however many images it holds.
    counts = (prompt.input_ids == prompt.token_id).sum(1).tolist()
    return [
        VideoSpan(sample, prompt.frames(places, side * side), (side, side))
        for sample, places in prompt.split(prompt.token_id, [n for n in counts if n])
    ]
