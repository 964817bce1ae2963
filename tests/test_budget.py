"""A token budget against plain loops: the mask, what stands for a dropped token, and shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import close, exact

from dycoke import DyCoke, methods
from dycoke.core.method import VideoContext
from dycoke.core.prefill import shorten
from dycoke.merging import budget_mask, merge_mean, video_budget
from dycoke.methods.controls import FewerFrames, RandomTokens
from dycoke.models import VideoSpan
from dycoke.vision.encoder import contexts_of

pytestmark = exact


def clip(frames: int, tokens: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(frames, tokens, width, generator=torch.Generator().manual_seed(seed))


def before(frame: int, window: int) -> int | None:
    """The frame whose token stands for this one's; None for the first."""
    place = frame % window
    if place:
        return frame - 1 if place % 2 else frame - place
    return frame - window if frame else None


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in vector))
    return [v / norm for v in vector]


def distance(a: list[float], b: list[float]) -> float:
    return 1 - sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


def mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def naive_mask(features: torch.Tensor, count: int, window: int) -> list[list[bool]]:
    x = [[unit(token) for token in frame] for frame in features.double().tolist()]
    frames, tokens = len(x), len(x[0])
    common = [mean([x[f][n] for f in range(frames)]) for n in range(tokens)]
    value: dict[tuple[int, int], float] = {}
    for f in range(frames):
        for n in range(tokens):
            other = before(f, window)
            compared = mean(x[0]) if other is None else x[other][n]
            value[f, n] = distance(x[f][n], compared) + distance(x[f][n], common[n])
    first = sorted(range(tokens), key=lambda n: (-distance(x[0][n], mean(x[0])), n))
    chosen = {(0, n) for n in first[: max(1, count // 4)]}
    ranked = sorted(value, key=lambda place: (-value[place], place))
    rounds = [[place for place in ranked if place[0] == f] for f in range(frames)]
    turns = []
    for i in range(tokens):
        turns += sorted((row[i] for row in rounds), key=ranked.index)
    chosen |= set(turns[: (count + 2) // 4])
    rest = [place for place in ranked if place not in chosen]
    chosen |= set(rest[: count - len(chosen)])
    return [[(f, n) in chosen for n in range(tokens)] for f in range(frames)]


@settings(deadline=None)
@given(
    st.integers(1, 9), st.integers(3, 9), st.integers(1, 90), st.integers(1, 6), st.integers(0, 99)
)
def test_equals_a_plain_loop(frames, tokens, count, window, seed) -> None:
    # From three tokens on: two are equally far from their mean.
    features = clip(frames, tokens, seed)
    assert budget_mask(features, count, window).tolist() == naive_mask(features, count, window)


def uneven(frames: int, tokens: int, seed: int) -> torch.Tensor:
    """Every third frame is new all over, the others hardly move."""
    amount = torch.tensor([2.0 if f % 3 == 2 else 0.3 for f in range(frames)])
    return clip(1, tokens, seed) + amount[:, None, None] * clip(frames, tokens, seed + 1000)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("frames", "tokens"), [(9, 5), (7, 8), (11, 4)])
def test_every_budget_of_an_uneven_video_equals_a_plain_loop(frames, tokens, seed) -> None:
    features = uneven(frames, tokens, seed)
    smaller = torch.zeros(frames, tokens, dtype=torch.bool)
    for count in range(1, frames * tokens + 1):
        keep = budget_mask(features, count)
        assert keep.tolist() == naive_mask(features, count, 4)
        assert not (smaller & ~keep).any()
        smaller = keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (1, 7), (7, 1), (5, 9), (13, 6)])
@pytest.mark.parametrize("window", [1, 3, 4])
def test_every_budget_is_hit_and_a_larger_one_keeps_more(dtype, frames, tokens, window) -> None:
    features = clip(frames, tokens, 1).to(dtype)
    features[frames // 2 :, : tokens // 2] = features[:1, : tokens // 2].clone()  # ties, too
    smaller = torch.zeros(frames, tokens, dtype=torch.bool)
    for count in range(1, frames * tokens + 3):
        keep = budget_mask(features, count, window)
        assert int(keep.sum()) == min(count, frames * tokens)
        assert not (smaller & ~keep).any()
        smaller = keep
    assert torch.equal(budget_mask(features, 5), budget_mask(features.float(), 5))


def test_ties_go_to_the_lowest_raster_index() -> None:
    # One place per frame, one-hot: changes and distances to the mean are equal to the last bit.
    features = torch.eye(8)[:, None]
    keep = budget_mask(features, 5, window=1)[:, 0].tolist()
    assert keep == [True] * 5 + [False] * 3


def test_tokens_go_where_something_is() -> None:
    """What moves and what stands there are kept in all frames, the background once."""
    features = torch.zeros(8, 16, 4)
    features[..., 0] = 1.0
    features[range(8), range(0, 16, 2)] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    features[4:, 1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    keep = budget_mask(features, 36)
    assert keep[range(8), range(0, 16, 2)].all() and keep[4:, 1].all() and keep.any(1).all()


def test_windows_with_more_change_get_more() -> None:
    features = clip(1, 16, 0) + 0.01 * clip(12, 16, 1)
    features[4:8, :8] += 0.5 * clip(4, 8, 2)
    features[8:, :8] += 2 * clip(4, 8, 3)
    calm, lively, wild = budget_mask(features, 48).view(3, -1).sum(1).tolist()
    assert calm - 12 < lively < wild  # twelve of the first frame are certain


def test_no_frame_is_lost_to_a_cut() -> None:
    """One frame is new all over, the others hardly move: they have a quarter of the budget."""
    still = clip(1, 50, 0)
    features = still + 0.01 * clip(12, 50, 1)
    features[7] = clip(1, 50, 2)[0]
    kept = budget_mask(features, 96).sum(1).tolist()
    assert min(kept) >= 2 and kept[7] == max(kept)


@settings(deadline=None)
@given(
    st.integers(1, 14), st.integers(1, 6), st.integers(1, 60), st.integers(1, 6), st.integers(0, 50)
)
def test_mean_follows_the_chain(frames, tokens, count, window, seed) -> None:
    features = clip(frames, tokens, seed, 3)
    keep = budget_mask(features, count, window)
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    for f in range(frames):
        for n in range(tokens):
            root: int | None = f
            while root is not None and not keep[root, n]:
                root = before(root, window)
            if root is not None:
                groups.setdefault((root, n), []).append(features[f, n])
    result = merge_mean(features, keep, window)
    for f in range(frames):
        for n in range(tokens):
            members = groups.get((f, n), [features[f, n]])
            close(result[f, n], torch.stack(members).mean(0))


def test_a_long_chain_ends_where_a_token_stays() -> None:
    features = torch.arange(1.0, 34.0)[:, None, None].expand(33, 1, 2)
    keep = torch.zeros(33, 1, dtype=torch.bool)
    keep[0] = True
    assert merge_mean(features, keep, 1)[0, 0, 0] == 17.0
    assert torch.equal(merge_mean(features, ~keep, 1), features)


@pytest.mark.parametrize("frame", [0, 1, 5])
def test_nan_is_refused(frame: int) -> None:
    features = clip(6, 4, 0)
    features[frame, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        budget_mask(features, 9)


@pytest.mark.parametrize(
    ("count", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_counts_are_named(count: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="count must be"):
        budget_mask(clip(3, 3, 0), count)  # type: ignore[arg-type]


@given(st.integers(1, 400), st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_videos_share_an_int_budget(budget: int, tokens: list[int]) -> None:
    counts = [video_budget(budget, n, tuple(tokens), i) for i, n in enumerate(tokens)]
    assert sum(counts) == min(max(budget, len(tokens)), sum(tokens))
    assert all(1 <= count <= n for count, n in zip(counts, tokens, strict=True))


def test_shares_by_hand() -> None:
    def counts(budget: int | float, *tokens: int) -> list[int]:
        return [video_budget(budget, n, tokens, i) for i, n in enumerate(tokens)]

    assert counts(30, 100, 200) == [10, 20]
    assert counts(3, 1000, 1, 1) == [1, 1, 1]
    assert counts(2, 9, 9, 9) == [1, 1, 1]  # above the budget: no video is lost
    assert counts(0.1, 100, 4) == [10, 1]
    assert counts(1.0, 100, 4) == [100, 4]
    assert counts(1 - 0.9, 10) == [1]
    assert video_budget(7, 100) == 7


def test_two_videos_of_a_sample_share_its_budget() -> None:
    spans = [
        VideoSpan(0, torch.arange(20).view(4, 5) + 2, (1, 5)),
        VideoSpan(0, torch.arange(10).view(2, 5) + 25, (1, 5)),
        VideoSpan(1, torch.arange(20).view(4, 5) + 2, (1, 5)),
    ]
    generator = torch.Generator().manual_seed(0)
    for merge in ("keep", "mean"):
        inputs = {"inputs_embeds": torch.randn(2, 40, 6, generator=generator)}
        method: Any = DyCoke(token_budget=7, prune_ratio=0, merge=merge)
        _, masks = shorten(inputs, spans, method, cached=True, contexts=contexts_of(spans))
        assert [int(mask.sum()) for mask in masks] == [5, 2, 7], merge


@pytest.mark.parametrize("method", [DyCoke, RandomTokens, FewerFrames])
@pytest.mark.parametrize(("frames", "tokens"), [(1, 9), (7, 9), (8, 36)])
@pytest.mark.parametrize("budget", [1, 20, 10**6, 0.001, 0.05, 0.31, 1.0])
def test_controls_keep_the_same_count(method, frames, tokens, budget) -> None:
    total = frames * tokens
    count = min(budget, total) if isinstance(budget, int) else max(1, int(budget * total + 1e-6))
    settings = method(token_budget=budget, prune_ratio=0)
    _, keep = settings.merge_tokens(clip(frames, tokens, 2), VideoContext(tokens=(total,), index=0))
    kept = int(keep.sum())
    if method is FewerFrames:
        assert set(keep.sum(1).tolist()) <= {0, tokens}
        assert kept == max(1, count // tokens) * tokens
    else:
        assert kept == count
    assert settings.idle == (budget == 1.0 and isinstance(budget, float))


@pytest.mark.parametrize("name", ["dycoke", "random", "once", "always"])
def test_a_retention_by_name_is_a_budget(name: str) -> None:
    for ratio in (0, 0.1, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99):
        method = methods.create(name, retention=1 - ratio)
        assert method is not None
        for frames, tokens in ((1, 1), (5, 2), (7, 9), (8, 36)):
            keep = method.merge_tokens(clip(frames, tokens, 3))[1]
            assert int(keep.sum()) == max(1, int((1.0 - ratio) * frames * tokens + 1e-6))


def test_bad_budgets_name_themselves() -> None:
    for value, error in (
        (0, ValueError),
        (-3, ValueError),
        (0.0, ValueError),
        (1.5, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ("9", TypeError),
    ):
        with pytest.raises(error, match=r"token_budget must be .* \(0, 1\] \(a share\)") as caught:
            DyCoke(token_budget=value)  # type: ignore[arg-type]
        assert repr(value) in str(caught.value)
    with pytest.raises(ValueError, match=r"merge_ratio=0\.5 and token_budget=100"):
        DyCoke(merge_ratio=0.5, token_budget=100)
    assert DyCoke(merge_ratio=0.7, token_budget=100) == DyCoke(token_budget=100)
    assert not DyCoke(token_budget=1.0).idle and not DyCoke(token_budget=1, prune_ratio=0).idle
    there = DyCoke.from_dict(DyCoke(token_budget=1.0).to_dict())
    assert isinstance(there.token_budget, float)
