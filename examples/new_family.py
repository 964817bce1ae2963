"""Add a model family: say where the tokens of each video stand in its prompts.

Here Video-LLaVA, which dycoke does not know, as a tiny random model: runs in seconds, without
network. A real family would be `FAMILY` and `layout` in a file of `src/dycoke/models/`, where they
are found by themselves; CONTRIBUTING.md says what its tests need.
"""

import torch
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from dycoke import DyCoke
from dycoke.models import Family, Prompt, VideoSpan


def layout(prompt: Prompt) -> list[VideoSpan]:
    """A prompt has one video: a run of placeholders, per frame a class token and a square."""
    if prompt.kind == "image":
        return []  # images are not frames of a video here
    side = prompt.config.vision_config.image_size // prompt.config.vision_config.patch_size
    rows = (prompt.input_ids == prompt.token_id).sum(1).tolist()
    # `cut` knows how many frames the vision encoder got. The class tokens stay, as text does.
    frames = prompt.cut(prompt.token_id, rows)
    return [VideoSpan(sample, places[:, 1:], (side, side)) for sample, places in frames]


FAMILY = Family(
    name="Video-LLaVA",
    model_types=("video_llava",),
    rope="1-D",
    layout=layout,
    checkpoints=("LanguageBind/Video-LLaVA-7B-hf",),
    vision_attention="video_tower.encoder.layers.*.self_attn",
)

if __name__ == "__main__":
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"model_type": "llama", "num_hidden_layers": 5, "vocab_size": 100, **tiny}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **tiny}
    config = VideoLlavaConfig(
        text_config=text,
        vision_config={**vision, "num_hidden_layers": 2},
        image_token_index=98,
        video_token_index=99,
    )
    model = VideoLlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, *[99] * (8 * 17), 7, 8]])  # 8 frames of a class token and 4 x 4
    pixels = torch.rand(1, 8, 3, 32, 32)

    with DyCoke()(model, layout=FAMILY.layout) as run:
        model.generate(input_ids=ids, pixel_values_videos=pixels, max_new_tokens=4)

    print(run.report)
    assert run.report is not None and run.report.engaged
    assert (run.report.samples[0].frames, run.report.samples[0].visual_tokens) == (8, 8 * 16)
