"""Prefill and time per token of the language model, full against compressed, on true shapes.

LLaVA-OneVision's shapes with random weights built in bfloat16; real frames; each repeat runs full
and compressed in turn, in one process, after a warm-up. The video is encoded once, and its features
are handed to every run, so what is timed is the language model. One JSON line comes last.

    python benchmarks/llm_speed.py --video clip.mp4
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
import transformers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke import DyCoke
from dycoke.costs import PAPER_SHAPES
from dycoke.timing import Stopwatch
from dycoke.video import read

# Heads, key-value heads, and whether embeddings are tied, of Qwen2 in these sizes.
HEADS = {"0.5B": (14, 2, True), "7B": (28, 4, False)}
VIDEO_TOKEN = 151647


def build(size: str, device: str) -> Any:
    """LLaVA-OneVision with random bfloat16 weights, made straight on the device."""
    shape, (heads, kv_heads, tied) = PAPER_SHAPES[size], HEADS[size]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(
            vocab_size=152000,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
        ),
        # SigLIP so400m at 384 pixels, its last layer cut off as in the checkpoints.
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        video_token_index=VIDEO_TOKEN,
        image_token_index=151646,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaOnevisionForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", required=True)
    parser.add_argument("--size", choices=HEADS, default="0.5B")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    video = read(args.video, args.frames)
    pixels = LlavaOnevisionVideoProcessor(size={"height": 384, "width": 384})(
        [video.frames], return_tensors="pt"
    )["pixel_values_videos"]
    model = build(args.size, args.device)
    with torch.inference_mode():
        features = model.model.get_video_features(
            pixels.to(args.device, torch.bfloat16), return_dict=True
        )
        features.hidden_states = features.last_hidden_state = None
    rows = features.pooler_output.shape[1]
    text = torch.arange(1000, 1030).tolist()
    ids = torch.tensor([text[:14] + [VIDEO_TOKEN] * rows + text[14:]], device=args.device)

    def once(settings: DyCoke | None, tokens: int) -> tuple[Stopwatch, Any]:
        watch = Stopwatch(model)
        with torch.inference_mode(), watch.compressing(settings) as run:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_encoder_outputs={"video": features},
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return watch, run and run.report

    # Random weights attend almost evenly, so that attention hardly moves and nothing is refreshed:
    # the third run refreshes in every step, the most that exchanging rows can cost.
    runs: dict[str, DyCoke | None] = {
        "full": None,
        "dycoke": DyCoke(),
        "dycoke, refresh every step": DyCoke(refresh_threshold=1.0),
    }
    reports: dict[str, Any] = {}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for settings in runs.values():
        once(settings, 2)
    for turn in range(args.repeat):
        for name, settings in runs.items():
            watch, reports[name] = once(settings, args.new_tokens)
            times[name].append(watch.timings.to_dict())
            print(turn, name, {k: round(v, 4) for k, v in times[name][-1].items()}, flush=True)

    def spread(name: str, stage: str) -> list[float]:
        values = [t[stage] for t in times[name]]
        return [round(f(values), 5) for f in (statistics.median, min, max)]

    stages = ("compress_s", "prefill_s", "ttft_s", "per_token_s", "total_s")
    print(
        json.dumps(
            {
                "arch": f"llava-onevision-{args.size}",
                "frames": args.frames,
                "prompt_tokens": ids.shape[1],
                "new_tokens": args.new_tokens,
                "device": args.device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "median_min_max": {n: {s: spread(n, s) for s in stages} for n in runs},
                "vs_full": {
                    n: {s: round(spread("full", s)[0] / spread(n, s)[0], 2) for s in stages[1:]}
                    for n in runs
                    if n != "full"
                },
                "reports": {n: r.to_dict() for n, r in reports.items() if r is not None},
            }
        )
    )


if __name__ == "__main__":
    main()
