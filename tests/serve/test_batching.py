"""Rows of a batch answer as each would alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.batching import Row, answer_rows, collate, pad_of
from dycoke.errors import UnsupportedError
from dycoke.methods import create
from dycoke.nano import stories
from dycoke.video import read

FRAMES = 24
ASKED = [
    (301, "What colour is the first thing?"),
    (302, stories.DESCRIBE[0]),
    (303, "How many events are there?"),
]


@pytest.mark.parametrize("method", ["full", "dycoke", "dycoke+", "random", "skipping"])
def test_rows_are_what_each_would_be_alone(
    nano: Assistant, clip: Callable[[int], Path], method: str
) -> None:
    compressor = DyCoke(skip_ratio=0.7) if method == "skipping" else create(method)
    inputs = [nano.prepare(read(clip(seed), FRAMES), asked) for seed, asked in ASKED]
    rows = [Row(64) for _ in ASKED]
    told = answer_rows(nano, collate(inputs, pad_of(nano)), rows, compressor)
    for (seed, asked), got in zip(ASKED, told, strict=True):
        alone = nano.ask(clip(seed), asked, compressor, frames=FRAMES, max_new_tokens=64)
        assert (got.text, got.tokens) == (alone.text, alone.tokens)
        assert got.finish_reason == alone.finish_reason == "stop"
        if method != "full":
            assert got.report is not None and alone.report is not None
            assert got.report.samples == alone.report.samples


def test_rows_stream_and_end_each_on_its_own(nano: Assistant, clip: Callable[[int], Path]) -> None:
    seed, asked = ASKED[1]
    whole = nano.ask(clip(seed), asked, frames=FRAMES).text
    words = whole.split()
    pieces: list[list[str]] = [[] for _ in range(5)]
    rows = [
        Row(64, on_token=lambda row, piece: pieces[0].append(piece)),
        Row(3, on_token=lambda row, piece: pieces[1].append(piece)),
        Row(64, (f" {words[3]}",), on_token=lambda row, piece: pieces[2].append(piece)),
        Row(
            64,
            on_token=lambda row, piece: pieces[3].append(piece),
            cancelled=lambda: len(pieces[3]) == 1,
        ),
        Row(64, (f"{words[1]} nowhere",), on_token=lambda row, piece: pieces[4].append(piece)),
    ]
    one = nano.prepare(read(clip(seed), FRAMES), asked)
    answers = answer_rows(nano, collate([one] * 5, pad_of(nano)), rows)
    assert [a.finish_reason for a in answers] == ["stop", "length", "stop", "cancelled", "stop"]
    assert answers[0].text == answers[4].text == whole
    assert len(answers[1].tokens) == 3 and whole.startswith(answers[1].text)
    assert answers[2].text == " ".join(words[:3])
    assert len(answers[3].tokens) == 2
    for answer, told in zip(answers, pieces, strict=True):
        assert "".join(told) == answer.text
        assert len(told) == len(answer.tokens)


class Letters:
    """A tokenizer of one character a token; 0 ends, and 1 2 are the halves of an é."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        text = "".join(chr(i) if i > 2 else f"<{i}>" for i in ids if i)
        return text.replace("<1><2>", "é").replace("<1>", "\ufffd")


@pytest.mark.parametrize(
    ("said", "stop", "text", "pieces"),
    [
        ("abcd", ("bcx",), "abcd", ["a", "", "", "bcd", ""]),
        ("abcd", ("bc",), "a", ["a", "", ""]),
        ("aabab", ("abab",), "a", ["", "a", "", "", ""]),
        ("a \x01\x02", (), "a é", ["a", "", "", " é", ""]),
        ("  a", (), "a", ["", "", "a", ""]),
    ],
)
def test_nothing_is_told_that_is_taken_back(
    said: str, stop: tuple[str, ...], text: str, pieces: list[str]
) -> None:
    told: list[str] = []
    row = Row(99, stop, on_token=lambda row, piece: told.append(piece))
    for letter in [*map(ord, said), 0]:
        if row.finish_reason is None:
            row.take(letter, Letters(), {0})
    assert (row.text, told) == (text, pieces)


def test_unlike_frames_are_refused_by_name(nano: Assistant, clip: Callable[[int], Path]) -> None:
    inputs: list[Any] = [nano.prepare(read(clip(301), n), "?") for n in (8, 12)]
    with pytest.raises(UnsupportedError, match="differ in number or size"):
        collate(inputs, 0)
    with pytest.raises(ValueError, match="1 prompts need as many rows, got 2"):
        answer_rows(nano, inputs[0], [Row(), Row()])
