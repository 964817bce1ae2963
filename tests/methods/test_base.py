"""What the bases take care of for a new method, and the table of the methods."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import compressed, exact, inputs_of, model_of

from dycoke import DyCoke, methods
from dycoke.core.method import VideoContext
from dycoke.methods import METHODS, Composed, Entry, FastV, HoliTom, ScoreBased, VisionZip, registry

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 10), (8, 36)]


@dataclass(frozen=True)
class Norm(ScoreBased):
    """The longest tokens; ``power`` is a setting of its own."""

    power: float = 1.0

    def score(self, features: torch.Tensor, video: VideoContext) -> torch.Tensor:
        assert features.dtype in (torch.float32, torch.float64)
        return features.norm(dim=-1) ** self.power


@dataclass(frozen=True)
class Attended(ScoreBased):
    needs_vision = True

    def score(self, features: torch.Tensor, video: VideoContext) -> torch.Tensor:
        scores, keys = video.encoder_attention
        assert scores.dtype == keys.dtype == features.dtype
        return scores


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def clip(frames: int, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(frames * tokens)
    return torch.randint(-2, 3, (frames, tokens, 2), generator=rng).to(dtype)  # many ties


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1e-9, 0.3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_highest_scores_of_a_video_stay(
    shape: tuple[int, int], ratio: float, dtype: torch.dtype
) -> None:
    features = clip(*shape, dtype)
    scores = features.to(torch.promote_types(dtype, torch.float32)).norm(dim=-1).flatten()
    same, keep = Norm(ratio).merge_tokens(features)
    assert same is features and keep.shape == shape and keep.dtype == torch.bool
    count = max(1, int((1 - ratio) * scores.numel() + 1e-6))
    assert keep.flatten().nonzero().flatten().tolist() == best(scores.tolist(), count)


def test_float64_stays_and_its_last_digits_decide() -> None:
    features = torch.ones(1, 3, 1, dtype=torch.float64)
    features[0, 1] += 1e-12
    assert Norm(0.6).merge_tokens(features)[1].tolist() == [[False, True, False]]
    assert Norm(0.6).merge_tokens(features.float())[1].tolist() == [[True, False, False]]
    scores = torch.rand(1, 3)  # the encoder's may be of another dtype
    kept = Attended(0.6).merge_tokens(features, VideoContext(scores, torch.rand(1, 3, 2)))[1]
    assert kept.flatten().nonzero().item() == scores.argmax()


def test_bad_features_and_bad_scores_are_refused() -> None:
    features = clip(2, 3)
    with pytest.raises(ValueError, match="features contain NaN"):
        Norm().merge_tokens(features / 0)
    with pytest.raises(TypeError, match="int64"):
        Norm().merge_tokens(features.long())
    with pytest.raises(ValueError, match=r"\(F, N, D\)"):
        Norm().merge_tokens(features[0])
    with pytest.raises(ValueError, match=r"Norm\.score gives NaN"):
        Norm(power=float("nan")).merge_tokens(features)

    class Whole(Norm):
        def score(self, features: torch.Tensor, video: VideoContext) -> torch.Tensor:
            return features

    with pytest.raises(ValueError, match=r"of shape \(2, 3\), got \(2, 3, 2\)"):
        Whole().merge_tokens(features)
    with pytest.raises(ValueError, match=r"scores of the video's 2 x 3 tokens"):
        Attended().merge_tokens(features)
    with pytest.raises(ValueError, match="needs_vision = True"):
        VideoContext().encoder_attention  # noqa: B018


def test_ratio_zero_is_idle_and_looks_at_nothing() -> None:
    features = clip(2, 3) / 0
    same, keep = Norm(0).merge_tokens(features)
    assert Norm(0).idle and same is features and keep.all()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", table := dict(METHODS))
    monkeypatch.setattr(methods, "METHODS", table)
    methods.register(Entry("norm", "the longest tokens", Norm, {"power": 2.0}))


@exact
@pytest.mark.usefixtures("registered")
def test_a_new_method_by_its_name() -> None:
    method = methods.create("norm", retention=0.1)
    assert method == Norm(0.9, power=2.0) and methods.create("norm") == Norm(power=2.0)
    assert methods.METHODS["norm"].where == ["before"] and not method.drops
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[8]], [(5, 7)])
    _, run = compressed(model, method, inputs, tokens=3)
    (row,) = run.report.samples
    assert run.report.method == "Norm" and run.report.settings == method.to_dict()
    assert row.kept_tokens == row.active_tokens == int(0.1 * row.visual_tokens + 1e-6)
    composed = methods.create("norm+once", retention=0.5)
    assert isinstance(composed, Composed) and composed.before == Norm(0.5, power=2.0)
    assert Composed.from_dict(json.loads(json.dumps(composed.to_dict()))) == composed
    with pytest.raises(ValueError, match="'norm' already"):
        methods.register(Entry("norm", "", Norm))
    with pytest.raises(ValueError, match=r"'a\+b' is no name"):
        methods.register(Entry("a+b", "", Norm))


def test_a_method_that_is_not_registered_can_be_written_but_not_read() -> None:
    there = Composed(Norm(0.5)).to_dict()
    assert there["before"] == {"method": "Norm", **Norm(0.5).to_dict()}
    with pytest.raises(
        ValueError, match=r"unknown method 'Norm'; there are dycoke, dycoke\+, random"
    ):
        Composed.from_dict(there)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("retention", [None, 0.3, 1.0])
def test_settings_with_their_name_there_and_back(name: str, retention: float | None) -> None:
    method = methods.create(name, retention=retention)
    there = json.loads(json.dumps(methods.to_dict(method)))
    assert METHODS[there["method"]].kind is type(method)
    assert methods.from_dict(there) == method
    assert methods.from_dict({"method": name}) == methods.create(name)
    if retention is not None:
        again = type(method).at_retention(retention, **METHODS[name].settings)
        assert again == method


def test_every_method_of_a_paper_names_it_in_its_file_too() -> None:
    named = [entry for entry in METHODS.values() if entry.paper]
    assert {entry.kind for entry in named} == {
        entry.kind for entry in METHODS.values() if not entry.about.startswith("control")
    } - {None}
    for entry in named:
        text = sys.modules[entry.kind.__module__].__doc__
        assert entry.paper in text and entry.source in text
        assert entry.paper.startswith("https://arxiv.org/abs/") and entry.source


@pytest.mark.parametrize("retention", [0, 0.0, -0.5, 1.5, float("nan"), True, "0.5"])
def test_retention_is_a_share(retention: Any) -> None:
    for name in ("full", "dycoke", "visionzip"):
        with pytest.raises((ValueError, TypeError), match=r"retention must be .*\(0, 1\]"):
            methods.create(name, retention=retention)
    with pytest.raises(TypeError, match="positional"):
        methods.create("dycoke", 0.5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="Composed has no setting for a retention"):
        Composed.at_retention(0.5)


def test_what_drops_says_so_by_its_settings() -> None:
    assert FastV().drops and HoliTom().drops and not HoliTom(inner=False).drops
    assert not DyCoke().drops and not VisionZip().drops
    assert Composed(HoliTom(inner=False)).before.drop_layer(28) is None


def test_a_setting_of_no_dataclass_is_not_lost_silently() -> None:
    class Plain(Norm):
        more: int = 3

    with pytest.raises(TypeError, match=r"Plain must be declared with @dataclass\(frozen=True\)"):
        Plain().to_dict()
    with pytest.raises(TypeError, match="after must be a DyCoke"):
        Composed(VisionZip(), VisionZip())  # type: ignore[arg-type]
