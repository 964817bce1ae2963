"""V-CAST against plain loops, its counts, and what its rule is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from support import compressed, exact, inputs_of, model_of

from dycoke.methods import create
from dycoke.methods.vcast import VCast, curvature, frame_counts

pytestmark = exact

Vector = list[float]
# Frames, tokens, channels: odd sizes, one and two frames, one token, both at once.
SHAPES = [(3, 7, 5), (1, 12, 4), (2, 9, 3), (5, 1, 3), (1, 1, 2), (7, 15, 9), (24, 36, 6)]
RATIOS = [1e-9, 0.13, 0.5, 0.75, 0.9, 0.99]


def video(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) + 0.3


def length(a: Vector) -> float:
    return math.sqrt(sum(x * x for x in a))


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (length(a) * length(b))


def best(values: Vector, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def naive(frames: list[list[Vector]], ratio: float) -> list[list[int]]:
    number, size = len(frames), len(frames[0])
    centres = []
    for frame in frames:
        mean = [sum(column) / size for column in zip(*frame, strict=True)]
        centres.append([x / length(mean) for x in mean])
    bends = [1.0] * number
    for f in range(1, number - 1):
        came, goes = (
            [b - a for a, b in zip(centres[g], centres[g + 1], strict=True)] for g in (f - 1, f)
        )
        bends[f] = 1 - cosine(came, goes)
    budget = max(number, round((1 - ratio) * number * size))
    powers = [math.exp(bend / 0.7) for bend in bends]
    wanted = [power / sum(powers) * (budget - number) for power in powers]
    counts = [1 + min(int(want), size - 1) for want in wanted]
    for f in best([want % 1 for want in wanted], number):
        while sum(counts) < budget and counts[f] < size:
            counts[f] += 1
    assert sum(counts) == budget
    kept = []
    for frame, centre, count in zip(frames, centres, counts, strict=True):
        long = [length(token) for token in frame]
        scores = [
            1 - cosine(token, centre) + (own - min(long)) / (max(long) - min(long) + 1e-6)
            for token, own in zip(frame, long, strict=True)
        ]
        kept.append(sorted(best(scores, count)))
    return kept


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_plain_loop(shape: tuple[int, ...], ratio: float) -> None:
    for seed in range(4):
        features = video(shape, seed)
        before = features.clone()
        made, keep = VCast(ratio).merge_tokens(features)
        assert made is features and torch.equal(features, before)
        expected = naive(features.tolist(), ratio)
        assert [row.nonzero()[:, 0].tolist() for row in keep] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    features = video((5, 20, 8), 5).to(dtype)
    expected = naive(features.double().tolist(), 0.6)
    keep = VCast(0.6).merge_tokens(features)[1]
    assert [row.nonzero()[:, 0].tolist() for row in keep] == expected


def test_a_turn_has_more_and_a_straight_way_less() -> None:
    """Means that go on for three frames, and then the other way."""
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2, 0.1], dtype=torch.float64)
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    bends = curvature(centres)
    assert bends[[0, 5]].tolist() == [1, 1]
    assert bends[3] > 1.98 and bends[[1, 2, 4]].max() < 0.01
    counts = frame_counts(bends, 50, 60).tolist()
    assert sum(counts) == 60 and counts[3] > counts[0] > counts[2] == counts[4]


def test_a_picture_that_stands_still_is_shared_equally() -> None:
    features = video((1, 12, 4), 0).expand(6, -1, -1)
    keep = VCast(0.5).merge_tokens(features)[1]
    assert keep.sum(1).tolist() == [6] * 6 and (keep == keep[0]).all()


def test_full_frames_hand_on_what_they_cannot_hold() -> None:
    counts = frame_counts(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), 10, 24).tolist()
    assert counts[0] == 10 and sum(counts) == 24 and max(counts) == 10


def test_no_frame_is_lost() -> None:
    assert VCast(0.999).merge_tokens(video((6, 5, 3), 1))[1].sum(1).tolist() == [1] * 6


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_two_videos_and_a_batch_have_budgets_of_their_own(family: str) -> None:
    frames = [[8, 6], [6, 8]] if tiny.FAMILIES[family].unequal_videos else [[8, 8], [8, 8]]
    model, inputs = model_of(family), inputs_of(family, frames, [(5, 7), (3, 4)])
    method: Any = create("vcast", retention=0.4)
    _, run = compressed(model, method, inputs, tokens=3)
    for sample in run.report.samples:
        assert len(sample.videos) == 2
        for part in sample.videos:
            whole = part.frames * part.tokens_per_frame
            assert part.kept_tokens == max(part.frames, round(0.4 * whole))
