"""Peak memory of a long video, the encoder whole, in chunks of frames, and in chunks by memory.

Each line is a process of its own, whose peak resident memory is what the system counted, less what
it was before the video came. A LLaVA-OneVision in its true classes and resolution (384 pixels, 729
patches, 196 tokens per frame), narrow and shallow so that 512 frames take a minute or two. One JSON
line comes last.

    python benchmarks/memory.py

Prediction: whole, every frame costs its pixels and the encoder's widest moment (729 patches x
MLP width x 2, and a few residual streams), about 6 MB a frame here beyond the pixels; in chunks of
16 that part is constant, and what grows are pixels (1.7 MB a frame in float32), pooled features,
prompt embeddings and KV rows. "auto" is shown a machine with ``--free`` MiB: with 400 it may plan
with 200, at 10 MiB a frame by its formula, so that it should take 20 frames at once and lie a
little above the chunks of 16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke import DyCoke
from dycoke.bench.peak import peak_rss
from dycoke.vision import memory
from dycoke.vision.chunks import encode_in_chunks

VIDEO_TOKEN, PER_FRAME = 501, 196


def build() -> Any:
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=131072,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        image_token_index=500,
        video_token_index=VIDEO_TOKEN,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return (peak_rss() or 0) / 2**20


def measure(frames: int, chunk: int, free: int) -> dict[str, Any]:
    """``chunk``: frames at once; 0 for all of them, -1 for "auto" with ``free`` MiB."""
    model = build()

    def shown(device: torch.device, root: Path = Path("/")) -> int:
        return free * 2**20

    memory.free_memory = shown
    # Once through with two frames, so that libraries have what they allocate once.
    for count in (2, frames):
        if count == frames:
            before = peak()
        rows = count * PER_FRAME + 1
        ids = torch.tensor([[3, 4, *[VIDEO_TOKEN] * rows, 5, 6]])
        pixels = torch.rand(1, count, 3, 384, 384)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with DyCoke()(model) as run, torch.inference_mode():
            with encode_in_chunks(model, "auto" if chunk < 0 else chunk or count):
                model.generate(
                    **inputs, pixel_values_videos=pixels, max_new_tokens=4, pad_token_id=0
                )
    assert run.report is not None
    grown = peak() - before
    return {
        "frames": frames,
        "chunk": "auto" if chunk < 0 else chunk,
        "peak_mib": round(grown),
        "kept": run.report.retention,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--free", type=int, default=400, help='MiB that "auto" is shown as free')
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    lines = []
    for frames in args.frames:
        for chunk in (0, args.chunk, -1):
            numbers = map(str, (frames, chunk, args.free))
            command = [sys.executable, __file__, "--child", *numbers]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            lines.append(json.loads(output.splitlines()[-1]))
            print(lines[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "free_mib": args.free, "lines": lines}))


if __name__ == "__main__":
    main()
