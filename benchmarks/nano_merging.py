"""Where merging costs nano its accuracy: telling stories, one story at a time.

Attention is replaced while the model runs, so that the merged tokens are missing for a part of the
reading only:

    full        every token is there
    text        only text (question and answer) cannot see the merged tokens; frames still can
    frames      only the frames cannot see each other's merged tokens; text still can
    merged      they are gone for all: what DyCoke's merging does
    weighted    as merged, and a kept token weighs as many as it stands for (ToMe's proportional
                attention)

    python benchmarks/nano_merging.py --stories 48 --merge-ratio 0.7
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from dycoke import DyCoke, nano
from dycoke.assistant import Assistant
from dycoke.core.method import NO_CONTEXT, VideoContext
from dycoke.evaluate.storyqa import StoryQA
from dycoke.merging import merge_mask
from dycoke.nano import stories

MODES = ("full", "text", "frames", "merged", "weighted")


class Reading:
    """The attention function, and what it must know of the video at hand."""

    def __init__(self, mode: str, before: int) -> None:
        self.mode, self.before = mode, before
        self.keep = torch.ones(0, dtype=torch.bool)

    def weights(self) -> Tensor:
        """How many tokens each one stands for, (F, N): 0 for the merged ones."""
        size = torch.ones(self.keep.shape)
        for frame in reversed(range(len(size))):
            j = frame % 4
            if j:
                gone = ~self.keep[frame]
                size[frame - (1 if j % 2 else 2)][gone] += size[frame][gone]
                size[frame][gone] = 0
        return size

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        length, new = key.shape[2], query.shape[2]
        logits = query @ key.mT * kwargs["scaling"]
        seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        start, end = self.before, self.before + self.keep.numel()
        if self.mode != "full":
            gone = torch.zeros(length, dtype=torch.bool)
            gone[start:end] = ~self.keep.flatten()
            place = torch.arange(length - new, length)
            text = (place >= end) | (place < start)
            rows = {"text": text, "frames": ~text}.get(self.mode, torch.ones_like(text))
            seen &= ~(rows[:, None] & gone) | (place[:, None] == torch.arange(length))
        if self.mode == "weighted":
            bias = torch.zeros(length)
            bias[start:end] = self.weights().clamp_min(1).log().flatten()
            logits = logits + bias
        probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return (probabilities @ value).transpose(1, 2), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first story")
    parser.add_argument("--merge-ratio", type=float, default=0.7)
    args = parser.parse_args()
    assistant = Assistant.load(nano.path(), "cpu")
    task = StoryQA(assistant, "seen", args.seed, args.stories)
    told = [stories.make("seen", args.seed + i) for i in range(args.stories)]
    (prompt,) = task._ids([stories.DESCRIBE[0]])
    reading = Reading("full", prompt.index(assistant.model.config.video_token_id))

    @dataclass(frozen=True)
    class Marking(DyCoke):
        """Finds what would be merged, and leaves it to the attention function."""

        def merge_tokens(
            self, features: Tensor, clip: VideoContext = NO_CONTEXT
        ) -> tuple[Tensor, Tensor]:
            reading.keep = merge_mask(features, self.merge_ratio, self.window)
            return features, torch.ones_like(reading.keep)

    AttentionInterface.register("reading", lambda *a, **k: reading(*a, **k))
    assistant.model.model.language_model.set_attn_implementation("reading")
    ids = torch.tensor([prompt])
    total = sum(len(story.events) for story in told)
    for reading.mode in MODES:
        right = 0
        with torch.inference_mode(), Marking(args.merge_ratio, 0.0)(assistant.model):
            for story in told:
                (text,) = task._answer(task._watch([story]), [0], ids, "describe")
                right += stories.events_right(text, story)
        print(f"{reading.mode:9} {right} of {total} events, {right / total:.1%}", flush=True)


if __name__ == "__main__":
    main()
