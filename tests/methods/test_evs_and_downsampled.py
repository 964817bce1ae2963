"""EVS and the lower resolution against plain loops, and their counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, inputs_of, model_of

from dycoke import UnsupportedError
from dycoke.core.method import VideoContext
from dycoke.methods import create
from dycoke.methods.controls import Downsampled, smaller_grid
from dycoke.methods.evs import EVS

pytestmark = exact

# Frames, height, width, channels: odd sizes, one frame, one token, rows and columns.
SHAPES = [(3, 3, 5, 4), (1, 4, 3, 2), (5, 1, 1, 3), (2, 6, 6, 5), (7, 1, 9, 4), (4, 8, 1, 3)]
RATIOS = [1e-9, 0.3, 0.5, 0.75, 0.9, 0.99]


def video(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    frames, height, width, channels = shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(frames, height * width, channels, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_evs_is_the_plain_loop(shape: tuple[int, ...], ratio: float, seed: int) -> None:
    features = video(shape, seed)
    made, keep = EVS(ratio).merge_tokens(features)
    assert made is features
    frames, size = features.shape[:2]
    scores: dict[tuple[int, int], float] = {}
    for f, n in itertools.product(range(frames), range(size)):
        if f == 0:
            scores[f, n] = math.inf
            continue
        a, b = features[f, n].tolist(), features[f - 1, n].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        scores[f, n] = 1 - dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    count = max(size, int((1 - ratio) * frames * size + 1e-6))
    best = sorted(scores, key=lambda place: (-scores[place], place))[:count]
    assert {tuple(place) for place in keep.nonzero().tolist()} == set(best)
    assert keep[0].all()


def test_evs_keeps_what_moves_and_drops_what_stands_still() -> None:
    features = torch.ones(4, 6, 3, dtype=torch.float64)
    features[2, 4] = torch.tensor([1.0, -1.0, 0.0])  # comes in frame 2, and goes in frame 3
    _, keep = EVS(1 - 8 / 24).merge_tokens(features)
    assert keep[0].all() and keep.sum() == 8
    assert keep[2, 4] and keep[3, 4]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lower_resolution_is_the_plain_loop(
    shape: tuple[int, ...], ratio: float, seed: int
) -> None:
    features = video(shape, seed)
    before = features.clone()
    frames, height, width, _ = shape
    made, keep = Downsampled(ratio).merge_tokens(features, VideoContext(grid=(height, width)))
    assert torch.equal(features, before)
    rows, columns = smaller_grid(height, width, 1 - ratio)
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for f, i, j in itertools.product(range(frames), range(rows), range(columns)):
        down = range(i * height // rows, -(-(i + 1) * height // rows))
        right = range(j * width // columns, -(-(j + 1) * width // columns))
        cells = [features[f, y * width + x] for y, x in itertools.product(down, right)]
        y, x = (2 * i + 1) * height // (2 * rows), (2 * j + 1) * width // (2 * columns)
        assert y in down and x in right
        expected[f, y * width + x] = sum(cells) / len(cells)  # type: ignore[assignment]
    assert {tuple(place) for place in keep.nonzero().tolist()} == set(expected)
    for place, cell in expected.items():
        close(made[place], cell)


def test_the_smaller_grid_is_the_best_of_all() -> None:
    for height, width in itertools.product((1, 2, 3, 5, 6, 14), repeat=2):
        for share in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
            budget = max(1, int(share * height * width + 1e-6))
            worth = {}
            for rows, columns in itertools.product(range(1, height + 1), range(1, width + 1)):
                if rows * columns <= budget:
                    tall, wide = rows / height, columns / width
                    worth[rows, columns] = rows * columns / max(tall / wide, wide / tall)
            assert worth[smaller_grid(height, width, share)] == pytest.approx(
                max(worth.values()), rel=1e-12
            )
    assert smaller_grid(6, 6, 0.25) == (3, 3) and smaller_grid(6, 6, 0.5) == (4, 4)
    assert smaller_grid(14, 14, 0.25) == (7, 7) and smaller_grid(14, 14, 1.0) == (14, 14)


def test_without_a_grid_it_says_what_to_pass() -> None:
    for context in (VideoContext(), VideoContext(grid=(2, 4))):
        with pytest.raises(UnsupportedError, match=r"grid=\(height, width\)"):
            Downsampled(0.5).merge_tokens(torch.randn(2, 6, 3), context)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_two_videos_of_a_prompt_have_their_own_grids(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[8, 8], [8]], [(5, 7), (3, 4)])
    for name in ("downsampled", "evs"):
        method: Any = create(name, retention=0.5)
        _, run = compressed(model, method, inputs, tokens=3)
        tokens = tiny.FAMILIES[family].tokens_per_frame
        for sample in run.report.samples:
            for part in sample.videos:
                assert part.tokens_per_frame == tokens
                whole = part.frames * tokens
                kept = int(0.5 * whole + 1e-6)
                if name == "evs":
                    assert part.kept_tokens == max(tokens, kept)
                else:
                    assert 0 < part.kept_tokens <= kept and part.kept_tokens % part.frames == 0
