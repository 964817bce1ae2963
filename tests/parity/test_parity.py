"""Generated ids and the logits of every step against the naive oracle."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import BACKENDS, answer, close, compressed, families, generate, inputs_of, model_of

from dycoke import DyCoke

RATIOS = ((0.7, 0.0), (0.0, 0.7), (0.7, 0.7))
NAMES = {"threshold": "refresh_threshold"}


def settings_of(K: float, P: float, L: int = 3, **options: Any) -> DyCoke:
    return DyCoke(
        merge_ratio=K,
        prune_ratio=P,
        prune_layer=L,
        window=options.get("window", 4),
        refresh_threshold=options.get("threshold", 0.9),
        merge="mean" if options.get("mean") else "keep",
        positions="compact" if options.get("compact") else "original",
    )


def ask_oracle(
    model: Any, family: str, inputs: dict[str, Any], K: float, P: float, L: int = 3, **options: Any
) -> tuple[oracle.Answer, oracle.Oracle]:
    judge = oracle.Oracle(model, family, K=K, P=P, L=L, **options)
    judge.prompt(inputs, tiny.FAMILIES[family].tokens_per_frame, tiny.VIDEO)
    return judge.generate(8), judge


@cache
def cached_oracle(
    family: str, seed: int, frames: int, K: float, P: float, L: int = 3, **options: Any
) -> oracle.Answer:
    inputs = inputs_of(family, [[frames]], [(5, 7)], seed)
    return ask_oracle(model_of(family, seed=seed), family, inputs, K, P, L, **options)[0]


def check(expected: oracle.Answer, output: Any, inputs: Any, report: Any, sample: int = 0) -> None:
    # Near-ties would let rounding decide, and the comparison say nothing.
    assert expected.margins.least > 1e-5, "choose another seed: a decision hung on rounding"
    assert answer(output, inputs)[sample] == expected.ids
    close(torch.stack([step[sample] for step in output.logits]), torch.stack(expected.logits))
    row = report.samples[sample]
    assert row.kept_tokens == sum(k for video in expected.keep for f in video for k in f)
    assert (row.refreshes, row.recalled_tokens) == (expected.refreshes, expected.recalled)


@families
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 3, 7])
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_every_backend_equals_the_oracle(
    family: str, backend: str, seed: int, K: float, P: float
) -> None:
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    expected = cached_oracle(family, seed, 7, K, P)
    output, run = compressed(model_of(family, backend, seed), settings_of(K, P), inputs)
    check(expected, output, inputs, run.report)
    if P:
        assert run.report.samples[0].active_tokens == len(expected.active[-1])


@families
@pytest.mark.parametrize(
    ("frames", "L", "options"),
    [
        (1, 3, {}),
        (2, 3, {}),
        (3, 1, {}),
        (5, 2, {}),
        (6, 4, {}),
        (9, 3, {}),
        (7, 3, {"window": 2}),
        (7, 3, {"window": 3}),
        (8, 3, {"window": 5}),
        (8, 3, {"mean": True}),
        (7, 2, {"mean": True, "window": 6}),
        (8, 3, {"threshold": 0.0}),
        (8, 3, {"threshold": 0.6}),
        (8, 3, {"threshold": 1.0}),
    ],
)
def test_every_setting_equals_the_oracle(
    family: str, frames: int, L: int, options: dict[str, Any]
) -> None:
    inputs = inputs_of(family, [[frames]], [(5, 7)], seed=3)
    expected = cached_oracle(family, 3, frames, 0.7, 0.7, L, **options)
    model = model_of(family, seed=3)
    output, run = compressed(model, settings_of(0.7, 0.7, L, **options), inputs)
    check(expected, output, inputs, run.report)


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_compact_positions_equal_the_oracle(seed: int, K: float, P: float) -> None:
    family = "llava_onevision"
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    expected = cached_oracle(family, seed, 7, K, P, compact=True)
    output, run = compressed(model_of(family, seed=seed), settings_of(K, P, compact=True), inputs)
    check(expected, output, inputs, run.report)


def alone(family: str, videos: Any, text: Any, sample: int, batch: dict[str, Any]) -> Any:
    """The inputs of one sample of a batch, without its padding."""
    ids = batch["input_ids"][sample : sample + 1]
    ids = ids[:, batch["attention_mask"][sample].bool()]
    before = sum(len(v) for v in videos[:sample])
    mine = slice(before, before + len(videos[sample]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen2_5_vl":
        rows = batch["video_grid_thw"].prod(-1).tolist()
        pixels = batch["pixel_values_videos"].split(rows)
        inputs["pixel_values_videos"] = torch.cat(pixels[mine])
        inputs["video_grid_thw"] = batch["video_grid_thw"][mine]
        inputs["mm_token_type_ids"] = (ids == tiny.VIDEO).long() * 2
    else:
        inputs["pixel_values_videos"] = batch["pixel_values_videos"][mine]
    return inputs


@families
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["unequal text", "unequal videos", "two videos", "some text only"])
@pytest.mark.parametrize(("K", "P"), [(0.7, 0.7), (0.0, 0.7)])
def test_a_left_padded_batch_equals_each_sample_alone(
    family: str, backend: str, kind: str, K: float, P: float
) -> None:
    # Seeds whose decisions have margins, in every sample.
    seed = {("qwen2_5_vl", "unequal text"): 8, ("qwen2_5_vl", "two videos"): 9}.get(
        (family, kind), 6
    )
    text = [(5, 7), (2, 3), (11, 1)]
    videos = {
        "unequal text": [[6], [6], [6]],
        "unequal videos": [[3], [8], [1]],
        "two videos": [[5, 5], [5], [5, 5]],
        "some text only": [[6], [], [6]],
    }[kind]
    if kind == "unequal videos" and not tiny.FAMILIES[family].unequal_videos:
        pytest.skip("the stock model takes one tensor of equally long videos")
    batch = inputs_of(family, videos, text, seed)
    output, run = compressed(model_of(family, backend, seed), settings_of(K, P), batch)
    report = run.report
    assert report is not None
    assert len(report.samples) == 3
    for sample, counts in enumerate(videos):
        assert [v.frames for v in report.samples[sample].videos] == counts
        if not counts:
            assert report.samples[sample].visual_tokens == 0
            continue
        single = alone(family, videos, text, sample, batch)
        expected, _ = ask_oracle(model_of(family, seed=seed), family, single, K, P)
        check(expected, output, batch, report, sample)


@families
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_a_follow_up_turn_equals_the_oracle(family: str, backend: str, K: float, P: float) -> None:
    """The returned cache goes into the next generate, which sees the whole kept video again."""
    seed = 7
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    model = model_of(family, backend, seed)
    first, judge = ask_oracle(model_of(family, seed=seed), family, inputs, K, P)
    question = [7, 8, 9, 10]
    judge.text([judge.pending, *question])
    second = judge.generate(8)
    with settings_of(K, P)(model) as run:
        out = generate(model, inputs)
        longer = torch.cat([out.sequences, torch.tensor([question])], dim=1)
        follow = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if family == "qwen2_5_vl":
            follow["mm_token_type_ids"] = (longer == tiny.VIDEO).long() * 2
        again = generate(model, follow, past_key_values=out.past_key_values)
    reports = run.reports
    assert len(reports) == 2
    check(first, out, inputs, reports[0])
    check(second, again, follow, reports[1])


@families
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_float64_is_tighter(family: str, K: float, P: float) -> None:
    """What is left is the float32 softmax and norms of the stock models."""
    model = tiny.FAMILIES[family].model("sdpa", seed=2).double()
    inputs = inputs_of(family, [[7]], [(5, 7)], 2)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    expected, _ = ask_oracle(model, family, inputs, K, P)
    output, _ = compressed(model, settings_of(K, P), inputs)
    assert expected.margins.least > 1e-6
    assert answer(output, inputs)[0] == expected.ids
    # generate hands logits out as float32
    close(torch.cat(output.logits), torch.stack(expected.logits).float(), 2e-5)
