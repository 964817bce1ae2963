"""What it costs in accuracy that the vision encoder leaves out what merging drops (StoryQA).

    python benchmarks/encoder_accuracy.py --stories 500 --seed 63000 [--json FILE]

Lines, at K = 0.7 and L = 3:

    full           the model as it is
    dycoke         the paper's rule on features of the whole encoder
    same mask      what skipping computes stays, and what it leaves out is dropped; but the features
                   are those of the whole encoder
    skipping       the same, and the encoder skips

for P = 0 and P = 0.7; and DyCoke+ with the whole encoder and with skip_ratio=0.5. The differences
are paired by story, in points, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.compressor import Compressor
from dycoke.evaluate.stats import paired_difference
from dycoke.evaluate.storyqa import CHUNK, TASKS, Scores, StoryQA, _Encoded, accuracy
from dycoke.nano import stories

SAME = "same mask"
LINES: dict[str, Compressor | None] = {"full": None}
for p in (0.0, 0.7):
    own: dict[str, Any] = {"merge_ratio": 0.7, "prune_ratio": p, "prune_layer": 3}
    LINES[f"dycoke P={p:g}"] = DyCoke(**own)
    LINES[f"{SAME} P={p:g}"] = DyCoke(**own, skip_ratio=0.7)
    LINES[f"skipping P={p:g}"] = DyCoke(**own, skip_ratio=0.7)
LINES["dycoke+"] = DyCoke.plus()
LINES["dycoke+ skipping"] = DyCoke.plus(skip_ratio=0.5)
PAIRS = [
    *((f"skipping P={p:g}", f"{other} P={p:g}") for p in (0.0, 0.7) for other in (SAME, "dycoke")),
    ("dycoke+ skipping", "dycoke+"),
    ("dycoke+ skipping", "full"),
]


class WholeFeatures(StoryQA):
    """The features of the whole encoder, with the notes of one that skips."""

    def whole(self, told: list[stories.Story]) -> None:
        """Encode in full, while no method is on the model."""
        for story in told:
            super()._encode(story, None)

    def _encode(self, story: stories.Story, compressor: Compressor | None = None) -> _Encoded:
        made = super()._encode(story, compressor)
        return _Encoded(super()._encode(story, None).features, made.notes)


def run(name: str, seed: int, count: int) -> Scores:
    """Scores of one line."""
    torch.set_num_threads(1)
    kind = WholeFeatures if name.startswith(SAME) else StoryQA
    scores, assistant = Scores(), Assistant.load(device="cpu")
    for begin in range(0, count, CHUNK):  # a task each, which keeps features of its own stories
        task = kind(assistant, "seen", seed + begin, min(CHUNK, count - begin))
        if isinstance(task, WholeFeatures):
            if not task._takes_features:
                raise SystemExit(
                    "this needs a transformers that takes features (mm_encoder_outputs)"
                )
            with torch.inference_mode():
                task.whole([stories.make("seen", seed + begin + i) for i in range(task.count)])
        for part in task.run(LINES[name]):
            scores.add(part)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stories", type=int, default=500)
    parser.add_argument("--seed", type=int, default=63000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.workers == 1:
        scores = {name: run(name, args.seed, args.stories) for name in LINES}
    else:
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            jobs = {name: pool.submit(run, name, args.seed, args.stories) for name in LINES}
            scores = {name: job.result() for name, job in jobs.items()}
    results: dict[str, Any] = {"stories": args.stories, "seed": args.seed, "lines": {}, "pairs": []}
    for name, mine in scores.items():
        found = {task: accuracy(mine, task, None) for task in TASKS}
        results["lines"][name] = found
        shares = [100 * found[task]["correct"] / found[task]["n"] for task in TASKS]
        print(f"{name:20}" + "".join(f"{share:8.1f}" for share in shares))
    for one, two in PAIRS:
        row: dict[str, Any] = {"line": one, "against": two}
        text = f"{one} - {two}:"
        for task in TASKS:
            difference = paired_difference(getattr(scores[one], task), getattr(scores[two], task))
            row[task] = difference
            points, low, high = (100 * value for value in difference)
            text += f"  {task} {points:+.1f} [{low:+.1f}, {high:+.1f}]"
        results["pairs"].append(row)
        print(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
