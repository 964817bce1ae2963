"""What echoes take beside plain DyCoke while a prompt is read: peak memory at several lengths.

Each line is a process of its own, whose peak resident memory is what the system counted, less what
it was before the video came. A LLaVA-OneVision with 196 tokens per frame, a narrow decoder of four
layers (echoes in two of them, one exact), and an encoder so small that it does not count. One JSON
line comes last.

    python benchmarks/echo_memory.py

Prediction: a mask of rows times rows and echoes would hold 47 700 x 100 352 places at 512 frames,
4.5 GiB as booleans. Without one, what grows with a frame are the echoes' states and the rows' (103
and 93 of them, once more each), keys and values of one layer, and a block's mask: below 1 MiB a
frame here, at 512 frames not more per frame than at 32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
import transformers

from dycoke import DyCoke
from dycoke.bench.arch import Arch
from dycoke.bench.peak import peak_rss
from dycoke.vision.chunks import encode_in_chunks

VIDEO_TOKEN, PER_FRAME, SIDE, WARM_UP = 501, 196, 27, 8
METHODS = {"dycoke": DyCoke(), "dycoke+": DyCoke.plus()}


def build(width: int) -> Any:
    text = {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": SIDE,
        "patch_size": 1,
        "vision_use_head": False,
    }
    tokens = {"image_token_index": 500, "video_token_index": VIDEO_TOKEN}
    config = {"text_config": text, "vision_config": vision, **tokens}
    return Arch("narrow", "llava_onevision", config, {}).build("cpu", torch.float32)


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return (peak_rss() or 0) / 2**20


def measure(frames: int, width: int, method: str) -> dict[str, Any]:
    model, before = build(width), 0.0
    # Once through with a few frames, so that libraries have what they allocate once.
    for count in (WARM_UP, frames):
        before = peak()
        ids = torch.tensor([[3, 4, *[VIDEO_TOKEN] * (count * PER_FRAME + 1), 5, 6]])
        with METHODS[method](model) as run, encode_in_chunks(model, 8), torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=torch.rand(1, count, 3, SIDE, SIDE),
                max_new_tokens=2,
                pad_token_id=0,
            )
    assert run.report is not None
    echoes = run.report.echo_layers
    return {"frames": frames, "method": method, "mib": round(peak() - before, 1), "echoes": echoes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--width", type=int, default=128, help="of the language model")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        frames, width, method = args.child
        print(json.dumps(measure(int(frames), int(width), method)))
        return
    lines = []
    for frames in args.frames:
        held = {}
        for method in METHODS:
            command = [sys.executable, __file__, "--child", str(frames), str(args.width), method]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            held[method] = json.loads(output.splitlines()[-1])["mib"]
        more = held["dycoke+"] - held["dycoke"]
        lines.append({"frames": frames, **held, "more_per_frame_mib": round(more / frames, 3)})
        print(lines[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "width": args.width, "lines": lines}))


if __name__ == "__main__":
    main()
