"""Host time of a decode step against the stock model's, where the arithmetic is as good as nothing.

    python benchmarks/host_overhead.py --layers 28 --steps 60 --repeat 9

A decoder of tiny widths: what is left of a step is Python. The three ways take turns in one
process and one thread; each figure is the median over the turns of the mean CPU time of a step,
and of the ratio to the stock model's of the same turn. One JSON line comes last.

    stock     generate alone
    steady    DyCoke, the selection kept after the first step (refresh_threshold=0)
    refresh   DyCoke, a selection in every step (refresh_threshold=1)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dycoke import DyCoke

VIDEO, FRAMES = 90, 8
WAYS = {
    "stock": None,
    "steady": DyCoke(refresh_threshold=0),
    "refresh": DyCoke(refresh_threshold=1),
}


def tiny(layers: int) -> Any:
    """A LLaVA-OneVision of width 32: 8 frames of 9 tokens."""
    text = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        video_token_id=VIDEO,
        image_token_id=91,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


class Clock(StoppingCriteria):  # type: ignore[misc]
    """CPU time from the first decode step on."""

    def __init__(self) -> None:
        self.began = 0.0
        self.steps = -1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps == 0:
            self.began = time.process_time()
        self.ended = time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def step_time(model: Any, way: DyCoke | None, steps: int) -> float:
    """Mean CPU seconds of a decode step."""
    ids = torch.tensor([[3, 4, *[VIDEO] * (FRAMES * 9), VIDEO, 5, 6]])
    pixels = torch.randn(1, FRAMES, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    clock = Clock()
    with contextlib.nullcontext() if way is None else way(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels,
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return (clock.ended - clock.began) / clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = tiny(args.layers)
    turns: list[dict[str, float]] = []
    for turn in range(args.repeat + 1):  # the first warms up
        times = {name: step_time(model, way, args.steps) for name, way in WAYS.items()}
        if turn:
            turns.append(times)
    result: dict[str, Any] = {"layers": args.layers, "steps": args.steps, "repeat": args.repeat}
    for name in WAYS:
        result[f"{name}_ms"] = round(statistics.median(t[name] for t in turns) * 1e3, 3)
    for name in ("steady", "refresh"):
        result[f"{name}_ratio"] = round(statistics.median(t[name] / t["stock"] for t in turns), 3)
    print(f"stock {result['stock_ms']} ms per step", end="")
    for name in ("steady", "refresh"):
        print(f", {name} {result[f'{name}_ratio']}x", end="")
    print()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
