"""FastV, LLaVA-PruMerge, VisionZip and VidCom2 against plain loops, and their exact counts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from support import close, exact

from dycoke.core.method import VideoContext
from dycoke.methods import create
from dycoke.methods.fastv import FastV, later_count
from dycoke.methods.prumerge import LLaVAPruMerge
from dycoke.methods.vidcom2 import VidCom2, frame_counts
from dycoke.methods.visionzip import VisionZip, frame_count

pytestmark = exact

Vector = list[float]
Frame = list[Vector]

MERGING = (LLaVAPruMerge, VisionZip, VidCom2)
METHODS = (FastV, *MERGING)
# Frames, tokens, channels: odd sizes, one frame, one token, both at once, the usual ones.
SHAPES = [(3, 7, 5), (1, 12, 4), (5, 1, 3), (1, 1, 1), (2, 36, 6), (7, 15, 9), (1, 196, 4)]
RATIOS = [1e-9, 0.1, 0.5, 0.75, 0.9, 0.99]


def video(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, VideoContext]:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=g).to(dtype)
    scores = torch.rand(shape[:2], generator=g) ** 4  # a few tokens get most of it
    return features, VideoContext(scores, torch.randn(*shape[:2], 5, generator=g))


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def add(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def mean(vectors: list[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def best(values: Vector, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


# What each frame keeps: place -> new token.


def naive_prumerge(tokens: Frame, scores: Vector, keys: Frame, ratio: float) -> dict[int, Vector]:
    count = max(1, int((1 - ratio) * len(tokens) + 1e-6))
    order = best(scores, count)
    share = [score / sum(scores) for score in scores]
    result = {}
    for i in order[: count - 1]:
        others = [n for n in range(len(tokens)) if n != i]
        others.sort(key=lambda n: (-cosine(keys[i], keys[n]), n))
        result[i] = tokens[i]
        for n in others[:32]:
            result[i] = add(result[i], tokens[n], share[n])
    rest = [0.0] * len(tokens[0])
    for n in range(len(tokens)):
        if n not in order[: count - 1]:
            rest = add(rest, tokens[n], share[n])
    result[order[-1]] = rest
    return result


def naive_visionzip(tokens: Frame, scores: Vector, keys: Frame, ratio: float) -> dict[int, Vector]:
    count = {0.75: 50, 0.9: 20}.get(ratio) if len(tokens) == 196 else None
    count = count or max(1, round((1 - ratio) * len(tokens)))
    dominant = best(scores, int(count * 54 / 64))
    rest = [n for n in range(len(tokens)) if n not in dominant]
    contextual = count - len(dominant)
    targets = rest[:: len(rest) // contextual][:contextual]
    joined: dict[int, list[Vector]] = {target: [] for target in targets}
    for n in rest:
        if n not in targets:
            target = max(targets, key=lambda t: (cosine(keys[n], keys[t]), -t))
            joined[target].append(tokens[n])
    result = {n: tokens[n] for n in dominant}
    for target, others in joined.items():
        result[target] = add(tokens[target], mean(others)) if others else tokens[target]
    return result


def naive_vidcom2(frames: list[Frame], ratio: float) -> list[dict[int, Vector]]:
    number, size = len(frames), len(frames[0])
    everything = [token for frame in frames for token in frame]
    centre = mean(everything)
    variance = [
        sum((token[c] - centre[c]) ** 2 for token in everything) for c in range(len(centre))
    ]
    channels = sorted(range(len(centre)), key=lambda c: (variance[c], c))
    channels = channels[: max(1, len(centre) // 2)]
    units = []
    for frame in frames:
        part = [[token[c] for c in channels] for token in frame]
        units.append([[x / math.sqrt(dot(t, t)) for x in t] for t in part])

    def g(token: Vector, middle: Vector) -> float:
        away = add(token, middle, -1)
        return sum(math.exp(-dot(away, away) / (2 * 2**k)) for k in (-3, -2, -1, 0, 1))

    middle = mean([token for frame in units for token in frame])
    to_video = [[g(token, middle) for token in frame] for frame in units]
    level = [-sum(row) / size / 0.01 for row in to_video]
    powers = [math.exp(x - max(level)) for x in level]
    result = []
    for f in range(number):
        scale = (1 - ratio) * (1 + powers[f] / sum(powers) - 1 / number)
        count = min(1.0, scale) * size
        # At a half, float32 may round either way; the cases are clear of it.
        assert count < 1 or abs(count % 1 - 0.5) > 1e-3
        near = mean(units[f])
        likeness = [to_video[f][n] + g(units[f][n], near) for n in range(size)]
        chosen = best([-x for x in likeness], max(1, round(count)))
        result.append({n: frames[f][n] for n in chosen})
    return result


def naive(method: type, features: torch.Tensor, clip: VideoContext, ratio: float) -> list[Any]:
    frames = features.double().tolist()
    if method is VidCom2:
        return naive_vidcom2(frames, ratio)
    assert clip.scores is not None and clip.keys is not None
    one = naive_prumerge if method is LLaVAPruMerge else naive_visionzip
    scores, keys = clip.scores.double().tolist(), clip.keys.double().tolist()
    return [one(*frame, ratio) for frame in zip(frames, scores, keys, strict=True)]


def check(method: type, features: torch.Tensor, clip: VideoContext, ratio: float) -> None:
    before = features.clone()
    merged, keep = method(ratio).merge_tokens(features, clip)
    assert torch.equal(features, before)  # nothing is written into what was handed over
    assert merged.shape == features.shape and merged.dtype == features.dtype
    assert keep.shape == features.shape[:2] and keep.dtype == torch.bool
    expected = naive(method, features, clip, ratio)
    assert [row.nonzero()[:, 0].tolist() for row in keep] == [sorted(frame) for frame in expected]
    for f, frame in enumerate(expected):
        for n, token in frame.items():
            close(merged[f, n], torch.tensor(token))


@pytest.mark.parametrize("method", MERGING, ids=lambda m: m.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_equals_a_plain_loop(method: type, shape: tuple[int, int, int], ratio: float) -> None:
    if method is VidCom2:
        ratio *= 0.97
    for seed in (0, 3) if shape[1] < 196 else (0,):
        check(method, *video(shape, seed), ratio)


@pytest.mark.parametrize("method", MERGING, ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(method: type, dtype: torch.dtype) -> None:
    check(method, *video((3, 20, 8), 5, dtype), 0.6)


@pytest.mark.parametrize("tokens", [1, 2, 9, 36, 169, 196])
@pytest.mark.parametrize("ratio", [1e-9, 0.3, 0.5, 0.75, 0.9, 0.99])
def test_counts(tokens: int, ratio: float) -> None:
    features, clip = video((4, tokens, 6), 1)
    asked = (1 - ratio) * tokens
    counts = {m: m(ratio).merge_tokens(features, clip)[1].sum(1).tolist() for m in MERGING}
    assert counts[LLaVAPruMerge] == [max(1, int(asked + 1e-6))] * 4
    assert counts[VisionZip] == [frame_count(tokens, ratio)] * 4
    assert abs(counts[VisionZip][0] - max(1, asked)) <= 1
    # Frames differ, and the sum is the budget, rounded per frame, unless frames are full.
    assert all(1 <= count <= tokens for count in counts[VidCom2])
    assert sum(counts[VidCom2]) <= max(4, 4 * asked + 2)
    if ratio >= 0.5:  # below, a frame may be full
        assert sum(counts[VidCom2]) >= 4 * asked - 2


def test_the_published_counts() -> None:
    features, clip = video((2, 196, 6), 2)
    for ratio, ours, theirs in ((0.75, 49, 50), (0.9, 19, 20)):
        assert LLaVAPruMerge(ratio).merge_tokens(features, clip)[1].sum(1).tolist() == [ours] * 2
        assert VisionZip(ratio).merge_tokens(features, clip)[1].sum(1).tolist() == [theirs] * 2


def test_vidcom2_gives_more_to_a_frame_of_its_own() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.arange(1.0, 9.0) + 0.05 * torch.randn(5, 40, 8, generator=g)
    features[3] = features[3].flip(1)
    # 10 each: with nothing else to go by, all but one have 10 (1 - 1/5), the odd one 10 more.
    assert VidCom2(0.75).merge_tokens(features)[1].sum(1).tolist() == [8, 8, 8, 18, 8]
    same = features[:1].expand(5, 40, 8)
    assert VidCom2(0.75).merge_tokens(same)[1].sum(1).tolist() == [10] * 5
    # A frame of its own would get .8 (1 + 1 - 1/2) of 10, and has no more than 10.
    assert frame_counts(torch.tensor([[1.0] * 10, [2.0] * 10]), 0.8).tolist() == [10, 4]


@pytest.mark.parametrize("method", MERGING, ids=lambda m: m.__name__)
def test_ties_go_to_the_lowest_raster_index(method: type) -> None:
    same = torch.ones(2, 10, 4)
    merged, keep = method(0.5).merge_tokens(
        same, VideoContext(torch.ones(2, 10), torch.ones(2, 10, 3))
    )
    # VisionZip: 4 dominant ones, and the first of the rest for all of it.
    assert keep.tolist() == [[True] * 5 + [False] * 5] * 2
    values: dict[type, Vector] = {VidCom2: [1.0] * 5, VisionZip: [1.0] * 4 + [2.0]}
    value = values.get(method, [1.9] * 4 + [0.6])
    close(merged[1, :5, 0], torch.tensor(value))


def test_ties_among_keys_go_to_the_lowest_raster_index() -> None:
    tokens = 40
    features, clip = video((1, tokens, 3), 4)
    assert clip.scores is not None
    same = VideoContext(clip.scores, torch.ones(1, tokens, 3))
    for method in (LLaVAPruMerge, VisionZip):
        check(method, features, same, 0.5)


def test_prumerge_does_not_mind_how_scores_are_scaled() -> None:
    features, clip = video((2, 9, 3), 6)
    assert clip.scores is not None
    smaller = VideoContext(clip.scores / 64, clip.keys)
    one, other = (LLaVAPruMerge(0.5).merge_tokens(features, c) for c in (clip, smaller))
    close(one[0], other[0])
    assert torch.equal(one[1], other[1])
    nothing = VideoContext(torch.zeros(2, 9), clip.keys)
    merged, keep = LLaVAPruMerge(0.5).merge_tokens(features, nothing)
    assert torch.isfinite(merged).all() and keep.sum(1).tolist() == [4, 4]


# FastV


@pytest.mark.parametrize("tokens", [1, 2, 9, 36, 6272])
@pytest.mark.parametrize("layers", [2, 5, 12, 28, 80])
@pytest.mark.parametrize("ratio", RATIOS)
def test_fastv_holds_its_budget_in_the_mean_over_layers(
    tokens: int, layers: int, ratio: float
) -> None:
    method = FastV(ratio)
    first = method.drop_layer(layers)
    assert first == max(1, round(2 * layers / 28))
    scores = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    states = torch.randn(tokens, 3)
    after, keep = method.drop_tokens(scores, states, first / layers)
    assert after is states and keep.dtype == torch.bool
    later = int(keep.sum())
    assert keep.nonzero()[:, 0].tolist() == sorted(best(scores.tolist(), later))
    held = (first * tokens + (layers - first) * later) / layers
    asked = (1 - ratio) * tokens
    if later > 1:  # rounded down, by less than a token in each later layer
        assert asked - (layers - first) / layers - 1e-3 < held <= asked + 1e-3
    else:  # out of reach, or a budget of about one token
        assert first / layers >= 1 - ratio or asked < first / layers * tokens + 2


def test_fastv_at_28_layers() -> None:
    assert later_count(6272, 0.75, 2 / 28) == 1206  # 19.2 %
    assert later_count(6272, 0.9, 2 / 28) == 192  # 3.1 %
    assert later_count(6272, 0.5, 0.5) == later_count(6272, 0.5, 0.9) == 1
    assert later_count(10, 0.9, 0.0) == 1 and later_count(100, 0.9, 0.0) == 10
    assert later_count(0, 0.75, 0.1) == 0


def test_fastv_breaks_ties_low_and_takes_none_of_nothing() -> None:
    _, keep = FastV(0.5).drop_tokens(torch.ones(8), torch.zeros(8, 2), 0.0)
    assert keep.tolist() == [True] * 4 + [False] * 4
    assert FastV().drop_tokens(torch.ones(0), torch.zeros(0, 2), 0.1)[1].shape == (0,)
    features = torch.randn(2, 3, 4)
    same, keep = FastV().merge_tokens(features)  # nothing before the LLM
    assert same is features and keep.all()


# Settings


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_settings(method: Any) -> None:
    assert method() == method(0.75, "original")
    for ratio, error in ((1.0, ValueError), (-0.1, ValueError), ("a", TypeError)):
        with pytest.raises(error, match=r"ratio must be .*\[0, 1\)"):
            method(ratio)
    with pytest.raises(ValueError, match=r"positions must be one of 'original'.*, got 'new'"):
        method(positions="new")
    settings = method(0.4)
    there = json.loads(json.dumps(settings.to_dict()))
    assert there == {"ratio": 0.4, "positions": "original", "echo": 0.0, "echo_exact": 0}
    assert method.from_dict(there) == settings
    known = "echo, echo_exact, positions, ratio"
    with pytest.raises(ValueError, match=f"no setting 'K'; it has {known}"):
        method.from_dict({"K": 2})


def test_fastv_has_no_compact_positions() -> None:
    with pytest.raises(ValueError, match="'compact'"):
        FastV(positions="compact")
    assert VidCom2(positions="compact").positions == "compact"


@pytest.mark.parametrize(
    ("name", "method"),
    [("fastv", FastV), ("prumerge", LLaVAPruMerge), ("visionzip", VisionZip), ("vidcom2", VidCom2)],
)
def test_by_name(name: str, method: type) -> None:
    assert create(name) == method(0.75)
    assert create(name, retention=0.1) == method(0.9)
    assert method.needs_vision == (method in (LLaVAPruMerge, VisionZip))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_ratio_zero_is_idle(method: type) -> None:
    settings = method(0)
    assert settings.idle and not method(0.1).idle
    features, clip = video((3, 6, 4), 0)
    merged, keep = settings.merge_tokens(features, clip)
    assert merged is features and keep.all()
    states = features.flatten(0, 1)
    after, keep = settings.drop_tokens(torch.rand(18), states, 0.25)
    assert after is states and keep.all()


# Bad input


@pytest.mark.parametrize("method", MERGING, ids=lambda m: m.__name__)
def test_bad_features_are_refused(method: type) -> None:
    features, clip = video((3, 6, 4), 0)
    for bad in (float("nan"), float("inf")):
        broken = features.clone()
        broken[2, 5, 3] = bad
        with pytest.raises(ValueError, match="features contain NaN or infinite values"):
            method().merge_tokens(broken, clip)
    with pytest.raises(ValueError, match=r"\(F, N, D\)"):
        method().merge_tokens(features[0], clip)
    with pytest.raises(TypeError, match="int64"):
        method().merge_tokens(features.long(), clip)


@pytest.mark.parametrize("method", [LLaVAPruMerge, VisionZip], ids=lambda m: m.__name__)
def test_a_clip_without_scores_or_keys_is_refused(method: type) -> None:
    features, clip = video((3, 6, 4), 0)
    scores, keys = clip.scores, clip.keys
    assert scores is not None and keys is not None
    for bad, message in (
        (VideoContext(), "vision encoder's scores of the video's 3 x 6 tokens"),
        (VideoContext(scores), "vision encoder's keys"),
        (
            VideoContext(scores[:, :5], keys),
            r"context.scores must have 2 .* \(3, 6\), got \(3, 5\)",
        ),
        (VideoContext(scores, keys[..., 0]), r"context.keys must have 3 .* got \(3, 6\)"),
        (VideoContext(scores / 0, keys), "context.scores contain NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            method().merge_tokens(features, bad)
