"""Several questions about one video: asked one by one, and on a video watched once.

Both ways run in turn, in one process, after a warm-up, full and with DyCoke; answers are compared.
One JSON line comes last.

    python benchmarks/many_questions.py --video clip.mp4 --model some/checkpoint

Prediction: n questions one by one cost n (encode + prefill + answer), watched once they cost
encode + prefill + n (short prefill + answer), so the ratio tends to (encode + prefill + answer) /
answer and cannot be above n. For the embedded model (24 frames x 36 tokens) prefill grows with the
frames and an answer of 8 tokens hardly does, so the ratio should lie above that with 16 frames
(1.75x full, 1.56x with DyCoke on 2 cores): about 2x full, 1.8x with DyCoke. Measured with
``--repeat 5`` on 2 cores, load 2.4: 2.56x full, 1.94x with DyCoke, so the prediction was too low.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import transformers

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.video import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", required=True)
    parser.add_argument("--model", help="directory or hub id [default: the embedded model]")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    video = read(args.video, args.frames)
    assistant = Assistant.load(args.model)
    length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    questions = [f"What happens in part {i} of the video?" for i in range(args.questions)]
    settings = {"full": None, "dycoke": DyCoke()}
    times: dict[str, list[float]] = {f"{n}, {w}": [] for n in settings for w in ("each", "once")}
    same = dict.fromkeys(settings, True)
    for turn in range(args.repeat + 1):  # the first warms up
        for name, compressor in settings.items():
            began = time.perf_counter()
            each = [assistant.ask(video, q, compressor, **length).tokens for q in questions]
            between = time.perf_counter()
            seen = assistant.watch(video, compressor)
            once = [seen.ask(q, **length).tokens for q in questions]
            ended = time.perf_counter()
            same[name] &= each == once
            if turn:
                times[f"{name}, each"].append(between - began)
                times[f"{name}, once"].append(ended - between)
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    result = {
        "model": args.model or "nano",
        "device": assistant.model.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "frames": len(video.frames),
        "questions": args.questions,
        "new_tokens": args.new_tokens,
        "seconds": {n: [m, min(times[n]), max(times[n])] for n, m in medians.items()},
        "once_vs_each": {
            name: round(medians[f"{name}, each"] / medians[f"{name}, once"], 2) for name in settings
        },
        "same_answers": same,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
