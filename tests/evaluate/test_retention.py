"""Accuracy over retention: what runs, what is claimed, what is drawn."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dycoke import DyCoke, methods
from dycoke.assistant import Assistant
from dycoke.evaluate import curves, retention, storyqa
from dycoke.methods.composed import Composed
from dycoke.nano import build, stories

VISUAL = 24 * 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return build.build(tmp_path_factory.mktemp("nano") / "nano", seed=3)


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return Assistant.load(folder, device="cpu")


def shares(compressor: Any) -> tuple[float, float]:
    """Kept and attended share of a story, from the masks."""
    features = torch.randn(24, 36, 8)
    keep = compressor.merge_tokens(features)[1]
    kept = int(keep.sum())
    return kept / VISUAL, int((1 - compressor.prune_ratio) * kept + 1e-6) / VISUAL


@pytest.mark.parametrize("share", retention.RETENTIONS)
def test_a_dynamic_cache_is_asked_twice(share: float) -> None:
    """Once for what it keeps, once for what it attends to; P = .7 up to a share of .3."""
    _, kept, attended = retention.points(["dycoke"], [share])
    assert (kept.bases, attended.bases) == (("kept",), ("attended",))
    assert kept.setting.compressor.prune_ratio == 0.7
    assert shares(kept.setting.compressor)[0] == pytest.approx(share, abs=1 / VISUAL)
    held, read = shares(attended.setting.compressor)
    assert read == pytest.approx(share, abs=1.5 / VISUAL)
    assert held == pytest.approx(min(1, share / 0.3) if share <= 0.3 else 1, abs=1 / VISUAL)
    assert attended.setting.compressor.prune_ratio == pytest.approx(0.7 if share <= 0.3 else 0.5)


def test_one_shot_methods_are_asked_once() -> None:
    names = ["full", "visionzip", "random", "visionzip+once"]
    found = retention.points(names, [0.25])
    assert [p.method for p in found] == names
    assert [p.bases for p in found[:2]] == [("kept", "attended")] * 2
    random, composed = (p.setting.compressor for p in found[2:])
    # Nothing is pruned behind a one-shot method; its share is what a step attends to.
    assert random.prune_ratio == 0 and shares(random) == (0.25, 0.25)
    assert isinstance(composed, Composed)
    assert composed.before == methods.create("visionzip", retention=0.25)
    assert composed.after.refresh_threshold == 0 and composed.prune_ratio == 0.7
    found = retention.points(retention.USUAL)
    assert len(found) == 1 + 5 * (len(retention.USUAL) - 1 + 3)
    # Half of the tokens kept, of which 30 % are attended to, answers for 15 % attended, too.
    assert len({p.setting for p in found}) == len(found) - 3


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["nothing"], [0.5], "unknown method 'nothing'"),
        (
            ["visionzip+random"],
            [0.5],
            r"'random' has no dynamic cache; dycoke, dycoke\+, once, always",
        ),
        (["full+dycoke"], [0.5], "nothing is composed with the full model"),
        (["fastv+dycoke"], [0.5], "inside the LLM"),
        (["dycoke"], [50], r"retention must be in \(0, 1\], got 50; did you mean 0.5\?"),
        (["dycoke"], [0], r"retention must be in \(0, 1\], got 0"),
    ],
)
def test_bad_names_and_shares(names: list[str], asked: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retention.points(names, asked)


def test_every_method_answers_and_is_counted(assistant: Assistant, monkeypatch: Any) -> None:
    """From features that were encoded once."""
    monkeypatch.setattr(storyqa, "ANSWER_TOKENS", {"ask": 3, "describe": 6})
    points = retention.points([*retention.USUAL, "visionzip+dycoke"], [0.25])
    lines = [point.setting for point in points]
    calls: list[int] = []
    inner = assistant.model.model.get_video_features

    @functools.wraps(inner)
    def counted(pixels: Any, **kwargs: Any) -> Any:
        calls.append(len(pixels))
        return inner(pixels, **kwargs)

    assistant.model.model.get_video_features = counted
    try:
        scores = storyqa.evaluate(assistant, lines, "seen", 30, 2)
    finally:
        del assistant.model.model.get_video_features
    # Once for all methods, and once more with the encoder's scores (5.17 takes pixels each time).
    task = storyqa.StoryQA(assistant, "seen", 30, 2)
    assert not task._takes_features or sum(calls) == 4
    told = [stories.make("seen", seed) for seed in (30, 31)]
    prompts = sum(len(stories.questions(story)) + 1 for story in told)
    for row, point in zip(retention.point_results(points, scores), points, strict=True):
        mine = scores[point.setting.name]
        assert mine.visual == prompts * VISUAL
        if point.method in ("full", "holitom"):
            continue
        basis = point.bases[0]
        share = row["retention" if basis == "kept" else "final_retention"]
        assert abs(share - 0.25) <= 1 / 36 + 1e-6, point.method
        assert row["reached"]


@pytest.mark.once
def test_processes_give_the_same_scores(assistant: Assistant, monkeypatch: Any) -> None:
    monkeypatch.setattr(storyqa, "CHUNK", 1)
    lines = [p.setting for p in retention.points(["vidcom2"], [0.1])[1:]]
    here = storyqa.evaluate(assistant, lines, "seen", 3, 2)
    there = storyqa.evaluate(assistant, lines, "seen", 3, 2, workers=2)
    assert {n: vars(s) for n, s in here.items()} == {n: vars(s) for n, s in there.items()}


def made() -> tuple[list[retention.Point], dict[str, storyqa.Scores]]:
    """Forty stories; visionzip tells always right, random never, dycoke half of them."""
    points = retention.points(["visionzip", "random", "dycoke"], [0.5, 0.1])
    right = {"full": 4, "visionzip": 4, "random": 0, "dycoke": 2}
    scores = {}
    for point in points:
        correct = right[point.method]
        counts = [(min(4, max(0, correct + i % 2 * (correct in (2, 4)))), 4) for i in range(40)]
        kept = int(VISUAL * point.retention) if point.method != "random" else VISUAL
        scores[point.setting.name] = storyqa.Scores(counts, counts, VISUAL, kept, kept)
    return points, scores


def test_claims_follow_the_intervals() -> None:
    points, scores = made()
    rows = retention.point_results(points, scores)
    zipped, random, kept = (
        next(
            r
            for r in rows
            if r["method"] == m and r["target_retention"] == 0.1 and "kept" in r["bases"]
        )
        for m in ("visionzip", "random", "dycoke")
    )
    for basis in retention.BASES:
        assert curves.verdict(zipped, "describe", basis) == "+"
        assert curves.verdict(random, "ask", basis) == "-"
    assert zipped["ask"]["to_rival"]["kept"][0] == pytest.approx(0.375)
    assert kept["ask"]["to_full"][0] == pytest.approx(-0.375)
    assert "to_rival" not in kept["ask"] and curves.verdict(kept, "ask", "kept") == " "
    assert zipped["reached"] and not random["reached"]
    other = next(
        r
        for r in retention.point_results(points, scores, "visionzip")
        if r["method"] == "dycoke" and r["target_retention"] == 0.1 and r["bases"] == ["kept"]
    )
    assert other["ask"]["to_rival"]["kept"][0] == pytest.approx(-0.375)
    # The same answers: nothing may be claimed.
    for name in scores:
        scores[name].ask = [(2, 4)] * 40
    even = retention.point_results(points, scores)
    assert all(curves.verdict(row, "ask", "kept") == " " for row in even)


def test_the_picture_has_a_line_per_method() -> None:
    points, scores = made()
    panels = curves.picture(retention.point_results(points, scores), "a title").axes
    titles = [f"{t}, at equal {b} tokens" for t in storyqa.TASKS for b in retention.BASES]
    assert [panel.get_title() for panel in panels] == titles
    for panel in panels:
        lines = {line.get_label(): line for line in panel.lines}
        assert {"full", "visionzip", "random", "dycoke"} <= set(lines)
        assert np.asarray(lines["visionzip"].get_ydata()).tolist() == [100, 100]
        assert np.asarray(lines["dycoke"].get_ydata()).tolist() == [62.5, 62.5]
        assert lines["dycoke"].get_linewidth() > lines["random"].get_linewidth()
        assert panel.get_xscale() == "log"


def test_the_command(run: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(storyqa, "ANSWER_TOKENS", {"ask": 3, "describe": 6})
    file, picture = tmp_path / "r.json", tmp_path / "r.png"
    code, out, err = run("eval", "--retentions", "0.5,0.1", "--methods", "dycoke,vidcom2",
                         "--stories", 2, "--model", folder, "--json", file,
                         "--picture", picture)  # fmt: skip
    assert code == 0, err
    content = json.loads(file.read_text())
    assert [r["method"] for r in content["results"]] == ["full"] + ["dycoke"] * 4 + ["vidcom2"] * 2
    assert content["results"][1]["settings"] == DyCoke(token_budget=0.5).to_dict()
    for words in ("at equal kept tokens", "at equal attended tokens", "ask", "describe"):
        assert words in " ".join(out.split())
    assert Image.open(picture).format == "PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--retentions", "half"),
            "--retentions must be shares in (0, 1], such as 0.5,0.25, got 'half'",
        ),
        (("--retentions", "120"), "--retentions must be shares in (0, 1], got 120"),
        (("--retentions", "50,25"), "must be shares in (0, 1], got 50,25; did you mean 0.5,0.25?"),
        (("--retentions", "0.5,0"), "--retentions must be shares in (0, 1], got 0.5,0"),
        (("--retentions", ","), "--retentions must be shares in (0, 1], such as 0.5,0.25, got ','"),
        (("--retentions", "0.5", "--methods", "x"), "unknown method 'x'"),
        (
            ("--retentions", "0.5", "--settings", "full", "--prune-layer", "2"),
            "--settings, --prune-layer: only for the standard settings; with --retentions say",
        ),
        (
            ("--retentions", "0.5", "--methods", "dycoke", "--against", "once"),
            "--against once: it is none of the methods dycoke",
        ),
        (
            ("--methods", "dycoke", "--against", "once"),
            "--methods, --against: only with --retentions, such as 0.5,0.25",
        ),
    ],
)
def test_bad_input_is_one_line(run: Any, args: tuple[str, ...], message: str) -> None:
    code, out, err = run("eval", *args)
    lines = [line for line in err.splitlines() if line.startswith("dycoke: ")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]
