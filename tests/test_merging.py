"""Stage 1 against a plain loop, and its exact properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import close, exact

from dycoke.merging import counterparts, merge_mask, merge_mean, retained_count

pytestmark = exact

shapes = st.tuples(st.integers(1, 14), st.integers(1, 12), st.integers(1, 5))
ratios = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
windows = st.integers(1, 7)


def clip(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_counterpart(frame: int, window: int) -> int | None:
    place = frame % window
    return None if place == 0 else frame - 1 if place % 2 else frame - place


def naive_mask(features: torch.Tensor, ratio: float, window: int) -> list[list[bool]]:
    frames, tokens, _ = features.shape
    keep = []
    for f in range(frames):
        other = naive_counterpart(f, window)
        row = [True] * tokens
        if other is not None:
            cos = torch.nn.functional.cosine_similarity(
                features[f].double(), features[other].double(), dim=-1
            ).tolist()
            stay = int((1 - ratio) * tokens + 1e-6)
            for n in sorted(range(tokens), key=lambda n: (-cos[n], n))[: tokens - stay]:
                row[n] = False
        keep.append(row)
    return keep


@given(shapes, ratios, windows, st.integers(0, 99))
def test_counts_anchors_and_dtype(shape, ratio, window, seed) -> None:
    keep = merge_mask(clip(shape, seed), ratio, window)
    frames, tokens, _ = shape
    assert keep.shape == (frames, tokens)
    assert keep.dtype == torch.bool
    stay = int((1 - ratio) * tokens + 1e-6)
    for f, row in enumerate(keep):
        assert int(row.sum()) == (tokens if f % window == 0 else stay)


@given(st.integers(1, 9), st.integers(1, 9), ratios, windows, st.integers(0, 99))
def test_equals_a_plain_loop(frames, tokens, ratio, window, seed) -> None:
    # Five dimensions and random values: no two similarities within rounding of one another.
    features = clip((frames, tokens, 5), seed)
    assert merge_mask(features, ratio, window).tolist() == naive_mask(features, ratio, window)


@given(shapes, windows, st.integers(0, 99))
def test_ratio_zero_keeps_everything(shape, window, seed) -> None:
    assert merge_mask(clip(shape, seed), 0.0, window).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_is_taken_in_float32(dtype: torch.dtype) -> None:
    features = clip((8, 50, 64), 0, dtype)
    assert torch.equal(merge_mask(features), merge_mask(features.float()))


@given(st.integers(1, 13), st.integers(1, 30), ratios)
def test_identical_frames_still_keep_exact_counts(frames, tokens, ratio) -> None:
    features = clip((1, tokens, 8), 1).expand(frames, tokens, 8)
    stay = int((1 - ratio) * tokens + 1e-6)
    expected = [tokens if f % 4 == 0 else stay for f in range(frames)]
    assert merge_mask(features, ratio).sum(1).tolist() == expected


def test_ties_go_to_the_lowest_raster_index() -> None:
    # One-hot tokens: every cosine is exactly 1.
    features = torch.eye(10)[None].repeat(2, 1, 1)
    assert merge_mask(features, 0.7)[1].tolist() == [False] * 7 + [True] * 3


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_windows_do_not_know_of_each_other(first, second, seed) -> None:
    """Permuting whole windows permutes the mask."""
    features = clip((4 * (first + second), 7, 6), seed)
    a, b = features[: 4 * first], features[4 * first :]
    mask = merge_mask(features)
    assert torch.equal(mask, torch.cat([merge_mask(a), merge_mask(b)]))
    swapped = merge_mask(torch.cat([b, a]))
    assert torch.equal(swapped, torch.cat([mask[4 * first :], mask[: 4 * first]]))


def test_the_papers_retention() -> None:
    """32 frames of 196 tokens keep 47.19 %, not the reference code's 49.4 %."""
    keep = merge_mask(clip((32, 196, 8), 0), 0.7)
    assert keep.sum().item() == 8 * (196 + 3 * 58)
    assert round(keep.float().mean().item(), 4) == 0.4719


def test_rounding_is_repaired() -> None:
    assert retained_count(10, 0.9) == 1
    assert merge_mask(clip((2, 10, 4), 0), 0.9)[1].sum() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("frame", [0, 1, 5])
def test_nan_and_infinity_are_refused(bad: float, frame: int) -> None:
    features = clip((6, 4, 3), 0)
    features[frame, 2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_mask(features)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(F, N, D\)") as error:
        merge_mask(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="int64"):
        merge_mask(torch.zeros(2, 2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="list"):
        merge_mask([[1.0]])  # type: ignore[arg-type]
    for ratio, error in (
        (1.0, ValueError),
        (-0.1, ValueError),
        ("a", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match=r"merge_ratio .* \[0, 1\)"):
            merge_mask(torch.zeros(2, 2, 2), ratio)  # type: ignore[arg-type]
    for window, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="window"):
            merge_mask(torch.zeros(2, 2, 2), 0.5, window)  # type: ignore[arg-type]


@given(shapes, windows)
def test_counterparts(shape, window) -> None:
    expected = [
        f if naive_counterpart(f, window) is None else naive_counterpart(f, window)
        for f in range(shape[0])
    ]
    assert counterparts(shape[0], window).tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(1, 6), ratios, windows, st.integers(0, 50))
def test_mean_equals_a_plain_loop(frames, tokens, ratio, window, seed) -> None:
    features = clip((frames, tokens, 3), seed)
    keep = merge_mask(features, ratio, window)
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    for f in range(frames):
        for n in range(tokens):
            root = f
            while not keep[root, n]:
                root = naive_counterpart(root, window)  # type: ignore[assignment]
            groups.setdefault((root, n), []).append(features[f, n])
    result = merge_mean(features, keep, window)
    for f in range(frames):
        for n in range(tokens):
            members = groups.get((f, n), [features[f, n]])
            close(result[f, n], torch.stack(members).mean(0))


def test_mean_goes_through_merged_counterparts_and_keeps_dtype() -> None:
    features = torch.arange(1.0, 5.0)[:, None, None].expand(4, 1, 2).to(torch.bfloat16)
    keep = torch.tensor([[True], [True], [False], [False]])
    # f3 -> f2 -> f0, and f1 stays for itself.
    result = merge_mean(features, keep)
    assert result.dtype == torch.bfloat16
    assert result[0, 0, 0].item() == pytest.approx(8 / 3, abs=0.01)
    assert result[1, 0, 0].item() == 2.0
    with pytest.raises(ValueError, match="keep must be bool"):
        merge_mean(features, keep.float())
