"""FastVID, HoliTom and FlashVID against plain loops over tokens, and their exact counts."""

from __future__ import annotations

import dataclasses
from itertools import pairwise, product
from math import ceil, exp, sqrt
from typing import Any

import pytest
import torch
from support import close, exact

from dycoke.core.method import VideoContext
from dycoke.methods import create
from dycoke.methods.base import TwoStage
from dycoke.methods.clustering import distances, highest, peak_scores, segment_lengths
from dycoke.methods.fastvid import FastVID
from dycoke.methods.flashvid import FlashVID
from dycoke.methods.holitom import HoliTom, absorbed, still_for, still_segments

pytestmark = exact

METHODS = [FastVID, HoliTom, FlashVID]
SHAPES = [(1, 1), (1, 7), (5, 1), (2, 3), (6, 11), (9, 16), (13, 9)]
RATIOS = [0.02, 0.3, 0.5, 0.75, 0.9, 0.99]
SEGMENTS = [(8, 0.9), (3, 0.5), (1, -1.0)]  # as published; longer ones; all in one

Rows = list[list[float]]


def video(frames: int, tokens: int, seed: int) -> tuple[torch.Tensor, VideoContext]:
    """A video in which some places stand still for a while, some never, and scenes change."""
    rng = torch.Generator().manual_seed(seed)
    motion = torch.rand(tokens, 1, generator=rng) ** 2
    features = [torch.randn(tokens, 6, generator=rng)]
    for _ in range(1, frames):
        scene = float(torch.rand(1, generator=rng)) < 0.2
        step = torch.randn(tokens, 6, generator=rng)
        features.append(step if scene else features[-1] + motion * step)
    scores = torch.rand(frames, tokens, generator=rng)
    return torch.stack(features), VideoContext(
        scores, torch.randn(frames, tokens, 4, generator=rng)
    )


def rows(features: torch.Tensor) -> Any:
    return features.double().tolist()


# ---------------------------------------------------------------------------------------------
# The oracle: plain lists, double precision


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cos(a: list[float], b: list[float]) -> float:
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def far(a: list[float], b: list[float]) -> float:
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def mean(tokens: Rows) -> list[float]:
    return [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]


def mix(weight: float, a: list[float], b: list[float]) -> list[float]:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def best(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def naive_peaks(tokens: Rows, neighbours: int) -> list[float]:
    apart = [[far(a, b) for b in tokens] for a in tokens]
    density = [
        exp(-sum(d * d for d in near) / len(near))
        for near in (sorted(r)[:neighbours] for r in apart)
    ]
    most = max(max(row) for row in apart)
    scores = []
    for i in range(len(tokens)):
        denser = [
            apart[i][j]
            for j in range(len(tokens))
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        scores.append(density[i] * min(denser, default=most))
    return scores


def naive_segments(video: list[Rows], segments: int, threshold: float) -> list[int]:
    frames = [mean(frame) for frame in video]
    alike = [cos(a, b) for a, b in pairwise(frames)]
    lowest = sorted(range(len(alike)), key=lambda i: (alike[i], i))[: segments - 1]
    lengths, length = [], 0
    for i in range(len(video)):
        length += 1
        if i == len(alike) or i in lowest or alike[i] < threshold:
            lengths.append(length)
            length = 0
    return lengths


Kept = dict[tuple[int, int], list[float]]


def naive_fastvid(features: torch.Tensor, clip: VideoContext, method: FastVID) -> Kept:
    frames, scores = rows(features), rows(clip.scores)
    places = len(frames[0])
    count = max(1, int((1 - method.ratio) * places + 1e-6))
    context = int(0.4 * count + 1e-6)
    salient = [best(row, count - context) for row in scores]
    kept = {(f, n): frames[f][n] for f in range(len(frames)) for n in salient[f]}
    start = 0
    for length in naive_segments(frames, method.segments, method.threshold):
        inside = range(start, start + length)
        rest = {f: [n for n in range(places) if n not in salient[f]] for f in inside}
        pool = [frames[f][n] for f in inside for n in rest[f]]
        stride = 4
        while context and stride * context > places - (count - context):
            stride -= 1
        anchors = [f for f in inside if (start + length - 1 - f) % stride == 0]
        share = [context * length // len(anchors)] * len(anchors)
        for i in range(context * length - sum(share)):
            share[i] += 1
        for f, number in zip(anchors, share, strict=True):
            if number == 0:
                continue
            own = [frames[f][n] for n in rest[f]]
            centres = best(naive_peaks(own, 4), number)
            joins: list[Rows] = [[] for _ in centres]
            for token in pool:
                alike = [cos(token, own[c]) for c in centres]
                joins[alike.index(max(alike))].append(token)
            for c, joined in zip(centres, joins, strict=True):
                weight = max(0.6, 1 / (len(joined) + 1))
                kept[f, rest[f][c]] = mix(weight, own[c], mean(joined)) if joined else own[c]
        start += length
    return kept


def naive_cut(same: list[list[bool]], most: int) -> list[int]:
    """Of all cuts of a video the one that saves most, its last segments the shortest."""
    found: tuple[int, list[int]] | None = None
    for cuts in product([False, True], repeat=len(same)):
        lengths = [1]
        for cut in cuts:
            if cut:
                lengths.append(1)
            else:
                lengths[-1] += 1
        if max(lengths) > most:
            continue
        saved, start = 0, 0
        for length in lengths:
            steps = same[start : start + length - 1]
            still = (
                sum(all(step[n] for step in steps) for n in range(len(steps[0]))) if steps else 0
            )
            saved += still * (length - 1)
            start += length
        if found is None or (-saved, lengths[::-1]) < (-found[0], found[1][::-1]):
            found = (saved, lengths)
    assert found is not None
    return found[1]


def naive_holitom(features: torch.Tensor, clip: VideoContext, outer: float, tau: float) -> Kept:
    frames, scores = rows(features), rows(clip.scores)
    places = len(frames[0])
    same = [
        [cos(a, b) > tau for a, b in zip(frames[f], frames[f + 1], strict=True)]
        for f in range(len(frames) - 1)
    ]
    segments, start, reduced = [], 0, 0
    for length in naive_cut(same, 1024):
        steps = same[start : start + length - 1]
        still = [n for n in range(places) if length > 1 and all(step[n] for step in steps)]
        segments.append((start, length, still))
        reduced += len(still) * (length - 1)
        start += length
    total = len(frames) * places
    share = min(1, outer * total / (total - reduced))
    kept: Kept = {}
    for start, length, still in segments:
        moving = [n for n in range(places) if n not in still]
        for f in range(start, start + length):
            for i in best([scores[f][n] for n in moving], ceil(len(moving) * share - 1e-6)):
                kept[f, moving[i]] = frames[f][moving[i]]
        means = [mean([frames[f][n] for f in range(start, start + length)]) for n in still]
        count = max(round(len(still) * share), 0 if moving else 1)
        if count == 0:
            continue
        centres = best(naive_peaks(means, min(7, count)), count)
        joins: dict[int, Rows] = {c: [] for c in centres}
        for i, token in enumerate(means):
            if i not in joins:
                joins[min(centres, key=lambda c: (far(token, means[c]), c))].append(token)
        for c, joined in joins.items():
            kept[start, still[c]] = mix(0.6, means[c], mean(joined)) if joined else means[c]
    return kept


def naive_absorbed(states: Rows, keep: list[bool]) -> Rows:
    out = [list(state) for state in states]
    kept = [i for i, stays in enumerate(keep) if stays]
    for i, stays in enumerate(keep):
        if not stays:
            alike = [cos(states[i], states[j]) for j in kept]
            j = kept[alike.index(max(alike))]
            out[j] = [(a + b) / 2 for a, b in zip(out[j], states[i], strict=True)]
    return out


def naive_flashvid(
    features: torch.Tensor, clip: VideoContext, outer: float, method: FlashVID
) -> Kept:
    frames, scores = rows(features), rows(clip.scores)
    places = len(frames[0])
    count = ceil(places * outer - 1e-6)
    diverse = ceil(0.7 * count - 1e-6)
    kept: Kept = {}
    free: list[list[int]] = []
    for f, frame in enumerate(frames):
        apart = [
            [(1 - cos(a, b)) * s for b, s in zip(frame, scores[f], strict=True)] for a in frame
        ]
        # The weighted distance to itself is the smallest of its column.
        alone = [
            sorted(apart[i][j] for i in range(places))[min(1, places - 1)] for j in range(places)
        ]
        chosen = [alone.index(max(alone))]
        while len(chosen) < diverse:
            near = {j: min(apart[i][j] for i in chosen) for j in range(places) if j not in chosen}
            chosen.append(max(near, key=lambda j: (near[j], -j)))
        kept |= {(f, n): frame[n] for n in chosen}
        free.append([n for n in range(places) if n not in chosen])
    if diverse == count:
        return kept
    start = 0
    for length in naive_segments(frames, method.segments, method.cut):
        inside = range(start, start + length)
        links: dict[tuple[int, int], tuple[int, int]] = {}
        strength: dict[tuple[int, int], float] = {}
        for f in inside[1:]:
            for n in free[f]:
                alike = [cos(frames[f][n], frames[f - 1][m]) for m in free[f - 1]]
                if max(alike) > 0.8:
                    links[f, n] = (f - 1, free[f - 1][alike.index(max(alike))])
                    strength[f, n] = max(alike)
        spare = sum(len(free[f]) for f in inside) - (count - diverse) * length
        for key in sorted(links, key=lambda key: (-strength[key], key))[spare:]:
            del links[key]
        members: dict[tuple[int, int], Rows] = {}
        for f in inside:
            for n in free[f]:
                root = (f, n)
                while root in links:
                    root = links[root]
                members.setdefault(root, []).append(frames[f][n])
        roots = {f: [n for n in free[f] if (f, n) in members] for f in inside}
        budget, whole = (count - diverse) * length, sum(len(r) for r in roots.values())
        share = {f: budget * len(roots[f]) // whole for f in inside}
        order = sorted(inside, key=lambda f: (-(budget * len(roots[f]) % whole), f))
        for f in order[: budget - sum(share.values())]:
            share[f] += 1
        for f in inside:
            tokens = [mean(members[f, n]) for n in roots[f]]
            if share[f] == 0:
                continue
            centres = best(naive_peaks(tokens, min(7, share[f])), share[f])
            groups: dict[int, Rows] = {c: [] for c in centres}
            for i, token in enumerate(tokens):
                own = i if i in groups else min(centres, key=lambda c: (far(token, tokens[c]), c))
                groups[own].append(token)
            for c, group in groups.items():
                kept[f, roots[f][c]] = mean(group)
        start += length
    return kept


# ---------------------------------------------------------------------------------------------


def equals(features: torch.Tensor, out: torch.Tensor, keep: torch.Tensor, kept: Kept) -> None:
    assert {tuple(place) for place in keep.nonzero().tolist()} == set(kept)
    for (f, n), token in kept.items():
        close(out[f, n], torch.tensor(token))
    assert torch.equal(out[~keep], features[~keep])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fastvid_equals_plain_loops(shape: tuple[int, int], ratio: float) -> None:
    for seed, settings in enumerate(SEGMENTS):
        features, clip = video(*shape, seed)
        method = FastVID(ratio, segments=settings[0], threshold=settings[1])
        out, keep = method.merge_tokens(features, clip)
        equals(features, out, keep, naive_fastvid(features, clip, method))
        count = max(1, int((1 - ratio) * shape[1] + 1e-6))
        assert int(keep.sum()) == shape[0] * count


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_holitom_equals_plain_loops(shape: tuple[int, int], ratio: float) -> None:
    for seed in range(3):
        features, clip = video(*shape, seed)
        method = HoliTom(ratio)
        outer = min(1, (1 - ratio) / (18 / 28 + 10 / 28 / 2))
        tau = 0.65 if outer < 0.125 else 0.8
        out, keep = method.merge_tokens(features, clip)
        equals(features, out, keep, naive_holitom(features, clip, outer, tau))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flashvid_equals_plain_loops(shape: tuple[int, int], ratio: float) -> None:
    for seed, settings in enumerate(SEGMENTS):
        features, clip = video(*shape, seed)
        outer = min(1, 1.25 * (1 - ratio))
        method = FlashVID(ratio, segments=settings[0], cut=settings[1])
        out, keep = method.merge_tokens(features, clip)
        equals(features, out, keep, naive_flashvid(features, clip, outer, method))
        assert int(keep.sum()) == shape[0] * ceil(shape[1] * outer - 1e-6)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("frames", "tokens"), [(1, 3), (2, 1), (5, 2), (8, 3), (9, 5)])
def test_the_segments_of_holitom_are_the_best_of_all(frames: int, tokens: int, most: int) -> None:
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        # One dimension: a token resembles its successor, or is its opposite. Many cuts are equal.
        moves = torch.rand(frames - 1, tokens, generator=rng) < 0.3
        sign = torch.cat([torch.ones(1, tokens), torch.where(moves, -1.0, 1.0).cumprod(0)])
        lengths = still_segments(still_for(sign[..., None], 0.5), most)
        assert lengths == naive_cut((~moves).tolist(), most)


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (2, 1), (7, 3), (7, 7), (40, 1), (41, 20)])
def test_states_are_absorbed_one_after_another(tokens: int, count: int) -> None:
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        states = torch.randn(tokens, 5, generator=rng)
        keep = torch.zeros(tokens, dtype=torch.bool)
        keep[torch.randperm(tokens, generator=rng)[:count]] = True
        expected = torch.tensor(naive_absorbed(rows(states), keep.tolist()))
        close(absorbed(states, keep), expected)


def test_very_many_states_go_into_one() -> None:
    """300 halvings leave nothing of the first ones, and no NaN."""
    states = torch.randn(301, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(301) == 7
    expected = torch.tensor(naive_absorbed(rows(states), keep.tolist()))
    close(absorbed(states, keep), expected)


def test_holitom_drops_the_least_attended_half_and_keeps_what_it_said() -> None:
    for tokens in (1, 2, 5, 12, 33):
        rng = torch.Generator().manual_seed(tokens)
        scores = torch.rand(tokens, generator=rng)
        states = torch.randn(tokens, 5, generator=rng)
        out, keep = HoliTom(0.75).drop_tokens(scores, states, 18 / 28)
        chosen = best(scores.tolist(), max(1, round(tokens / 2)))
        assert keep.nonzero().flatten().tolist() == chosen
        expected = torch.tensor(naive_absorbed(rows(states), keep.tolist()))
        close(out[keep], expected[keep])
        out, keep = FlashVID(0.75).drop_tokens(scores, states, 20 / 28)
        assert keep.nonzero().flatten().tolist() == best(
            scores.tolist(), max(1, round(0.3 * tokens))
        )
        assert torch.equal(out, states)


@pytest.mark.parametrize("ratio", [0.0, *RATIOS])
@pytest.mark.parametrize("layers", [2, 5, 24, 28, 80])
@pytest.mark.parametrize("method", [HoliTom, FlashVID])
def test_layers_hold_the_asked_share_on_average(
    method: type[TwoStage], layers: int, ratio: float
) -> None:
    tokens, frames = 40, 6
    features = torch.randn(frames, tokens, 64, generator=torch.Generator().manual_seed(0))
    clip = VideoContext(features[..., 0], features)
    made = method(ratio)
    layer = made.drop_layer(layers)
    assert layer is not None and 0 < layer < layers
    out, keep = made.merge_tokens(features, clip)
    states = out[keep]
    later = made.drop_tokens(states[:, 0], states, layer / layers)[1]
    held = (layer * len(states) + (layers - layer) * int(later.sum())) / layers
    assert later.any()
    assert abs(held - (1 - ratio) * frames * tokens) <= frames


def test_the_inner_stage_can_be_left_out() -> None:
    features, clip = video(8, 20, 0)
    for method in (HoliTom, FlashVID):
        made = method(0.75, inner=False)
        assert made.drop_layer(28) is None
        assert made.outer == 0.25
        assert abs(int(made.merge_tokens(features, clip)[1].sum()) - 8 * 5) <= 8
        assert method().drop_layer(1) is None
    features = torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(0))
    keep = HoliTom(0.75, inner=False).merge_tokens(
        features, VideoContext(features[..., 0], features)
    )[1]
    assert keep.sum(1).tolist() == [100, 100]
    assert HoliTom().drop_layer(28) == 18
    assert FlashVID().drop_layer(28) == 20
    # Published before the LLM: 25 and 10 %.
    assert HoliTom(1 - 0.25 * 23 / 28).outer == pytest.approx(0.25)
    assert FlashVID(0.9).outer == pytest.approx(0.125)


def test_holitom_may_save_more_than_is_asked() -> None:
    """A still picture: one of its frames is all there is."""
    features = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(0)).repeat(7, 1, 1)
    clip = VideoContext(torch.rand(7, 9), features)
    out, keep = HoliTom(0.5).merge_tokens(features, clip)
    assert keep.nonzero().tolist() == [[0, n] for n in range(9)]
    close(out, features)
    out, keep = HoliTom(0.99).merge_tokens(features, clip)
    assert keep.sum() == 1


@pytest.mark.parametrize("method", METHODS)
def test_equal_tokens_leave_the_first(method: Any) -> None:
    """All is equal: every tie goes to the lowest index, on the short way of clustering, too."""
    features = torch.ones(2, 50, 4)
    out, keep = method(0.5).merge_tokens(features, VideoContext(torch.ones(2, 50), features))
    for row in keep:
        assert row.tolist() == sorted(row.tolist(), reverse=True)
    close(out, features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_float32_and_handed_back_as_it_came(method: Any, dtype: torch.dtype) -> None:
    features, clip = video(9, 12, 3)
    features = features.to(dtype)
    before = features.clone()
    out, keep = method(0.6).merge_tokens(features, clip)
    single, kept = method(0.6).merge_tokens(features.float(), clip)
    assert torch.equal(keep, kept) and out.dtype == dtype
    assert torch.equal(out, single.to(dtype))
    assert torch.equal(features, before)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_is_idle(method: Any) -> None:
    features, clip = video(4, 5, 0)
    assert method(0).idle and not method(0.1).idle
    out, keep = method(0).merge_tokens(features, clip)
    assert out is features and keep.all()


def test_clustering_by_hand() -> None:
    # Three together, one aside, one far off: two centres are one of the three, and the far one.
    tokens = torch.tensor([[0.0], [0.1], [0.25], [1.0], [5.0]])
    apart = distances(tokens)
    close(apart, (tokens - tokens.T).abs())
    assert (apart.diagonal() == 0).all()
    assert highest(peak_scores(apart, 2), 1).tolist() == [0]
    assert highest(peak_scores(apart[:4, :4], 2), 2).tolist() == [0, 3]
    # Frames 0, 1 | 2, 3 | 4: two changes below the threshold.
    frames = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]])[:, None]
    assert segment_lengths(frames, 1, 0.9) == [2, 2, 1]
    assert segment_lengths(frames, 1, -1.0) == [5]
    assert segment_lengths(frames, 2, -1.0) == [4, 1]
    assert segment_lengths(frames, 99, 0.0) == [1] * 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("features", "clip", "word"),
    [
        (torch.randn(2, 3, 4), VideoContext(), "vision encoder's scores"),
        (
            torch.randn(2, 3, 4),
            VideoContext(torch.rand(3, 2), torch.rand(2, 3, 4)),
            "context.scores",
        ),
        (
            torch.full((2, 3, 4), torch.nan),
            VideoContext(torch.rand(2, 3), torch.rand(2, 3, 4)),
            "NaN",
        ),
        (
            torch.full((2, 3, 4), torch.inf),
            VideoContext(torch.rand(2, 3), torch.rand(2, 3, 4)),
            "infinite",
        ),
    ],
)
def test_bad_input_is_refused(
    method: Any, features: torch.Tensor, clip: VideoContext, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        method().merge_tokens(features, clip)


BAD = {
    "ratio": 1.0,
    "positions": "new",
    "threshold": 1.5,
    "neighbours": 0,
    "segments": 0,
    "max_segment": 0,
    "stride": 0,
    "context": -0.1,
    "diverse": 1.1,
    "cut": -2,
    "centre_weight": 2,
    "inner": 1,
    "echo": 1.5,
    "echo_exact": -1,
}


@pytest.mark.parametrize(
    ("method", "setting"),
    [(m, field.name) for m in METHODS for field in dataclasses.fields(m)],  # type: ignore[arg-type]
)
def test_bad_settings_are_refused_by_name(method: Any, setting: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{setting} must be"):
        method(**{setting: BAD[setting]})


@pytest.mark.parametrize(
    "method",
    [
        FastVID(0.6, segments=3, threshold=0.5, context=0.2, stride=2, neighbours=3),
        HoliTom(0.6, "compact", inner=False, threshold=0.7, max_segment=16, centre_weight=0.5),
        FlashVID(0.6, segments=3, cut=0.5, diverse=0.4, threshold=0.6, neighbours=3),
    ],
)
def test_settings_there_and_back(method: Any) -> None:
    assert type(method).from_dict(method.to_dict()) == method
    assert type(method).from_dict({}) == type(method)()
    with pytest.raises(ValueError, match="has no setting 'tau'"):
        type(method).from_dict({"tau": 0.9})


@pytest.mark.parametrize(
    ("name", "method"), [("fastvid", FastVID), ("holitom", HoliTom), ("flashvid", FlashVID)]
)
def test_by_name(name: str, method: Any) -> None:
    assert create(name) == method(0.75)
    assert create(name, retention=0.1) == method(0.9)
    assert method.needs_vision
