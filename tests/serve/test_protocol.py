"""What requests may say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke.serve.protocol import (
    MOST_TEXT,
    REFUSED,
    ApiError,
    ChatRequest,
    Media,
    as_api_error,
    parse_chat,
    parse_json,
)

HELLO = [{"role": "user", "content": "hello"}]


def parse(**more: Any) -> ChatRequest:
    return parse_chat({"messages": HELLO, **more}, ["nano"])


def refused(status: int = 400, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**more)
    assert caught.value.status == status
    body = caught.value.body["error"]
    assert body["message"] and body["type"] == "invalid_request_error"
    return caught.value


def test_the_least() -> None:
    asked = parse()
    assert asked.turns == ({"role": "user", "content": [{"type": "text", "text": "hello"}]},)
    assert (asked.media, asked.sampling, asked.max_tokens, asked.compress) == ((), {}, None, None)


def test_parts_keep_their_order() -> None:
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}
    dify = {"type": "image_url", "image_url": {"url": "DATA:VIDEO/mp4;base64,BB"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,CC"}}
    content = [{"type": "text", "text": "a"}, video, dify, image, {"type": "text", "text": "b"}]
    asked = parse(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": content},
        ]
    )
    assert asked.turns[0]["role"] == "system"
    assert [part["type"] for part in asked.turns[1]["content"]] == [
        "text", "video", "video", "image", "text",
    ]  # fmt: skip
    assert asked.media == (
        Media("video", "data:video/mp4;base64,AA"),
        Media("video", "DATA:VIDEO/mp4;base64,BB"),
        Media("image", "data:image/png;base64,CC"),
    )


def test_all_that_is_understood() -> None:
    asked = parse(
        model="nano", max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=5,
        repetition_penalty=1.1, stop="x", stream=True, stream_options={"include_usage": True},
        media_io_kwargs={"video": {"num_frames": 9}}, n=1, unknown="ignored",
        dycoke={"method": "dycoke", "merge_ratio": 0.5, "steps": True},
        response_format={"type": "text"}, frequency_penalty=0,
    )  # fmt: skip
    assert (asked.max_tokens, asked.stop, asked.seed, asked.frames) == (7, ("x",), 5, 9)
    assert (asked.stream, asked.usage, asked.steps) == (True, True, True)
    assert asked.compress == {"method": "dycoke", "merge_ratio": 0.5}
    assert asked.sampling == {
        "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    assert parse(max_tokens=3, max_completion_tokens=5).max_tokens == 5
    assert parse(temperature=0, top_k=3).sampling == {}
    assert parse(repetition_penalty=1).sampling == {"repetition_penalty": 1.0}
    made = parse(temperature=1e-300, repetition_penalty=2, top_p=1).sampling
    assert made["temperature"] == 0.01  # floats, which transformers insists on
    assert {type(value) for name, value in made.items() if "_p" in name} == {float}
    assert parse(media_io_kwargs={"video": {"fps": 0.5}}).fps == 0.5


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_the_answer_is_refused_by_name(name: str) -> None:
    """And what clients send of it where it would change nothing is not."""
    assert parse(**{name: None}) == parse(**{name: False}) == parse()
    given: dict[str, Any] = {name: [1]}
    error = refused(**given)
    assert error.param == name and name in str(error)


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"messages": None}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [3]}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * (MOST_TEXT + 1)}]}, 413, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": 5}, 400, "max_completion_tokens"),
        ({"max_tokens": 2.5}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"temperature": 10**400}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"seed": "x"}, 400, "seed"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": 5}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"media_io_kwargs": 5}, 400, "media_io_kwargs"),
        ({"media_io_kwargs": {"video": 5}}, 400, "media_io_kwargs"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, 400, "num_frames"),
        ({"media_io_kwargs": {"video": {"num_frames": 1, "fps": 1}}}, 400, "media_io_kwargs"),
        ({"dycoke": 5}, 400, "dycoke"),
        ({"dycoke": {"steps": "yes"}, "stream": True}, 400, "steps"),
        ({"dycoke": {"steps": True}}, 400, "dycoke"),
        ({"repetition_penalty": 1e-320}, 400, "repetition_penalty"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], status: int, param: str | None) -> None:
    assert refused(status, **more).param == param


def test_bounds_are_said_where_there_are_any() -> None:
    assert str(refused(seed="x")) == "seed must be a whole number, got 'x'"
    assert str(refused(top_p=2)) == "top_p must be a number above 0 and at most 1, got 2"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000,
                                  b'["\\ud800"]', b'{"\\uDFFF": 1}', b'["\xed\xa0\x80"]',
                                  '["é"]'.encode("utf-16")])  # fmt: skip
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_characters_of_two_halves() -> None:
    assert parse_json(b'["\\ud83d\\ude00", "\\u00e9"]') == ["😀", "é"]
    assert parse_json("\ufeff[1]".encode()) == [1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = ["model", "n", "max_tokens", "temperature", "stop", "stream", "dycoke", "media_io_kwargs",
         "messages", "role", "content", "type", "text", "video_url", "url", "seed", "top_k",
         "stream_options", "response_format"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), JSON), st.lists(JSON, max_size=2))
def test_whatever_comes_is_understood_or_refused(body: dict[str, Any], messages: Any) -> None:
    for own in (body, {"messages": HELLO, **body}, {**body, "messages": messages}):
        assert outcome(own) in (200, 400, 404, 413)


def outcome(body: Any) -> int:
    try:
        parse_chat(body, ["nano"])
    except ApiError as error:
        return error.status
    return 200


def test_what_an_error_quotes_can_be_sent() -> None:
    error = refused(404, model="x\n\ud800\u2028y")
    assert error.body["error"]["message"].encode()
    assert len(refused(404, model="x" * 100_000).body["error"]["message"]) < 1100
    assert ApiError(400, "\ud800").body["error"]["message"] == "\\ud800"


def test_errors_of_the_library(caplog: pytest.LogCaptureFixture) -> None:
    assert as_api_error(ValueError("bad")).status == 400
    assert as_api_error(RuntimeError("CUDA out of memory")).status == 503
    fault = as_api_error(KeyError("/home/somebody"))
    assert fault.status == 500 and "somebody" not in str(fault)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]
