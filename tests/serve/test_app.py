"""The server as clients meet it: OpenAI's own client, and requests that no client would send."""

from __future__ import annotations

import base64
import functools
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from serving import FRAMES, ask_about, data_url, listening

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.methods import create
from dycoke.nano import stories
from dycoke.serve import app
from dycoke.serve.app import Server, Settings
from dycoke.serve.protocol import parse_chat

openai = pytest.importorskip("openai")

TELL = stories.DESCRIBE[0]
# 35 bytes that ask for a picture of 200 MB.
BOMB = (
    b"GIF89a\x00\x20\x01\x20\x80\0\0\0\0\0\xff\xff\xff"
    b",\0\0\0\0\x00\x20\x01\x20\0\x02\x02\x4c\x01\0;"
)


@pytest.fixture
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


@pytest.fixture
def ask(client: Any, clip: Callable[[int], Path]) -> Callable[..., Any]:
    def call(story: int = 301, question: str = TELL, **more: Any) -> Any:
        given = {"messages": ask_about(data_url(clip(story)), question), **more}
        return client.chat.completions.create(model="nano", **given)

    return call


def alone(nano: Assistant, file: Path, method: Any = None, most: int = 256) -> Any:
    return nano.ask(file, TELL, method, frames=FRAMES, max_new_tokens=most)


def test_an_answer_is_that_of_dycoke_run(
    nano: Assistant, clip: Callable[[int], Path], ask: Any
) -> None:
    for extra, method in (
        ({}, create("dycoke")),
        ({"off": True}, None),
        ({"method": "dycoke+"}, create("dycoke+")),
        ({"merge_ratio": 0.5, "prune_ratio": 0}, DyCoke(merge_ratio=0.5, prune_ratio=0)),
        ({"method": "visionzip", "retention": 0.4}, create("visionzip", retention=0.4)),
    ):
        expected = alone(nano, clip(301), method=method)
        got = ask(extra_body={"dycoke": extra} if extra else None)
        (choice,) = got.choices
        assert choice.message.content == expected.text
        assert (choice.finish_reason, got.model) == ("stop", "nano")
        assert got.usage.completion_tokens == len(expected.tokens)
        assert got.usage.prompt_tokens == 877
        details = got.usage.prompt_tokens_details
        assert details.video_tokens == 864
        if method is None:
            assert details.video_tokens_kept == 864
        else:
            assert got.dycoke["samples"] == expected.report.to_dict()["samples"]
            assert details.video_tokens_kept == got.dycoke["samples"][0]["kept_tokens"] < 864


def test_visual_tokens_are_counted_for_the_full_model_too(
    clip: Callable[[int], Path], ask: Any
) -> None:
    """A first question, one about a kept video, and one about two."""
    parts = [
        part for seed in (301, 302) for part in ask_about(data_url(clip(seed)), "x")[0]["content"]
    ]
    counted = []
    for more in ({}, {}, {"messages": [{"role": "user", "content": parts}]}):
        got = ask(314, max_tokens=2, extra_body={"dycoke": {"off": True}}, **more)
        details = got.usage.prompt_tokens_details
        counted.append((details.video_tokens, details.video_tokens_kept, details.cached_tokens > 0))
    assert counted == [(864, 864, False), (864, 864, True), (1728, 1728, False)]


def test_a_stream_says_the_same(nano: Assistant, clip: Callable[[int], Path], ask: Any) -> None:
    expected = alone(nano, clip(302), method=create("dycoke"))
    chunks = list(ask(302, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    words = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(words) == expected.text and len(words) > 10
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == "stop" and set(ends[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert chunks[-2].dycoke["samples"] == expected.report.to_dict()["samples"]
    assert all(c.usage is None for c in ask(302, stream=True))


def test_many_at_once_are_each_answered_about_their_own_clip(
    nano: Assistant, clip: Callable[[int], Path], ask: Any, server: Server
) -> None:
    seeds = range(301, 309)
    before = len(server.worker.batches)
    with ThreadPoolExecutor(8) as pool:
        whole = pool.map(lambda seed: ask(seed, max_tokens=12), seeds)
        texts = [got.choices[0].message.content for got in whole]
    assert texts == [alone(nano, clip(seed), create("dycoke"), 12).text for seed in seeds]
    assert sum(list(server.worker.batches)[before:]) == 8


def test_limits_and_stops(ask: Any, nano: Assistant, clip: Callable[[int], Path]) -> None:
    text = alone(nano, clip(301), method=create("dycoke")).text
    short = ask(max_tokens=3)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")
    word = text.split()[2]
    assert ask(stop=[word]).choices[0].message.content == text[: text.index(word)].rstrip()
    hot = {"temperature": 2.0, "max_tokens": 12}
    one, again, other = (ask(**hot, seed=seed).choices[0].message.content for seed in (4, 4, 5))
    assert one == again != other


def test_a_conversation_goes_on(ask: Any, clip: Callable[[int], Path], server: Server) -> None:
    first = ask_about(data_url(clip(301)), TELL)
    told = ask().choices[0].message.content
    hits = server.worker.cache.hits
    turns = [
        *first,
        {"role": "assistant", "content": told},
        {"role": "user", "content": "How many events are there?"},
    ]
    later = ask(messages=turns)
    assert later.choices[0].message.content
    assert server.worker.cache.hits == hits + 1
    assert later.usage.prompt_tokens_details.cached_tokens > 800


def test_a_video_is_processed_once(
    nano: Assistant, clip: Callable[[int], Path], ask: Any, server: Server, monkeypatch: Any
) -> None:
    """The first question takes the processor once, the next ones the tokenizer alone."""
    counted: list[str] = []
    for whose, assistant in (("reader", server._reader), ("own", nano)):
        inner = assistant.processor.video_processor
        monkeypatch.setattr(
            assistant.processor,
            "video_processor",
            Counting(inner, functools.partial(counted.append, whose)),
        )
    questions = (TELL, "How many events are there?", "What stays still?")
    texts = [ask(313, question=question).choices[0].message.content for question in questions]
    assert counted == ["reader"]
    for question, text in zip(questions, texts, strict=True):
        alone = nano.ask(clip(313), question, create("dycoke"), frames=FRAMES, max_new_tokens=256)
        assert text == alone.text
    assert len(set(texts)) == 3


def test_words_that_stand_for_a_picture_are_to_kept_videos_what_they_are_to_others(
    ask: Any,
) -> None:
    """Refused, where the processor refuses them; the oldest supported one takes an image's."""

    def refused(story: int, question: str) -> bool:
        try:
            ask(story, question=question, max_tokens=1)
        except openai.BadRequestError:
            return True
        return False

    ask(315, max_tokens=1)
    for story, question in ((316, "What is <image>?"), (317, "What is <video>?")):
        assert refused(315, question) == refused(story, question)
    assert refused(315, "What is <video>?")
    assert ask(315, max_tokens=1).usage.prompt_tokens_details.cached_tokens > 800


class Counting:
    """A video processor, and how often it was called."""

    def __init__(self, inner: Any, called: Callable[[], None]) -> None:
        self._inner, self._called = inner, called

    def __call__(self, *args: Any, **more: Any) -> Any:
        self._called()
        return self._inner(*args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_two_videos_images_and_plain_text(ask: Any, clip: Callable[[int], Path]) -> None:
    parts = [
        part for seed in (301, 302) for part in ask_about(data_url(clip(seed)), "x")[0]["content"]
    ]
    both = ask(messages=[{"role": "user", "content": parts}])
    assert both.usage.prompt_tokens_details.video_tokens == 2 * 864
    assert [video["frames"] for video in both.dycoke["samples"][0]["videos"]] == [24, 24]
    plain = ask(messages=[{"role": "user", "content": "hello"}])
    assert plain.usage.prompt_tokens < 50


def test_frames_are_chosen_per_request(ask: Any) -> None:
    for given, frames in (({"num_frames": 9}, 9), ({"fps": 4}, 12)):
        got = ask(extra_body={"media_io_kwargs": {"video": given}})
        assert got.dycoke["samples"][0]["frames"] == frames


def test_who_leaves_ends_the_answer(ask: Any, server: Server) -> None:
    made: list[Any] = []
    submit = server.worker.submit
    server.worker.submit = lambda job: (made.append(job), submit(job))[1]  # type: ignore
    try:
        stream = ask(
            stream=True, max_tokens=4000, stop=None, extra_body={"repetition_penalty": 9.0}
        )
        for _, _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        ask(max_tokens=1)  # answered after it
    finally:
        server.worker.submit = submit  # type: ignore[method-assign]
    row = made[0].row
    assert row.finish_reason in ("cancelled", "stop") and len(row.ids) < 200


def test_files(ask: Any, folder: Path, clip: Callable[[int], Path]) -> None:
    (folder / "my clip.mp4").write_bytes(clip(301).read_bytes())
    (folder / "escape.mp4").symlink_to(clip(302))
    found = ask(messages=ask_about(f"file://{folder}/my%20clip.mp4", TELL))
    assert found.choices[0].message.content == ask(301).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="not below the allowed folder"):
        ask(messages=ask_about(f"file://{folder}/escape.mp4", TELL))


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ({"model": "gpt-4o"}, 404, "'gpt-4o' does not exist"),
        ({"n": 2}, 400, "n must be 1"),
        ({"max_tokens": 100_000}, 400, "max_tokens must be at most"),
        ({"dycoke": {"method": "nothing"}}, 400, "unknown method 'nothing'"),
        ({"dycoke": {"merge_ratio": 7}}, 400, "merge_ratio must be in"),
        ({"dycoke": {"merge_ratio": "7"}}, 400, "merge_ratio must be a number"),
        ({"dycoke": {"ratio": 0.5}}, 400, "DyCoke has no setting 'ratio'"),
        ({"dycoke": {"off": True, "echo": 1}}, 400, "off must be true, alone"),
        ({"dycoke": {"token_budget": [5]}}, 400, "token_budget"),
        ({"media_io_kwargs": {"video": {"num_frames": 65}}}, 400, "65 frames are more than"),
        ({"media_io_kwargs": {"video": {"fps": 1.7e308}}}, 400, "65 frames are more than"),
        ({"messages": ask_about("data:video/mp4;base64,", "x")}, 422, "video:"),
        ({"messages": ask_about("data:video/mp4;base64,AAAA", "x")}, 422, "video:"),
        ({"messages": ask_about("data:," + quote(BOMB), "x")}, 422, "of 8192 x 8193 pixels, more"),
        ({"messages": ask_about("data:text/plain,#EXTM3U%0A/etc/passwd", "x")}, 422, "video:"),
        ({"messages": ask_about("file:///etc/passwd", "x")}, 400, "not below the allowed"),
        ({"messages": ask_about("http://127.0.0.1/x", "x")}, 400, "no allowed domain"),
        ({"messages": ask_about("data:," + "x" * (1 << 21), "x")}, 413, "larger than the limit"),
        ({"messages": [{"role": "user", "content": "a " * 40_000}]}, 400, "more than the model's"),
        ({"temperature": -1}, 400, "temperature"),
    ],
)  # fmt: skip
def test_bad_requests(address: str, clip: Any, more: Any, status: int, says: str) -> None:
    body = {"messages": ask_about(data_url(clip(301)), TELL), **more}
    for stream in (False, True):
        got = httpx.post(
            f"{address}/v1/chat/completions", json={**body, "stream": stream}, timeout=60
        )
        error = got.json()["error"]
        assert (got.status_code, says in error["message"]) == (status, True), error
        assert "\n" not in error["message"] and "/tmp" not in error["message"]


def test_bodies_that_are_none(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    assert httpx.post(url, content=b"{", headers=json_type).status_code == 400
    assert httpx.post(url, content=b'{"n": NaN}', headers=json_type).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    huge = httpx.post(url, content=b" " * (8 << 20), headers=json_type)
    assert huge.status_code == 413
    assert httpx.get(url).status_code == 405
    missing = httpx.get(f"{address}/v2")
    assert missing.status_code == 404 and "/v1/models" in missing.json()["error"]["message"]


def test_a_fault_outside_of_requests_has_the_form_of_all_errors(
    address: str, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("/home/somebody")

    monkeypatch.setattr(app, "parse_chat", fail)
    got = httpx.post(f"{address}/v1/chat/completions", json={})
    assert got.status_code == 500
    error = got.json()["error"]
    assert (error["message"], error["type"]) == ("KeyError in the server", "server_error")


def test_small_routes(address: str, client: Any, ask: Any) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert httpx.get(f"{address}/version").json()["version"]
    ask(max_tokens=2)
    text = httpx.get(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values['dycoke_requests_total{status="200"}']) >= 1
    assert float(values["dycoke_visual_tokens_total"]) > float(
        values["dycoke_visual_tokens_kept_total"]
    )
    named = httpx.get(f"{address}/health", headers={"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"
    assert len(httpx.get(f"{address}/health").headers["x-request-id"]) == 32


def test_extremes_are_answered_or_refused(ask: Any) -> None:
    for more in (
        {"temperature": 1e-300},
        {"temperature": 100, "seed": -(10**30)},
        {"temperature": 1, "top_p": 1e-320, "extra_body": {"top_k": 10**12}},
        {"extra_body": {"repetition_penalty": 100}},
    ):
        assert ask(max_tokens=3, **more).usage.completion_tokens == 3
    one = {"type": "text", "text": "no " * 5000}
    long = ask(messages=[{"role": "user", "content": [one]}], max_tokens=2)
    assert long.usage.prompt_tokens > 5000
    bare = ask(messages=[{"role": "user", "content": []}], max_tokens=2)
    assert bare.usage.prompt_tokens < 20


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/viewer/ask?question=a"])
def test_a_body_that_does_not_come_is_not_waited_for(nano: Assistant, path: str) -> None:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        "content-length: 100000\r\n\r\n{"
    )
    with listening(Server(nano, Settings(patience=0.3, viewer=True))) as address:
        place = "127.0.0.1", int(address.rsplit(":", 1)[1])
        gone = [socket.create_connection(place, timeout=30) for _ in range(20)]
        for one in gone:
            one.sendall(head.encode())
        for one in gone[10:]:
            one.close()  # in the middle of its body
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
        for one in gone[:10]:
            assert one.recv(100).startswith(b"HTTP/1.1 408 ")
            one.close()


def test_who_leaves_a_batch_takes_nobody_with_it(
    nano: Assistant, clip: Callable[[int], Path], ask: Any, server: Server
) -> None:
    gate, before = threading.Event(), len(server.worker.batches)
    right = {seed: alone(nano, clip(seed), create("dycoke"), 40).text for seed in (301, 302)}

    def read_on(place: int) -> str | None:
        stream = ask(301 + place % 2, stream=True, max_tokens=40)
        words = []
        for chunk in stream:
            words.append(chunk.choices[0].delta.content or "")
            if place % 3 == 0 and len(words) > 4:
                stream.close()
                return None
        return "".join(words)

    server.worker.submit(functools.partial(_wait, gate))  # while it runs, all wait
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(read_on, place) for place in range(8)]
        while server.worker.waiting < 8:
            time.sleep(0.01)
        gate.set()
    told = [answer.result() for answer in answers]
    assert told == [None if place % 3 == 0 else right[301 + place % 2] for place in range(8)]
    assert sum(list(server.worker.batches)[before:]) == 8


def test_a_retention_alone_is_that_of_the_servers_own_method(nano: Assistant) -> None:
    server = Server(nano, Settings(compressor=create("dycoke+"), method="dycoke+"))
    for given, name in (({}, "dycoke+"), ({"method": "dycoke"}, "dycoke")):
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "dycoke": {"retention": 0.3, **given},
        }
        asked = parse_chat(body, ["nano"])
        assert server._compressor(asked) == create(name, retention=0.3)
    server.stop()


def test_keys(nano: Assistant) -> None:
    with listening(Server(nano, Settings(keys=("one", "two")))) as address:
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("on", 401)):
            got = httpx.get(f"{address}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert got.status_code == status
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_server_that_stops_finishes_what_it_began(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    begun, texts = threading.Event(), []

    def read_on(address: str) -> None:
        body = {"messages": ask_about(data_url(clip(301)), TELL), "stream": True}
        url = f"{address}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                begun.set()
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    texts.append(choice["delta"].get("content", ""))

    with listening(Server(nano, Settings(frames=FRAMES))) as address:
        thread = threading.Thread(target=read_on, args=(address,))
        thread.start()
        begun.wait(60)
    thread.join()
    assert "".join(texts) == alone(nano, clip(301)).text


def test_steps_come_with_the_words(ask: Any, nano: Assistant, clip: Callable[[int], Path]) -> None:
    text = alone(nano, clip(301), create("dycoke"), 12).text
    chunks = list(ask(stream=True, max_tokens=12, extra_body={"dycoke": {"steps": True}}))
    told: list[dict[str, Any]] = [getattr(chunk, "dycoke", None) or {} for chunk in chunks]
    events = [event for event in told if "event" in event]
    assert [event["event"] for event in events] == ["start"] + ["word"] * 12
    (shown,) = events[0]["videos"]
    assert (shown["tokens"], len(shown["frames"])) == (864, 24)
    assert "".join(event["text"] for event in events[1:]).strip() == text
    words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(words) == text
    chunks = list(
        ask(stream=True, max_tokens=4, extra_body={"dycoke": {"off": True, "steps": True}})
    )
    told = [getattr(chunk, "dycoke", None) or {} for chunk in chunks]
    start, *full = [event for event in told if "event" in event]
    every = base64.b64encode(b"\xff" * 108).decode()  # 864 tokens
    assert (
        start["videos"][0]["keep"] == every and [event["active"] for event in full] == [every] * 4
    )
    words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(words) == alone(nano, clip(301), None, 4).text
    two = [part for _ in range(2) for part in ask_about(data_url(clip(301)), "x")[0]["content"]]
    more: Any = {"extra_body": {"dycoke": {"steps": True}}, "stream": True, "max_tokens": 3}
    chunks = list(ask(messages=[{"role": "user", "content": two}], **more))
    told = [getattr(chunk, "dycoke", None) or {} for chunk in chunks]
    (start,) = [event for event in told if event.get("event") == "start"]
    assert [video["tokens"] for video in start["videos"]] == [864, 864]
    with pytest.raises(openai.BadRequestError, match="steps are of videos, and there is none"):
        ask(messages=[{"role": "user", "content": "hello"}], **more)


def _wait(gate: threading.Event) -> None:
    gate.wait(30)


def test_a_row_that_is_complete_hears_no_more_of_its_batch(ask: Any, server: Server) -> None:
    gate, limits = threading.Event(), (3, 9)

    def words(limit: int) -> list[str]:
        chunks = ask(stream=True, max_tokens=limit, extra_body={"dycoke": {"steps": True}})
        told: list[dict[str, Any]] = [getattr(chunk, "dycoke", None) or {} for chunk in chunks]
        return [event["text"] for event in told if event.get("event") == "word"]

    alone = [words(limit) for limit in limits]
    server.worker.submit(functools.partial(_wait, gate))  # while it runs, both wait
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(words, limit) for limit in limits]
        while server.worker.waiting < 2:
            time.sleep(0.01)
        gate.set()
    assert server.worker.batches[-1] == 2
    assert [answer.result() for answer in answers] == alone
    assert [len(one) for one in alone] == list(limits)


def test_the_page_asks_through_the_same_queue(nano: Assistant) -> None:
    server = Server(nano, Settings(viewer=True))
    with listening(server) as address:
        assert "<html" in httpx.get(f"{address}/").text
        query: dict[str, Any] = {"story": 3, "question": TELL, "method": "dycoke", "words": 5}
        got = httpx.post(f"{address}/viewer/ask", params=query, timeout=60)
    events = [json.loads(line) for line in got.text.splitlines()]
    assert [event["event"] for event in events] == ["start", *["word"] * 5, "done"]
