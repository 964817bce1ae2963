"""StoryQA's counting, its intervals, and its way through a file."""

from __future__ import annotations

import json
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import exact

from dycoke import DyCoke, nano
from dycoke.assistant import Assistant
from dycoke.evaluate import stats, storyqa
from dycoke.evaluate.attention import clip_of, looking, told_events
from dycoke.methods.controls import FewerFrames, RandomTokens
from dycoke.nano import build, stories


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: Any) -> Assistant:
    """Random weights: what is tested is the counting, not the answers."""
    folder = build.build(tmp_path_factory.mktemp("nano") / "nano", seed=3)
    return Assistant.load(folder, device="cpu")


@pytest.fixture
def short(monkeypatch: Any) -> None:
    """Answers that stop early."""
    monkeypatch.setattr(storyqa, "ANSWER_TOKENS", {"ask": 3, "describe": 6})


def test_wilson_against_known_values() -> None:
    # Wilson's interval for 8 of 10, as in Newcombe's tables.
    low, high = stats.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert stats.wilson(0, 10)[0] == 0.0 and stats.wilson(10, 10)[1] == pytest.approx(1.0)
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_paired_difference_sees_what_pairs_show() -> None:
    rng = random.Random(0)
    theirs = [(rng.randint(0, 4), 4) for _ in range(300)]
    better = [(min(right + (i % 3 == 0), n), n) for i, (right, n) in enumerate(theirs)]
    difference, low, high = stats.paired_difference(better, theirs)
    gained = sum(a[0] - b[0] for a, b in zip(better, theirs, strict=True))
    assert difference == pytest.approx(gained / (4 * 300))
    assert 0 < low < difference < high
    same = stats.paired_difference(theirs, theirs)
    assert same == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same stories"):
        stats.paired_difference(theirs, theirs[:-1])


def test_the_bootstrap_draws_whole_stories() -> None:
    """Ten equal answers about one story are one observation, not ten."""
    rng = np.random.default_rng(1)
    single = [(int(x), 1) for x in rng.integers(0, 2, 60)]
    none = [(0, 1)] * 60
    clustered = [(10 * right, 10) for right, _ in single]
    wide = stats.paired_difference(clustered, [(0, 10)] * 60)
    assert wide == pytest.approx(stats.paired_difference(single, none))


def test_prompts_are_those_of_the_processor(assistant: Assistant) -> None:
    story = stories.make("seen", 5)
    question, _ = stories.questions(story)[0]
    task = storyqa.StoryQA(assistant, "seen", 5, 1)
    features = task._encode(
        story
    ).features  # of this video alone, as below: the same to the last bit
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = assistant.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    whole = assistant.processor(text=[text], videos=[stories.render(story)], return_tensors="pt")
    assert task._ids([question]) == whole["input_ids"].tolist()
    expected = whole["pixel_values_videos"]
    if task._takes_features:
        expected = assistant.model.model.get_video_features(
            expected, return_dict=True
        ).pooler_output
    assert torch.equal(features[None], expected)


def test_features_of_a_sparse_encoder_are_its_own(assistant: Assistant, short: None) -> None:
    """What a setting leaves out of the encoder is not handed on to the next one."""
    skipping = DyCoke(skip_ratio=0.7)

    def answers(*settings: Any) -> list[Any]:
        task = storyqa.StoryQA(assistant, "seen", 40, 1)
        return [vars(next(task.run(setting))) for setting in settings]

    first, second, third = answers(skipping, DyCoke(), skipping)
    assert first == third and [second] == answers(DyCoke()) and [first] == answers(skipping)
    task = storyqa.StoryQA(assistant, "seen", 40, 1)
    story = stories.make("seen", 40)
    with skipping(assistant.model), torch.inference_mode():
        sparse = task._encode(story, skipping).features
    with torch.inference_mode():
        assert not torch.equal(sparse, task._encode(story).features) or not task._takes_features


@pytest.mark.parametrize(
    "compressor", [None, DyCoke(0, 0), DyCoke(), RandomTokens(), FewerFrames()]
)
def test_everything_is_counted_once(assistant: Assistant, compressor: Any, short: None) -> None:
    """Every question and every event of every story is counted once, in any chunks."""
    task = storyqa.StoryQA(assistant, "seen", 40, 3)
    total = storyqa.Scores()
    for part in task.run(compressor, chunk=2):
        total.add(part)
    told = [stories.make("seen", 40 + i) for i in range(3)]
    assert [n for _, n in total.ask] == [len(stories.questions(s)) for s in told]
    assert [n for _, n in total.describe] == [len(s.events) for s in told]
    prompts = sum(n for _, n in total.ask) + 3
    assert total.visual == prompts * 24 * 36
    if compressor is None or compressor.idle:
        assert total.kept == total.active == total.visual
    else:
        kept = int(compressor.merge_tokens(torch.randn(24, 36, 8))[1].sum())
        assert total.kept == prompts * kept
        assert total.active == prompts * int(0.3 * kept + 1e-6)


def test_right_answers_count(assistant: Assistant, monkeypatch: Any) -> None:
    task = storyqa.StoryQA(assistant, "seen", 0, 4)
    told = [stories.make("seen", seed) for seed in range(4)]

    def perfect(watched: Any, places: list[int], ids: torch.Tensor, task: str) -> list[str]:
        texts = []
        for place, prompt in zip(places, ids, strict=True):
            words = assistant.processor.tokenizer.decode(prompt, skip_special_tokens=True)
            for question, truth in stories.questions(told[place]):
                if same(question) in same(words):
                    texts.append(truth)
                    break
            else:
                assert same(stories.DESCRIBE[0]) in same(words)
                texts.append(stories.describe(told[place]))
        return texts

    def same(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    monkeypatch.setattr(task, "_answer", perfect)
    scores = next(iter(task.run(None, chunk=4)))
    assert all(right == n > 0 for right, n in scores.ask + scores.describe)


@exact  # in float32, rounding could turn a word of one of the two
@torch.inference_mode()
@pytest.mark.parametrize("compressor", [None, DyCoke()])
def test_a_video_watched_once_answers_as_one_watched_each_time(
    compressor: Any,
) -> None:
    """The shared beginning of the prompts changes nothing but the time."""
    assistant = Assistant.load(nano.path(), device="cpu")  # trained: its answers differ
    assert assistant.model.dtype == torch.float64
    task = storyqa.StoryQA(assistant, "seen", 0, 1)
    told = [stories.make("seen", 0)]
    answers = set()
    with nullcontext() if compressor is None else compressor(assistant.model):
        watched = task._watch(told)
        for rows, ids in task._batches(told):
            row = rows[-1]
            together = task._answer(watched, [r.story for r in rows], ids, row.task)[-1]
            content = [{"type": "video"}, {"type": "text", "text": row.question}]
            text = assistant.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            video = stories.render(told[row.story])
            inputs = assistant.processor(text=[text], videos=[video], return_tensors="pt")
            longest = storyqa.ANSWER_TOKENS[row.task]
            output = assistant.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            alone = assistant.processor.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            assert together == alone
            answers.add(alone)
    assert len(answers) > 4


def test_an_evaluation_goes_on_where_it_stopped(
    assistant: Assistant, tmp_path: Path, short: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(storyqa, "CHUNK", 1)
    lines = [s for s in storyqa.standard_settings() if s.name in ("full", "dycoke K=0.7 P=0.7 L=3")]
    kept = tmp_path / "partial.json"
    done: list[tuple[str, int]] = []

    class Stopped(Exception):
        pass

    def stop_late(name: str, count: int) -> None:
        done.append((name, count))
        if sum(c for _, c in done) >= 4:
            raise Stopped

    args = (assistant, lines, "seen", 7, 3)
    with pytest.raises(Stopped):
        storyqa.evaluate(*args, keep=kept, on_chunk=stop_late)
    saved = json.loads(kept.read_text())["scores"]
    assert [len(saved[line.name]["ask"]) for line in lines] == [3, 1]
    resumed = storyqa.evaluate(*args, keep=kept)
    whole = storyqa.evaluate(*args)
    table, again = storyqa.setting_results(lines, resumed), storyqa.setting_results(lines, whole)
    assert table == again
    assert [row["name"] for row in table] == ["full", "dycoke K=0.7 P=0.7 L=3"]
    assert table[0]["retention"] == 1.0
    assert table[1]["retention"] == pytest.approx((6 * 36 + 18 * 10) / (24 * 36))
    assert table[1]["settings"]["merge_ratio"] == 0.7
    assert set(table[1]["ask"]) == {"n", "correct", "low", "high", "to_full"}
    # Another seed is another evaluation.
    other = storyqa.SavedScores(kept, {"split": "seen", "seed": 8, "stories": 3, "model": "nano"})
    assert other.scores == {}


def test_a_budget_names_its_lines() -> None:
    lines = storyqa.standard_settings([{"token_budget": 0.1}], 0.5, 4)
    assert [line.name for line in lines[1:]] == [
        f"{method} B=0.1 P=0.5 L=4"
        for method in ("dycoke", "dycoke+", "random", "fewer-frames", "once")
    ]
    for line in lines[1:]:
        settings = line.settings
        named = [settings[key] for key in ("token_budget", "prune_ratio", "prune_layer")]
        assert named == [0.1, 0.5, 4]
    assert lines[-1].settings["refresh_threshold"] == 0


@pytest.mark.parametrize("frames", [1, 2, 5, 16])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.7])
def test_controls_keep_what_dycoke_keeps(frames: int, ratio: float) -> None:
    features = torch.randn(frames, 36, 8, generator=torch.Generator().manual_seed(0))
    kept = int(DyCoke(ratio).merge_tokens(features)[1].sum())
    _, chosen = RandomTokens(ratio).merge_tokens(features)
    assert int(chosen.sum()) == kept
    assert torch.equal(chosen, RandomTokens(ratio).merge_tokens(features)[1])
    if ratio and frames > 2:
        assert not torch.equal(chosen, RandomTokens(ratio).merge_tokens(features + 1)[1])
        assert not torch.equal(chosen, RandomTokens(ratio, seed=1).merge_tokens(features)[1])
    _, whole = FewerFrames(ratio).merge_tokens(features)
    per_frame = whole.sum(1)
    assert set(per_frame.tolist()) <= {0, 36}
    assert kept - 36 < int(whole.sum()) <= max(kept, 36)
    if int(whole.sum()) > 36:
        assert whole[0].all() and whole[-1].all()


def test_words_belong_to_the_event_they_tell() -> None:
    text = "a red circle moves left , then a blue square turns green <|im_end|>"
    expected = [None, 0, 0, 0, 0, None, None, None, 1, 1, 1, 1, None]
    assert told_events(text.split(" ")) == expected


def test_looking_reads_the_trace() -> None:
    """A model that looks at the first frame of each event, and one that never does."""
    from types import SimpleNamespace

    from dycoke.core.steps import SampleTrace

    def assistant_that(looks_at: Any) -> Any:
        def ask(video: Any, *_: Any, **__: Any) -> Any:
            story = stories.make("seen", int(video.path.split()[1]))
            text = stories.describe(story).replace(",", " ,")
            tokens = tuple(text.split())
            owners, event = [], 0
            for token in tokens:
                event += token == "then"
                owners.append(story.events[event])
            attention = []
            for owner in owners[1:]:
                step = torch.zeros(24)
                step[looks_at(owner)] = 1.0
                attention.append(step)
            sample = SampleTrace([torch.ones(24, 1).bool()], [], attention)
            return SimpleNamespace(tokens=tokens, trace=SimpleNamespace(samples=[sample]))

        return SimpleNamespace(ask=ask)

    always = looking(assistant_that(lambda e: e.start), "seen", 0, 5)
    never = looking(assistant_that(lambda e: e.stop % 24), "seen", 0, 5)
    assert always.inside == always.words == never.words > 20
    assert never.inside < never.words / 2
    assert 0.2 < always.chance < 0.8
    assert clip_of(stories.make("seen", 0)).frames.shape == (24, 96, 96, 3)
