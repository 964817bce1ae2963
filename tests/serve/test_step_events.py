"""What steps look like on the wire, read back with plain loops."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dycoke.core.steps import SampleStep, VideoMasks
from dycoke.serve.steps import Event, Steps, bitset, pictures, quantised, start_event, word_event
from dycoke.video import Video


def bits(text: str, count: int) -> list[bool]:
    """The first ``count`` tokens of a bitset, as the page reads them."""
    data = base64.b64decode(text)
    return [bool(data[i >> 3] >> (i & 7) & 1) for i in range(count)]


def clip(frames: int = 4, height: int = 40, width: int = 60) -> Video:
    shades = np.arange(frames, dtype=np.uint8) * 50
    pixels = np.broadcast_to(shades[:, None, None, None], (frames, height, width, 3)).copy()
    times = tuple(i / 2 for i in range(frames))
    return Video(pixels, tuple(range(frames)), times, frames, 2.0, "a clip")


@given(st.lists(st.booleans(), max_size=70))
def test_a_bitset_holds_what_went_in(mask: list[bool]) -> None:
    text = bitset(torch.tensor(mask, dtype=torch.bool))
    assert bits(text, len(mask)) == mask
    assert len(base64.b64decode(text)) == -(-len(mask) // 8)


def test_2960_tokens_cost_370_bytes() -> None:
    assert len(base64.b64decode(bitset(torch.ones(2960, dtype=torch.bool)))) == 370


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_attention_is_within_one_part_of_255(values: list[float]) -> None:
    text, top = quantised(torch.tensor(values, dtype=torch.float64))
    read = base64.b64decode(text)
    assert top == max(values) and len(read) == len(values)
    for value, byte in zip(values, read, strict=True):
        assert abs(byte * top / 255 - value) <= top / 255 * 1.001
        assert (byte > 0) == (value > 0) or value / top < 1e-300


def test_no_visual_token_is_no_attention() -> None:
    assert quantised(torch.zeros(0)) == ("", 0.0)
    assert quantised(torch.zeros(3)) == ("AAAA", 0.0)


def test_a_slice_is_shown_by_the_first_of_its_frames() -> None:
    made, times = pictures(clip(6), 3)
    assert times == [0.0, 1.0, 2.0]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))) for p in made]
    assert [int(picture.mean().round()) for picture in shown] == [0, 100, 200]


def test_pictures_are_small() -> None:
    picture = Image.open(io.BytesIO(base64.b64decode(pictures(clip(1, 480, 640), 1)[0][0])))
    assert picture.format == "JPEG" and picture.size == (192, 144)


def test_the_start_says_what_became_of_each_token() -> None:
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    encoded = keep | torch.eye(4, 6).bool()
    event = start_event([clip()], [VideoMasks(keep, encoded, (2, 3))])["videos"][0]
    assert (event["grid"], event["tokens"], event["size"]) == ([2, 3], 24, [40, 60])
    assert bits(event["keep"], 24) == keep.flatten().tolist()
    assert bits(event["encoded"], 24) == encoded.flatten().tolist()
    (event,) = start_event([clip()], [VideoMasks(keep, None, (2, 3))])["videos"]
    assert event["encoded"] is None


def row_of(active: list[int], recalled: list[int], attention: Any = None) -> SampleStep:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, active], mask[1, recalled] = True, True
    return SampleStep(mask[0], mask[1], attention)


def test_a_word_brings_attention_where_it_is_asked_for() -> None:
    attention = torch.tensor([0.0, 0.1, 0.2, 0, 0, 0, 0, 0.05])
    event = word_event(3, " up", row_of([1, 2], [2], attention), True)
    assert bits(event["active"], 8) == [i in (1, 2) for i in range(8)]
    assert bits(event["recalled"], 8) == [i == 2 for i in range(8)]
    assert event["share"] == pytest.approx(0.35) and event["top"] == pytest.approx(0.2)
    assert "attention" not in word_event(3, " up", row_of([1], [], attention), False)
    assert "attention" not in word_event(0, "a", row_of([1], []), True)


WORDS = {1: "a", 2: " red", 3: "\ufffd", 4: "", 5: " star"}


def decode(ids: Any) -> str:
    """A tokenizer of which 3 is the first half of a character, and 4 the other."""
    return "".join(WORDS[i] for i in ids).replace("\ufffd", "é" if 4 in ids else "\ufffd")


def step_of(index: int, generation: int, ids: list[list[int]], rows: list[SampleStep]) -> Any:
    masks = VideoMasks(torch.ones(4, 2, dtype=torch.bool), None, (1, 2))
    return SimpleNamespace(
        index=index,
        generation=generation,
        ids=torch.tensor(ids),
        samples=rows,
        videos=[[masks]] * len(rows),
    )


@pytest.mark.parametrize("row", [0, 1])
def test_words_go_with_the_forward_that_wrote_them(row: int) -> None:
    events: list[Event] = []
    steps = Steps([clip()], decode, events.append, row=row)
    fed = [[9, 9, 9], [1], [2], [3], [4]]
    for i, ids in enumerate(fed):
        other = [7] * len(ids)
        rows = [row_of([i], []), row_of([7 - i], [])]
        steps(step_of(i, 5, [ids, other] if row == 0 else [other, ids], rows))
        steps(step_of(i, 6, [[7], [7]], rows))  # another generation, inside this one
        assert len(events) == 1 + i
    steps.finish(5)
    assert [event["event"] for event in events] == ["start"] + ["word"] * 5
    words = events[1:]
    assert [word["text"] for word in words] == ["a", " red", "", "é", " star"]
    assert [word["index"] for word in words] == list(range(5))
    for i, word in enumerate(words):
        assert bits(word["active"], 8) == [v == (7 - i if row else i) for v in range(8)]


def test_an_answer_without_a_word() -> None:
    events: list[Event] = []
    steps = Steps([clip()], decode, events.append)
    steps.finish(1)  # nothing was heard: there is nothing that it could belong to
    steps(step_of(0, 5, [[9]], [row_of([], [])]))
    steps.finish(None)
    assert [event["event"] for event in events] == ["start"]


def test_a_row_that_is_complete_hears_no_more_of_its_batch() -> None:
    events: list[Event] = []
    done: list[bool] = []
    steps = Steps([clip()], decode, events.append, ended=lambda: bool(done))
    for i, fed in enumerate(([9], [1], [5], [0], [0])):
        if fed == [5]:
            done.append(True)
        steps(step_of(i, 5, [fed], [row_of([i], [])]))
    steps.finish(5)
    assert [event.get("text") for event in events] == [None, "a", " star"]
