"""The page's routes over HTTP: answers with their steps, and what is refused."""

from __future__ import annotations

import base64
import http.client
import json
import queue
import re
import socket
import sys
import threading
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import clips
import pytest
from typer.testing import CliRunner
from viewing import Served

from dycoke import nano
from dycoke.methods import create
from dycoke.nano import stories
from dycoke.video import read

STORY = 3
QUESTION = stories.DESCRIBE[0]


def call(
    served: Served, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, data


def ask(served: Served, body: bytes | None = None, **values: Any) -> tuple[int, list[Any]]:
    """Status and events of an answer; of a refusal, its message alone."""
    query = urlencode({"question": QUESTION, **values})
    status, _, data = call(served, f"/viewer/ask?{query}", "POST", body)
    if status != 200:
        return status, [json.loads(data)["error"]["message"]]
    return status, [json.loads(line) for line in data.splitlines()]


def bits(text: str, count: int) -> list[bool]:
    data = base64.b64decode(text)
    return [bool(data[i >> 3] >> (i & 7) & 1) for i in range(count)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories.write(
        stories.make("seen", STORY), tmp_path_factory.mktemp("clips") / "story.mp4"
    )


@pytest.mark.parametrize("method", ["dycoke", "dycoke+", "full"])
@pytest.mark.parametrize("way", ["story", "body"])
def test_answers_and_steps_are_those_of_ask(
    served: Served, story: Path, method: str, way: str
) -> None:
    expected = served.viewer.assistant.ask(
        read(story, 24), QUESTION, create(method), max_new_tokens=128, trace=True
    )
    if way == "story":
        status, events = ask(served, story=STORY, method=method)
    else:
        status, events = ask(served, story.read_bytes(), method=method, name="story.mp4")
    assert status == 200
    start, *words, done = events
    assert [e["event"] for e in events] == ["start", *["word"] * len(expected.tokens), "done"]
    assert done["text"] == expected.text == "".join(word["text"] for word in words).strip()
    (shown,) = start["videos"]
    assert (shown["grid"], shown["tokens"], len(shown["frames"])) == ([6, 6], 864, 24)
    assert start["truth"] == (
        stories.describe(stories.make("seen", STORY)) if way == "story" else None
    )
    if expected.trace is None:
        assert all(all(bits(word["active"], 864)) for word in words)
        assert all("attention" in word for word in words[1:])
        return
    sample = expected.trace.samples[0]
    assert bits(shown["keep"], 864) == sample.keep[0].flatten().tolist()
    kept = int(sample.keep[0].sum())
    before = None
    for word, active, attention in zip(words[1:], sample.active, sample.attention, strict=True):
        assert bits(word["active"], kept) == active.tolist()
        if before is not None:
            assert bits(word["recalled"], kept) == (active & ~before).tolist()
        before = active
        top = base64.b64decode(word["attention"])
        assert word["top"] == pytest.approx(float(attention.max()), rel=1e-6)
        assert top.index(255) == int(attention.argmax())
    assert done["report"]["samples"][0]["recalled_tokens"] == sum(
        sum(bits(word["recalled"], kept)) for word in words
    )
    assert done["report"]["kv_bytes"] == expected.report.kv_bytes


def test_what_the_encoder_left_out(served: Served) -> None:
    settings = json.dumps({"skip_ratio": 0.5})
    _, events = ask(served, story=STORY, method="dycoke", settings=settings, words=2)
    report = events[-1]["report"]["samples"][0]["videos"][0]
    assert sum(bits(events[0]["videos"][0]["encoded"], 864)) == report["encoded_tokens"] < 864


def test_the_length_of_an_answer_is_limited(served: Served) -> None:
    _, events = ask(served, story=STORY, words=3)
    assert [event["event"] for event in events] == ["start", "word", "word", "word", "done"]


BAD = [
    ({"question": " "}, None, 400, "there is no question"),
    ({"question": "x" * 4001}, None, 400, "longer than 4000 characters"),
    ({"story": "three"}, None, 400, "story must be a number from 0 .* got 'three'"),
    ({"story": 3, "frames": 0}, None, 400, "frames must be a number from 1 to 128, got '0'"),
    ({"story": 3, "frames": "²"}, None, 400, "frames must be a number"),
    ({"story": 3, "words": 10**6}, None, 400, "words must be a number from 1 to 512"),
    ({"story": 3, "method": "magic"}, None, 400, "unknown method 'magic'; there are full, dycoke"),
    ({"story": 3, "settings": "{"}, None, 400, "Expecting"),
    ({"story": 3, "settings": "[1]"}, None, 400, "settings must be an object"),
    ({"story": 3, "settings": '{"merge_ratio": NaN}'}, None, 400, "NaN is no number of JSON"),
    ({"story": 3, "settings": '{"speed": 9}'}, None, 400, "DyCoke has no setting 'speed'"),
    ({}, None, 400, "there is no clip"),
    ({"sizes": "3,4"}, b"12345", 400, "sizes say 7 bytes, and the body has 5"),
    ({"sizes": "5,-1"}, b"12345", 400, "sizes must be up to 8 lengths in bytes, got '5,-1'"),
    ({"sizes": "5,0"}, b"12345", 400, "sizes must be"),
    ({"sizes": ",".join("1" * 9)}, b"123456789", 400, "sizes must be"),
    ({"sizes": "9" * 5000}, b"1", 400, "sizes must be"),
    ({"story": 3, "frames": "9" * 5000}, None, 400, "frames must be a number"),
    ({"story": 3, "settings": "[" * 9000}, None, 400, "."),
    ({"story": 3, "settings": '{"merge_ratio": "\\ud800"}'}, None, 400, "not JSON"),
    ({"story": 3, "settings": '{"\\ud800": 1}', "method": "full"}, None, 400, "not JSON"),
    ({}, b"", 400, "there is no clip"),
    ({"name": "../../notes.txt"}, b"not a video" * 99, 422, "notes.txt"),
    ({}, b"0" * ((1 << 20) + 1), 413, "larger than 1 MiB"),
]


@pytest.mark.parametrize(("values", "body", "status", "message"), BAD)
def test_what_is_refused(
    served: Served, values: Any, body: bytes | None, status: int, message: str
) -> None:
    got, (said,) = ask(served, body, **values)
    assert got == status and re.search(message, said)
    assert "/tmp" not in said and "/clip" not in said and ".." not in said
    assert "\n" not in said


def test_a_large_body_without_a_length_is_stopped(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    parts = (bytes(1 << 16) for _ in range(17))
    connection.request(
        "POST",
        "/viewer/ask?question=a",
        parts,
        encode_chunked=True,
        headers={"transfer-encoding": "chunked"},
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_another_sites_page_may_not_ask(served: Served) -> None:
    path = f"/viewer/ask?{urlencode({'question': QUESTION, 'story': STORY, 'words': 1})}"
    status, _, data = call(served, path, "POST", origin="http://example.com")
    assert status == 403 and b"a page of http://example.com may not ask here" in data
    assert call(served, path, "POST", origin="http://[")[0] == 403
    assert call(served, path, "POST", origin=served.url)[0] == 200


def test_too_many_questions_are_refused(served: Served, monkeypatch: Any) -> None:
    def full(job: Any) -> None:
        raise queue.Full

    monkeypatch.setattr(served.viewer, "_submit", full)
    status, (message,) = ask(served, story=STORY)
    assert status == 429 and message == "too many questions are waiting; try again"


def test_a_fault_inside_an_answer_is_its_last_event(served: Served, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(served.viewer, "_generate", fail)
    assert ask(served, story=STORY)[1] == [
        {"event": "error", "message": "RuntimeError: out of luck"}
    ]
    monkeypatch.undo()
    assert ask(served, story=STORY, words=1)[1][-1]["event"] == "done"


def test_two_at_once_get_their_own_answers(served: Served) -> None:
    texts: dict[int, str] = {}

    def one(seed: int) -> None:
        texts[seed] = ask(served, story=seed, method="full")[1][-1]["text"]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in (3, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {seed: stories.describe(stories.make("seen", seed)) for seed in (3, 18)}


def test_who_leaves_ends_the_answer(served: Served, monkeypatch: Any) -> None:
    """The model is free again long before the answer's end."""
    told, gate, ended = [], threading.Semaphore(0), threading.Event()
    inner, answer = served.viewer._generate, served.viewer._answer

    def slowly(asked: Any, videos: Any, on_step: Any) -> Any:
        def step(one: Any) -> None:
            told.append(one.index)
            on_step(one)
            gate.acquire(timeout=30)

        return inner(asked, videos, step)

    def watched(*args: Any) -> None:
        answer(*args)
        ended.set()

    monkeypatch.setattr(served.viewer, "_generate", slowly)
    monkeypatch.setattr(served.viewer, "_answer", watched)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        path = f"/viewer/ask?{urlencode({'question': QUESTION, 'story': STORY})}"
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 200")
    while not ended.wait(0.6):  # a connection is looked at twice a second
        gate.release()
    assert len(told) < 12  # of 26
    monkeypatch.undo()
    assert ask(served, story=STORY, words=1)[1][-1]["event"] == "done"


def test_files_of_the_page(served: Served) -> None:
    total = 0
    for path in ("/", "/viewer/page.css", "/viewer/page.js", "/viewer/favicon.svg"):
        status, headers, data = call(served, path)
        assert status == 200 and headers["content-security-policy"].startswith("default-src 'self'")
        total += len(data)
    folder = resources.files("dycoke.serve").joinpath("static")
    assert total == sum(len(file.read_bytes()) for file in folder.iterdir()) < 60_000
    assert call(served, "/viewer/other.js")[0] == 404


def test_the_page_names_no_other_host() -> None:
    for file in resources.files("dycoke.serve").joinpath("static").iterdir():
        found = re.findall(r"(?:https?:)?//[a-z][^\s\"')]*", file.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, file.name


def test_what_the_page_is_told(served: Served) -> None:
    config = json.loads(call(served, "/viewer/config")[2])
    assert (config["model"], config["frames"], config["max_bytes"]) == ("nano", 24, 1 << 20)
    names = [method["name"] for method in config["methods"]]
    assert names[:2] == ["dycoke", "dycoke+"] and "full" not in names
    for seed in config["stories"]:
        status, headers, data = call(served, f"/viewer/stories/{seed}.jpg")
        assert (status, headers["content-type"], data[:2]) == (200, "image/jpeg", b"\xff\xd8")
    for other in ("2", "03", "x", "9" * 5000):
        assert call(served, f"/viewer/stories/{other}.jpg")[0] == 404


def test_several_clips_are_one_prompt(served: Served, story: Path, tmp_path: Path) -> None:
    """Of other sizes and frames each; sets of tokens are of one behind the other."""
    wide = clips.render(tmp_path / "wide.mp4", 4, size=(64, 128))
    parts = [wide.read_bytes(), story.read_bytes()]
    sizes = ",".join(str(len(part)) for part in parts)
    _, events = ask(served, b"".join(parts), frames=4, words=3, sizes=sizes, method="dycoke")
    assert [event["event"] for event in events] == ["start", *["word"] * 3, "done"]
    one, other = events[0]["videos"]
    assert (one["size"], other["size"]) == ([64, 128], [96, 96])
    assert len(one["frames"]) == len(other["frames"]) == 4
    (sample,) = events[-1]["report"]["samples"]
    kept = [sum(bits(video["keep"], video["tokens"])) for video in (one, other)]
    assert [video["kept_tokens"] for video in sample["videos"]] == kept
    assert len(base64.b64decode(events[2]["attention"])) == sum(kept)
    bad = ask(served, parts[0] + b"none", frames=4, sizes=f"{len(parts[0])},4", name="wide.mp4")
    assert bad[0] == 422 and "the clip" in bad[1][0]


def test_a_clip_of_another_shape(served: Served, tmp_path: Path) -> None:
    path = clips.render(tmp_path / "wide.mp4", 4, size=(64, 128))
    _, events = ask(served, path.read_bytes(), frames=4, words=2)
    assert (shown := events[0]["videos"][0])["size"] == [64, 128] and len(shown["frames"]) == 4
    assert events[-1]["event"] == "done"


def test_view_without_a_web_server_says_what_to_install(monkeypatch: Any) -> None:
    from dycoke.cli.console import BadInput
    from dycoke.cli.main import app

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["view", "--no-browser"])
    assert isinstance(result.exception, BadInput)
    assert "pip install 'dycoke[serve]'" in str(result.exception)


def test_view_says_where_it_listens_and_that_a_port_is_taken(served: Served) -> None:
    from dycoke.cli.console import BadInput
    from dycoke.cli.main import app

    result = CliRunner().invoke(app, ["view", "--no-browser", "--port", str(served.port)])
    assert isinstance(result.exception, BadInput)
    assert f"cannot listen on 127.0.0.1:{served.port}" in str(result.exception)
    assert "choose another --port" in str(result.exception)


def test_view_opens_the_page(monkeypatch: Any, served: Served) -> None:
    """The whole command, but for the server's own loop."""
    import webbrowser

    import uvicorn

    from dycoke.cli.main import app

    opened: list[str] = []
    ran: list[Any] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: ran.append(sockets))
    monkeypatch.setattr("dycoke.cli.view.load_assistant", lambda *a, **k: served.viewer.assistant)
    result = CliRunner().invoke(app, ["view", "--port", "0"])
    assert result.exception is None
    (url,) = opened
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url) and f"watch it at {url}" in result.output
    assert len(ran) == 1 and nano.is_trained()


def test_view_answers_as_serve_does_with_the_page(monkeypatch: Any, served: Served) -> None:
    from dycoke.cli.main import app

    made: list[Any] = []
    assistant = served.viewer.assistant
    for name in ("serve", "view"):
        monkeypatch.setattr(f"dycoke.cli.{name}.load_assistant", lambda *a, **k: assistant)
        monkeypatch.setattr(f"dycoke.cli.{name}.run", lambda make, *a, **k: made.append(make()))
    for arguments in (["serve", "--viewer"], ["view"]):
        assert CliRunner().invoke(app, arguments).exception is None
    one, other = (server.settings for server in made)
    for name in ("name", "compressor", "method", "viewer", "frames", "max_pixels", "max_tokens"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.compressor == create("dycoke+")
    for server in made:
        server.stop()
