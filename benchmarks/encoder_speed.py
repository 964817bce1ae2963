"""The vision encoder alone, at true shapes: whole, and without what merging would drop.

    python benchmarks/encoder_speed.py --frames 8 --repeat 2 --ratios 0.5 0.7
    python benchmarks/encoder_speed.py --layers 2 --size 56 --frames 4 --repeat 1

SigLIP-so400m as LLaVA-OneVision-0.5B has it (26 blocks, width 1152, 729 patches), random weights,
in the number format that the processor computes fastest in. What is timed is all of
``get_video_features``: choosing the cells, the encoder, the projector and the pooling. The ways
take turns in one process, after one frame that warms up; ratios are medians over the turns. CPU
time stands beside the clock, for machines where others work, too (OMP_WAIT_POLICY=passive keeps
waiting threads out of it). Random weights choose by patch embeddings as trained ones do, and cost
the same; what skipping does to features is measured elsewhere (encoder_motion.py,
encoder_accuracy.py). One JSON line comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke import DyCoke
from dycoke.bench.arch import arch_of
from dycoke.bench.results import hardware
from dycoke.nano import stories
from dycoke.precision import choose_format, name_of
from dycoke.video import read

TEXT: dict[str, Any] = {  # a language model that never runs
    "vocab_size": 128,
    "hidden_size": 896,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def build(layers: int | None, size: int, dtype: torch.dtype) -> Any:
    vision = dict(arch_of("llava-onevision-0.5b").config["vision_config"])
    del vision["model_type"]
    vision |= {"image_size": size, "num_hidden_layers": layers or vision["num_hidden_layers"]}
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**vision),
        image_token_id=126,
        video_token_id=127,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval().to(dtype)


def pixels_of(file: str | None, frames: int, size: int) -> Tensor:
    """What the encoder gets: (1, F, 3, size, size)."""
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            story = stories.make("seen", 0, frames=max(stories.FRAMES, frames))
            file = str(stories.write(story, Path(folder) / "story.mp4"))
        video = read(file, frames)
    square = {"height": size, "width": size}
    made = LlavaOnevisionVideoProcessor(size=square)([video.frames], return_tensors="pt")
    pixels: Tensor = made["pixel_values_videos"]
    return pixels


class Pass(NamedTuple):
    """Wall and CPU seconds of a pass, and the share of the tokens that was computed."""

    wall_s: float
    cpu_s: float
    computed: float


@torch.inference_mode()
def encode(model: Any, pixels: Tensor, ratio: float, layer: int | None) -> Pass:
    """One pass through the encoder."""
    method = DyCoke(prune_ratio=0, skip_ratio=ratio, skip_layer=layer)
    with contextlib.nullcontext() if ratio == 0 else method(model):
        began = time.perf_counter(), time.process_time()
        output = model.model.get_video_features(pixels, return_dict=True)
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        masks = getattr(output, "encoded", None)
    computed = 1.0
    if masks is not None:
        computed = torch.cat([mask.flatten() for (mask,) in masks]).double().mean().item()
    return Pass(*took, computed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", help="a file [default: a rendered story]")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--skip-layer", type=int, help="[default: an eighth of the blocks]")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--layers", type=int, help="cut the encoder [default: all 26]")
    parser.add_argument("--size", type=int, default=384, help="pixels of a side")
    parser.add_argument("--dtype", help="[default: what the processor computes fastest in]")
    parser.add_argument("--json", type=Path, help="write the result into this file, too")
    args = parser.parse_args()

    chosen = choose_format("cpu", args.dtype)
    model = build(args.layers, args.size, chosen.dtype)
    pixels = pixels_of(args.video, args.frames, args.size).to(chosen.dtype)
    ratios = [0.0, *args.ratios]
    passes: dict[float, list[Pass]] = {ratio: [] for ratio in ratios}
    encode(model, pixels[:, :1], 0.0, None)  # warms up
    for turn in range(args.repeat):
        for ratio in ratios:
            done = encode(model, pixels, ratio, args.skip_layer)
            passes[ratio].append(done)
            print(f"turn {turn + 1}, skip_ratio {ratio:g}: {done.wall_s:.2f} s", flush=True)
    whole = passes[0.0]
    lines = []
    for ratio, mine in passes.items():
        line: dict[str, Any] = {"skip_ratio": ratio, "computed": round(mine[0].computed, 4)}
        for clock in ("wall_s", "cpu_s"):
            seconds, full = ([getattr(p, clock) for p in ps] for ps in (mine, whole))
            line[clock] = [round(s, 3) for s in seconds]
            line[f"median_{clock}"] = round(statistics.median(seconds), 3)
            faster = statistics.median(f / s for f, s in zip(full, seconds, strict=True))
            line[f"{clock}_ratio"] = round(faster, 3)
        lines.append(line)
    blocks = model.config.vision_config.num_hidden_layers
    print(f"{blocks} blocks, {chosen}")
    for line in lines:
        print(
            f"skip_ratio {line['skip_ratio']:g}: {line['median_wall_s']:.2f} s, "
            f"{line['wall_s_ratio']:.2f}x ({line['cpu_s_ratio']:.2f}x in CPU time), "
            f"{line['computed']:.1%} of the tokens computed"
        )
    result = {
        "frames": pixels.shape[1],
        "size": args.size,
        "layers": blocks,
        "skip_layer": args.skip_layer,
        "video": Path(args.video).name if args.video else "a rendered story",
        "dtype": name_of(chosen.dtype),
        "threads": torch.get_num_threads(),
        "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "lines": lines,
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
