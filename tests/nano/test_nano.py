"""The embedded model's world and folder: truth against the picture, scoring, loading."""

from __future__ import annotations

import copy
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from support import close, exact

from dycoke.nano import stories
from dycoke.nano.stories import Event, Still, Story


def of_action(action: str, count: int = 6, frames: int = 12) -> list[Story]:
    """One-event stories of the given action, without a distractor."""
    found = (stories.make("train", seed, events=1, frames=frames) for seed in range(2000))
    kept = [s for s in found if s.events[0].action == action and s.distractor is None]
    assert len(kept) >= count
    return kept[:count]


def shape_pixels(story: Story, colour: str) -> np.ndarray:
    """Where the picture is close to `colour`: bool (F, H, W), from the pixels alone."""
    clip = stories.render(story).astype(float)
    off = np.linalg.norm(clip - np.array(stories.PALETTE[colour]), axis=-1)
    return np.asarray(off < 60)


def centres(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the set pixels of each frame, (F, 2)."""
    return np.array([[a.mean() for a in reversed(np.nonzero(m))] for m in mask])


# -- randomness and splits


@pytest.mark.parametrize("split", stories.SPLITS)
def test_a_seed_gives_one_story(split: stories.Split) -> None:
    one, again, other = (stories.make(split, seed) for seed in (5, 5, 6))
    assert one == again != other
    assert np.array_equal(stories.render(one), stories.render(again))
    assert stories.questions(one) == stories.questions(again)


def test_splits_do_not_share_stories() -> None:
    pictures = [stories.make(split, 3) for split in stories.SPLITS]
    assert len({(s.events, s.distractor) for s in pictures}) == 3


def test_unseen_combinations_are_never_trained_on() -> None:
    kinds: dict[str, set[tuple[str, str, str]]] = {split: set() for split in stories.SPLITS}
    for split in stories.SPLITS:
        for seed in range(1500):
            events = stories.make(split, seed).events
            kinds[split] |= {(e.colour, e.shape, e.action) for e in events}
    assert not kinds["unseen"] & (kinds["train"] | kinds["seen"])
    combinations = len(stories.COLOURS) * len(stories.SHAPES) * len(stories.ACTIONS)
    assert len(kinds["unseen"]) == combinations // 8
    assert len(kinds["train"]) == combinations - combinations // 8
    # Each part of an unseen combination, and each pair of parts, is known from training.
    for drop in range(3):
        pairs = [{k[:drop] + k[drop + 1 :] for k in kinds[s]} for s in ("unseen", "train")]
        assert pairs[0] <= pairs[1]


def test_stories_are_well_formed() -> None:
    distractors = 0
    for seed in range(400):
        story = stories.make("seen", seed)
        spans = [(e.start, e.stop) for e in story.events]
        assert spans[0][0] == 0 and spans[-1][1] == story.frames == stories.FRAMES
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(stop - start >= 3 for start, stop in spans)
        named = [(e.colour, e.shape) for e in story.events]
        still = [e.other for e in story.events] + [story.distractor]
        named += [(s.colour, s.shape) for s in still if s]
        assert len(set(named)) == len(named)
        for sprite in stories.tracks(story):
            for along in (sprite.x, sprite.y):
                assert (along - sprite.radius).min() >= 0
                assert (along + sprite.radius).max() <= stories.SIZE
        distractors += story.distractor is not None
    assert 160 < distractors < 240


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        stories.make("test", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="events must be 1 to 4, got 5"):
        stories.make("train", 0, events=5)
    with pytest.raises(ValueError, match="at least 12 frames, got 11"):
        stories.make("train", 0, events=4, frames=11)


# -- the picture says what the truth says


@pytest.mark.parametrize("way", stories.DIRECTIONS)
def test_moving_shapes_move(way: str) -> None:
    for story in of_action(f"moves {way}"):
        track = centres(shape_pixels(story, story.events[0].colour))
        expected = np.array(stories.DIRECTIONS[way])
        assert (track[-1] - track[0]) @ expected > 20
        assert abs((track[-1] - track[0]) @ expected[::-1]) < 8
        assert (np.diff(track, axis=0) @ expected > -2).all()  # slowly, never jumping


@pytest.mark.parametrize(("action", "sign"), [("grows", 1), ("shrinks", -1)])
def test_sizes_change(action: str, sign: int) -> None:
    for story in of_action(action):
        area = shape_pixels(story, story.events[0].colour).sum(axis=(1, 2)).astype(float)
        assert sign * np.log(area[-1] / area[0]) > np.log(2)


def test_blinking_goes_and_comes_back() -> None:
    for story in of_action("blinks"):
        shown = shape_pixels(story, story.events[0].colour).sum(axis=(1, 2)) > 40
        assert shown[0] and not shown.all()
        assert np.count_nonzero(np.diff(shown.astype(int))) >= 2


def test_turning_changes_the_colour_in_place() -> None:
    for story in of_action("turns"):
        event = story.events[0]
        before, after = (
            shape_pixels(story, c).sum(axis=(1, 2)) for c in (event.colour, event.into)
        )
        assert before[0] > 3 * after[0] and after[-1] > 3 * before[-1]


def test_crossing_passes_over_the_other() -> None:
    for story in of_action("crosses"):
        event = story.events[0]
        assert event.other is not None
        begin, end = (np.array(p[:2]) for p in (event.begin, event.end))
        other = np.array([event.other.x, event.other.y])
        assert (begin - other) @ (end - other) < 0
        visible = shape_pixels(story, event.other.colour).sum(axis=(1, 2))
        assert visible[len(visible) // 2] < min(visible[0], visible[-1])


def test_events_follow_each_other() -> None:
    for seed in range(8):
        story = stories.make("train", seed, events=3)
        for sprite in stories.tracks(story):
            if sprite.shape == "ring":
                continue  # hollow
            clip = stories.render(story).astype(float)
            at = np.round(np.stack([sprite.y, sprite.x], -1) - 0.5).astype(int)
            near = [
                np.linalg.norm(clip[f, y, x] - np.array(stories.PALETTE[sprite.colour])) < 75
                for f, (y, x) in zip(sprite.frames, at, strict=True)
            ]
            # What crosses hides what is crossed for a while.
            assert np.mean(near) > 0.4


# -- files


def test_a_story_is_the_same_file_in_every_run(tmp_path) -> None:
    """Whatever lies in memory: encoders may let it decide."""
    story = stories.make("seen", 5004)
    files = {stories.write(story, tmp_path / f"{i}.mp4").read_bytes() for i in range(4)}
    assert len(files) == 1


def test_a_written_clip_reads_back(tmp_path) -> None:
    story = stories.make("seen", 11)
    file = stories.write(story, tmp_path / "story.mp4")
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == stories.FPS
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    truth = stories.render(story)
    assert frames.shape == truth.shape == (stories.FRAMES, stories.SIZE, stories.SIZE, 3)
    assert np.abs(frames.astype(int) - truth.astype(int)).mean() < 6


# -- words


A_STORY = Story(
    "seen",
    0,
    16,
    (
        Event("orange", "circle", "moves left", 0, 4, (60, 40, 12), (30, 40, 12)),
        Event("red", "star", "turns", 4, 8, (40, 40, 12), (40, 40, 12), into="blue"),
        Event(
            *("white", "ring", "crosses", 8, 16, (20, 40, 12), (70, 40, 12)),
            other=Still("green", "square", 45, 40, 11),
        ),
    ),
    Still("purple", "cross", 70, 80, 11),
)
TOLD = (
    "an orange circle moves left, then a red star turns blue, "
    "then a white ring crosses a green square"
)


def test_telling_and_questions() -> None:
    assert stories.describe(A_STORY) == TOLD
    pairs = dict(stories.questions(A_STORY))
    assert pairs["What colour is the first thing?"] == "orange"
    assert pairs["What shape is the third thing?"] == "ring"
    assert pairs["What does the second thing do?"] == "turns blue"
    assert pairs["How many events are there?"] == "three"
    assert pairs["What stays still?"] == "a purple cross"
    order = next(q for q in pairs if q.startswith("Which comes first"))
    assert pairs[order] in order
    alone = stories.make("seen", 1, events=1)
    assert len(stories.questions(alone)) == 5


def test_every_word_is_known() -> None:
    for seed in range(300):
        story = stories.make("seen", seed)
        said = [stories.describe(story), *stories.DESCRIBE]
        said += [part for pair in stories.questions(story) for part in pair]
        words = " ".join(said).lower().replace(",", " ").replace("?", " ").replace(".", " ")
        assert set(words.split()) <= set(stories.WORDS)


def test_the_truth_scores_full() -> None:
    for split in stories.SPLITS:
        for seed in range(100):
            story = stories.make(split, seed)
            assert stories.events_right(stories.describe(story), story) == len(story.events)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (TOLD, 3),
        (TOLD.upper().replace(", THEN", ".  Then") + "!", 3),
        ("", 0),
        ("there is nothing to tell", 0),
        (TOLD.replace("red", "green", 1), 2),
        (TOLD.replace("turns blue", "turns red"), 2),
        (TOLD.replace("green square", "green star"), 2),
        (TOLD.replace("moves left", "moves"), 2),
        ("a red star turns blue, then a white ring crosses a green square", 2),
        ("a white ring crosses a green square, then a red star turns blue", 1),
        ("a red star turns blue, " * 3, 1),
        ("a red ring grows, a blue ring grows, a cyan ring grows, " + TOLD, 0),
    ],
)
def test_scoring_of_tellings(text: str, right: int) -> None:
    assert stories.events_right(text, A_STORY) == right


def test_scoring_of_answers() -> None:
    assert stories.same_answer(" Moves  left. ", "moves left")
    assert not stories.same_answer("moves left now", "moves left")
    assert not stories.same_answer("", "red")


# -- the model's folder


@pytest.fixture(scope="module")
def random_nano(tmp_path_factory):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dycoke.nano.build import build

    folder = build(tmp_path_factory.mktemp("nano") / "model", seed=1)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return folder, model, AutoProcessor.from_pretrained(folder)


def ask(processor, text: str, clip: np.ndarray):
    content = [{"type": "video"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(text=prompt, videos=[clip], return_tensors="pt")


def test_the_folder_is_small_and_loads_through_the_auto_classes(random_nano) -> None:
    folder, model, processor = random_nano
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8 * 2**20
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.text_config.max_position_embeddings >= 32768
    inputs = ask(processor, stories.DESCRIBE[0], stories.render(stories.make("seen", 0)))
    made = model.generate(**inputs, max_new_tokens=4)
    assert made.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert (made[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 96, 96), (7, 60, 130)])
def test_any_length_and_size_of_video(random_nano, frames: int, height: int, width: int) -> None:
    from dycoke.nano.build import TOKENS_PER_FRAME

    _, model, processor = random_nano
    clip = np.zeros((frames, height, width, 3), np.uint8)
    inputs = ask(processor, "What?", clip)
    video = inputs["input_ids"] == model.config.video_token_id
    assert video.sum() == frames * TOKENS_PER_FRAME + 1  # and one newline
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_still_image_is_read_too(random_nano) -> None:
    _, model, processor = random_nano
    content = [{"type": "image"}, {"type": "text", "text": "What shape is the first thing?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    picture = np.zeros((70, 120, 3), np.uint8)
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("text", [TOLD, "What colour is the third thing?", "hello, world 42!"])
def test_text_survives_the_tokenizer(random_nano, text: str) -> None:
    tokenizer = random_nano[2].tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.lower()
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", ["", "  \n", "Ünï cödé 你好 🙂", "x" * 5000])
def test_any_text_tokenizes(random_nano, text: str) -> None:
    tokenizer = random_nano[2].tokenizer
    assert max(tokenizer(text)["input_ids"], default=0) < len(tokenizer)


def test_known_words_are_one_token(random_nano) -> None:
    tokenizer = random_nano[2].tokenizer
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in stories.WORDS)


def test_the_seed_decides_the_weights() -> None:
    from dycoke.nano.build import build_model, build_processor

    tokenizer = build_processor().tokenizer
    before = torch.random.get_rng_state()
    weights = [build_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_path_builds_once_into_the_cache(tmp_path, monkeypatch) -> None:
    import dycoke.nano as nano

    monkeypatch.setattr(nano, "_TRAINED", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not nano.is_trained()
    folder = nano.path()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.is_relative_to(tmp_path / "cache")
    assert nano.path() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]  # no scratch left


def test_path_prefers_the_trained_model(tmp_path, monkeypatch) -> None:
    import dycoke.nano as nano

    monkeypatch.setattr(nano, "_TRAINED", tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert nano.is_trained() and nano.path() == tmp_path


# -- training


@exact
def test_packed_questions_equal_separate_ones(random_nano) -> None:
    """One video with several questions behind it trains on what generate will see."""
    from dycoke.nano.train import Reader, attention  # noqa: F401  (registers the attention)

    _, model, processor = random_nano
    model = copy.deepcopy(model).double()
    reader = Reader(processor.tokenizer, torch.device("cpu"))
    told = [stories.make("train", seed, events=1, frames=3) for seed in (1, 2)]
    batch = reader.batch(told, 2, np.random.default_rng(0))
    labels = batch.pop("labels")
    model.set_attn_implementation("nano_training")
    with torch.no_grad():
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        packed = model.lm_head(hidden)
    model.set_attn_implementation("sdpa")
    assert packed.dtype == torch.float64

    ids = batch["input_ids"][0]
    start = 3 * 36 + 3
    ends = [-1, *torch.nonzero(labels[0] == processor.tokenizer.eos_token_id).flatten().tolist()]
    ends[0] = start - 1
    assert len(ends) == 4
    for before, end in pairwise(ends):
        alone = torch.cat([ids[:start], ids[before + 1 : end + 1]])[None]
        pixels = batch["pixel_values_videos"][:1]
        with torch.no_grad():
            logits = model(input_ids=alone, pixel_values_videos=pixels).logits[0, start:]
        close(packed[0, before + 1 : end + 1], logits)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 to train")
def test_training_runs_and_resumes(tmp_path, monkeypatch) -> None:
    import dataclasses
    import json

    from dycoke.nano import train

    small = [dataclasses.replace(stage, batch=2) for stage in train.STAGES]
    monkeypatch.setattr(train, "STAGES", small)
    short = ["--out", str(tmp_path), "--every", "0", "--validate", "1", "--device", "cpu"]
    train.main([*short, "--steps", "1"])
    train.main([*short, "--steps", "3"])
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2, 3]
    assert [line["stories"] for line in curve] == [2, 4, 6]
    assert (tmp_path / "model" / "model.safetensors").is_file()
