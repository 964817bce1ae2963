"""Generated ids and the logits of every step against the naive oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import (
    BACKENDS,
    ROUNDING,
    answer,
    close,
    compressed,
    exact,
    families,
    generate,
    inputs_of,
    model_of,
)

from dycoke import DyCoke

pytestmark = exact

RATIOS = ((0.7, 0.0), (0.0, 0.7), (0.7, 0.7))


def settings_of(K: float, P: float, L: int = 3, **options: Any) -> DyCoke:
    budget = options.get("budget")
    return DyCoke(
        merge_ratio=K if budget is None else 0.7,
        prune_ratio=P,
        prune_layer=L,
        window=options.get("window", 4),
        refresh_threshold=options.get("threshold", 0.9),
        merge="mean" if options.get("mean") else "keep",
        positions="compact" if options.get("compact") else "original",
        token_budget=budget,
    )


def ask_oracle(
    model: Any, family: str, inputs: dict[str, Any], K: float, P: float, L: int = 3, **options: Any
) -> tuple[oracle.Answer, oracle.Oracle]:
    judge = oracle.Oracle(model, family, K=K, P=P, L=L, **options)
    judge.prompt(inputs, tiny.FAMILIES[family].tokens_per_frame, tiny.FAMILIES[family].token)
    return judge.generate(8), judge


TRIES = 25


def with_margin(
    start: int, attempt: Callable[[int], list[oracle.Answer]], margin: float = ROUNDING
) -> Any:
    """The first seed from ``start`` on where no decision of the oracle hangs on rounding.

    Near-ties would let rounding decide, and the comparison say nothing. The oracle alone chooses.
    """
    for seed in range(start, start + 100 * TRIES, 100):
        answers = attempt(seed)
        if min(answer.margins.least for answer in answers) > margin:
            return seed, answers
    raise AssertionError(f"no seed of {TRIES} from {start} has margins above {margin}")


def of_one_video(family: str, merge: float) -> tuple[oracle.Answer, list[int], Any, Any]:
    """The oracle's answer about 7 frames, the rows of visual tokens, the model and its inputs."""
    visual: list[int] = []

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        expected, judge = ask_oracle(model_of(family, seed=seed), family, inputs, merge, 0.7)
        visual[:] = [i for i, row in enumerate(judge.rows) if row.visual]
        return [expected]

    seed, (expected,) = with_margin(7, attempt)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    return expected, visual, model_of(family, seed=seed), inputs


@cache
def single(
    family: str, start: int, frames: int, K: float, P: float, L: int = 3, **options: Any
) -> tuple[int, oracle.Answer]:
    """Seed and expected answer for one sample."""

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[frames]], [(5, 7)], seed)
        return [ask_oracle(model_of(family, seed=seed), family, inputs, K, P, L, **options)[0]]

    seed, answers = with_margin(start, attempt)
    return seed, answers[0]


def check(expected: oracle.Answer, output: Any, inputs: Any, report: Any, sample: int = 0) -> None:
    assert expected.margins.least > ROUNDING
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
    seed, expected = single(family, seed, 7, K, P)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
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
    seed, expected = single(family, 3, frames, 0.7, 0.7, L, **options)
    inputs = inputs_of(family, [[frames]], [(5, 7)], seed)
    model = model_of(family, seed=seed)
    output, run = compressed(model, settings_of(0.7, 0.7, L, **options), inputs)
    check(expected, output, inputs, run.report)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "gemma4"])
@pytest.mark.parametrize(
    ("P", "options"),
    [
        (0.7, {"budget": 31}),
        (0.7, {"budget": 0.1}),
        (0.0, {"budget": 0.25, "window": 3}),
        (0.7, {"budget": 0.25, "mean": True}),
        (0.7, {"budget": 3, "mean": True, "window": 2}),
    ],
)
def test_a_token_budget_equals_the_oracle(family: str, P: float, options: dict[str, Any]) -> None:
    seed, expected = single(family, 5, 7, 0.7, P, **options)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    output, run = compressed(model_of(family, seed=seed), settings_of(0.7, P, **options), inputs)
    check(expected, output, inputs, run.report)
    budget = options["budget"]
    visual = run.report.samples[0].visual_tokens
    count = budget if isinstance(budget, int) else int(budget * visual + 1e-6)
    assert run.report.samples[0].kept_tokens == count


@pytest.mark.parametrize("family", ["llava_onevision", "internvl", "video_llama_3"])
@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_compact_positions_equal_the_oracle(family: str, seed: int, K: float, P: float) -> None:
    seed, expected = single(family, seed, 7, K, P, compact=True)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    output, run = compressed(model_of(family, seed=seed), settings_of(K, P, compact=True), inputs)
    check(expected, output, inputs, run.report)


def alone(family: str, videos: Any, text: Any, sample: int, batch: dict[str, Any]) -> Any:
    """The inputs of one sample of a batch, without its padding."""
    ids = batch["input_ids"][sample : sample + 1]
    ids = ids[:, batch["attention_mask"][sample].bool()]
    before = sum(len(v) for v in videos[:sample])
    mine = slice(before, before + len(videos[sample]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "video_grid_thw" in batch:
        rows = batch["video_grid_thw"].prod(-1).tolist()
        pixels = batch["pixel_values_videos"].split(rows)
        inputs["pixel_values_videos"] = torch.cat(pixels[mine])
        inputs["video_grid_thw"] = batch["video_grid_thw"][mine]
        if "mm_token_type_ids" in batch:
            inputs["mm_token_type_ids"] = (ids == tiny.FAMILIES[family].token).long() * 2
        else:
            inputs["video_merge_sizes"] = batch["video_merge_sizes"][mine]
    elif "pixel_values" in batch:
        images = [sum(counts) for counts in videos]
        pixels = batch["pixel_values"]
        if pixels.ndim == 5:  # a row of images per sample
            inputs["pixel_values"] = pixels[sample : sample + 1, : images[sample]]
        else:
            inputs["pixel_values"] = pixels.split(images)[sample]
    elif "num_frames_per_video" in batch:
        frames = batch["num_frames_per_video"].tolist()
        for name in ("pixel_values_videos", "video_position_ids"):
            inputs[name] = torch.cat(batch[name].split(frames)[mine])
        inputs["num_frames_per_video"] = batch["num_frames_per_video"][mine]
        inputs["mm_token_type_ids"] = (ids == tiny.VIDEO).long() * 2
    else:
        for name in ("pixel_values_videos", "video_position_ids"):
            if name in batch:
                inputs[name] = batch[name][mine]
    return inputs


PADDED_TEXT = [(5, 7), (2, 3), (11, 1)]
PADDED = {
    "unequal text": [[6], [6], [6]],
    "unequal videos": [[3], [8], [1]],
    "two videos": [[5, 5], [5], [5, 5]],
    "some text only": [[6], [], [6]],
}


@cache
def padded(family: str, kind: str, K: float, P: float) -> tuple[int, list[oracle.Answer]]:
    """Seed of a batch, and the answers of its samples with video, each asked alone."""
    videos = PADDED[kind]

    def attempt(seed: int) -> list[oracle.Answer]:
        batch, model = inputs_of(family, videos, PADDED_TEXT, seed), model_of(family, seed=seed)
        return [
            ask_oracle(
                model,
                family,
                alone(family, videos, PADDED_TEXT, i, batch),
                K,
                P,
                videos=counts,
            )[0]
            for i, counts in enumerate(videos)
            if counts
        ]

    return with_margin(6, attempt)  # type: ignore[no-any-return]


@families
@pytest.mark.parametrize(
    ("backend", "K", "P"), [*((backend, 0.7, 0.7) for backend in BACKENDS), ("sdpa", 0.0, 0.7)]
)
@pytest.mark.parametrize("kind", PADDED)
def test_a_left_padded_batch_equals_each_sample_alone(
    family: str, backend: str, kind: str, K: float, P: float
) -> None:
    videos = PADDED[kind]
    if kind == "unequal videos" and not tiny.FAMILIES[family].unequal_videos:
        pytest.skip("the stock model takes one tensor of equally long videos")
    seed, answers = padded(family, kind, K, P)
    batch = inputs_of(family, videos, PADDED_TEXT, seed)
    source = tiny.FAMILIES[family].frame_source(videos)
    model = model_of(family, backend, seed)
    output, run = compressed(model, settings_of(K, P), batch, frame_source=source)
    report = run.report
    assert report is not None
    assert len(report.samples) == 3
    for i, counts in enumerate(videos):
        assert [v.frames for v in report.samples[i].videos] == counts
        assert bool(report.samples[i].visual_tokens) == bool(counts)
    filled = [i for i, counts in enumerate(videos) if counts]
    for i, expected in zip(filled, answers, strict=True):
        check(expected, output, batch, report, i)


QUESTION = [7, 8, 9, 10]


@cache
def two_turns(family: str, K: float, P: float) -> tuple[int, list[oracle.Answer]]:
    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        first, judge = ask_oracle(model_of(family, seed=seed), family, inputs, K, P)
        judge.text([judge.pending, *QUESTION])
        before = judge.margins.least
        second = judge.generate(8)
        assert second.margins.least <= before  # of both turns
        return [first, second]

    return with_margin(7, attempt)  # type: ignore[no-any-return]


@families
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_a_follow_up_turn_equals_the_oracle(family: str, backend: str, K: float, P: float) -> None:
    """The returned cache goes into the next generate, which sees the whole kept video again."""
    seed, (first, second) = two_turns(family, K, P)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    model = model_of(family, backend, seed)
    with settings_of(K, P)(model) as run:
        out = generate(model, inputs)
        longer = torch.cat([out.sequences, torch.tensor([QUESTION])], dim=1)
        follow = tiny.FAMILIES[family].follow_up(longer)
        again = generate(model, follow, past_key_values=out.past_key_values)
    reports = run.reports
    assert len(reports) == 2
    check(first, out, inputs, reports[0])
    check(second, again, follow, reports[1])
