"""Settings: immutable, validated, reusable, and their way through dictionaries."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from support import compressed, generate, inputs_of, model_of

import dycoke
from dycoke import DyCoke, Report


def test_defaults_and_order_of_the_public_interface() -> None:
    names = [f.name for f in dataclasses.fields(DyCoke) if not f.kw_only]
    assert list(DyCoke().to_dict()) == [*names, "echo", "echo_exact"]
    assert names == [
        "merge_ratio",
        "prune_ratio",
        "prune_layer",
        "window",
        "refresh_threshold",
        "merge",
        "positions",
        "token_budget",
        "score_layer",
        "skip_ratio",
        "skip_layer",
    ]
    paper = DyCoke(
        0.7, 0.7, 3, 4, 0.9, "keep", "original", None, None, 0, None, echo=0, echo_exact=0
    )
    assert DyCoke() == paper


def test_immutable_and_hashable() -> None:
    settings = DyCoke()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.merge_ratio = 0.5  # type: ignore[misc]
    assert {settings: 1}[DyCoke()] == 1
    assert copy.deepcopy(settings) == pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    "settings",
    [
        DyCoke(),
        DyCoke(0, 0.3, 7, 6, 0, "mean", "compact"),
        DyCoke(np.float32(0.5), np.float64(0.1)),  # type: ignore[arg-type]
        DyCoke(token_budget=1),
        DyCoke(token_budget=1.0),
        DyCoke(token_budget=np.int64(300)),  # type: ignore[arg-type]
    ],
)
def test_dictionaries_round_trip(settings: DyCoke) -> None:
    there = json.loads(json.dumps(settings.to_dict()))
    assert DyCoke.from_dict(there) == settings
    assert DyCoke.from_dict({"prune_layer": 5}) == DyCoke(prune_layer=5)
    known = "echo, echo_exact, merge, merge_ratio"
    with pytest.raises(ValueError, match=f"no setting 'ratio'; it has {known}"):
        DyCoke.from_dict({"ratio": 1})


@pytest.mark.parametrize(
    ("name", "value", "error", "allowed"),
    [
        ("merge_ratio", 1.0, ValueError, r"\[0, 1\)"),
        ("merge_ratio", -1e-9, ValueError, r"\[0, 1\)"),
        ("merge_ratio", float("nan"), ValueError, r"\[0, 1\)"),
        ("prune_ratio", 1, ValueError, r"\[0, 1\)"),
        ("prune_ratio", "0.5", TypeError, r"\[0, 1\)"),
        ("prune_ratio", None, TypeError, r"\[0, 1\)"),
        ("merge_ratio", True, TypeError, r"\[0, 1\)"),
        ("prune_layer", 0, ValueError, "at least 1"),
        ("prune_layer", 2.0, TypeError, "at least 1"),
        ("window", 0, ValueError, "at least 1"),
        ("refresh_threshold", 1.1, ValueError, r"\[0, 1\]"),
        ("refresh_threshold", -0.1, ValueError, r"\[0, 1\]"),
        ("merge", "sum", ValueError, "'keep', 'mean'"),
        ("positions", "new", ValueError, "'original', 'compact'"),
    ],
)
def test_bad_values_name_themselves_and_what_is_allowed(
    name: str, value: object, error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error, match=f"{name} must be .*{allowed}") as caught:
        DyCoke(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_one_object_serves_many_models_and_videos() -> None:
    settings = DyCoke()
    for family in ("llava_onevision", "qwen2_5_vl", "llava_onevision"):
        for frames in (5, 2):
            inputs = inputs_of(family, [[frames]], [(3, 4)])
            _, run = compressed(model_of(family), settings, inputs, tokens=3)
            assert run.report is not None
            assert run.report.settings == settings.to_dict()
            assert run.report.samples[0].frames == frames


def test_a_report_reads_as_attributes_keys_and_text() -> None:
    inputs = inputs_of("llava_onevision", [[8]], [(3, 4)])
    _, run = compressed(model_of("llava_onevision"), DyCoke(), inputs)
    report = run.report
    assert isinstance(report, Report)
    as_dict = report.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert report["samples"][0]["videos"][0]["frames"] == report.samples[0].videos[0].frames == 8
    assert list(as_dict["samples"][0]) == [
        "videos",
        "frames",
        "visual_tokens",
        "kept_tokens",
        "active_tokens",
        "retention",
        "final_retention",
        "refreshes",
        "recalled_tokens",
    ]
    sample = report.samples[0]
    assert sample.visual_tokens == 72
    assert sample.kept_tokens == 2 * 9 + 6 * 2
    assert sample.active_tokens == 9
    assert sample.retention == report.retention == 30 / 72
    assert sample.final_retention == report.final_retention == 9 / 72
    text = str(report)
    assert 3 <= len(text.splitlines()) <= 6
    for figure in ("72", "30", "41.67%", "12.50%", f"{sample.refreshes} refreshes"):
        assert figure in text


def test_the_top_level_is_weighted_by_tokens() -> None:
    inputs = inputs_of("qwen2_5_vl", [[1], [9]], [(3, 4), (3, 4)])
    _, run = compressed(model_of("qwen2_5_vl"), DyCoke(), inputs, tokens=2)
    report = run.report
    assert report is not None
    a, b = report.samples
    assert a.retention == 1.0 and b.retention < 0.5
    total = a.visual_tokens + b.visual_tokens
    assert report.retention == (a.kept_tokens + b.kept_tokens) / total
    assert report.final_retention == (a.active_tokens + b.active_tokens) / total


def test_a_run_that_compressed_nothing_says_why() -> None:
    """One frame is an anchor, and this share of nine tokens is less than one."""
    inputs = inputs_of("llava_onevision", [[1]], [(3, 4)])
    _, run = compressed(model_of("llava_onevision"), DyCoke(prune_ratio=0), inputs, tokens=2)
    assert run.report is not None
    assert not run.report.engaged
    assert "too few frames" in str(run.report.reason)


def test_the_package_says_what_it_has() -> None:
    for name in dycoke.__all__:
        assert getattr(dycoke, name) is not None
    assert dycoke.merging.merge_mask(torch.randn(4, 5, 6)).shape == (4, 5)
    assert dycoke.costs.flops(1, 2, 3, 4).total > 0
    assert "apply" in dir(dycoke)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dycoke.nothing  # noqa: B018


def test_streamers_and_scores_pass_through() -> None:
    """What generate offers beside tokens works inside the block as outside."""
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten())

        def end(self) -> None:
            pass

    model, inputs = model_of("qwen2_5_vl"), inputs_of("qwen2_5_vl", [[5]], [(3, 4)])
    streamer = Collect()
    with DyCoke()(model):
        out = generate(model, inputs, streamer=streamer, output_scores=True)
    assert torch.equal(torch.cat(streamer.parts), out.sequences[0])
    assert len(out.scores) == 8
