"""The page's own routes: its files, the stories to choose from, and answers with their steps.

An answer is asked for with the clips as the request's body and comes as one JSON line per event
(`dycoke.serve.steps`), then ``done`` or ``error``. Whoever closes the connection ends the answer.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from dycoke import nano
from dycoke.assistant import Answer, Assistant
from dycoke.batching import Row, answer_rows
from dycoke.compressor import Compressor
from dycoke.core.steps import OnStep
from dycoke.errors import UnsupportedError
from dycoke.methods import METHODS, choose
from dycoke.nano import stories
from dycoke.serve import media
from dycoke.serve.bodies import read_body
from dycoke.serve.protocol import LOG, ApiError, parse_json
from dycoke.serve.steps import WATCHED_FULL, Event, Steps
from dycoke.serve.work import source_of
from dycoke.video import Video, read

Submit = Callable[[Callable[[], None]], Any]
"""Runs a job in the thread that generates, in turn; raises `queue.Full` where too many wait."""

FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "viewer/page.css": ("page.css", "text/css; charset=utf-8"),
    "viewer/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "viewer/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
# Nothing from another host, no script but the page's own.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
SHOWN = (3, 23, 14, 6, 18, 1)  # seeds of the stories that the page offers
LONGEST_QUESTION, MOST_FRAMES, MOST_WORDS = 4000, 128, 512
MOST_CLIPS = 8  # in one question
MAX_BYTES = 64 << 20
LOOK_EVERY = 0.5  # seconds after which a silent connection is looked at


class _Left(Exception):
    """Whoever asked has gone."""


class Viewer:
    """One model, shown while it answers.

    Parameters
    ----------
    assistant : the model; everything that runs it goes through ``submit``.
    name : what the page calls the model.
    submit : the server's own queue; None for one thread of this viewer's.
    max_bytes : the largest clip that is taken.
    patience : seconds in which the next piece of a clip must come.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        submit: Submit | None = None,
        max_bytes: int = MAX_BYTES,
        patience: float = 60.0,
    ) -> None:
        self.assistant, self.name = assistant, name
        self.max_bytes, self.patience = max_bytes, patience
        self._submit = submit or ThreadPoolExecutor(1, "dycoke-view").submit
        # The embedded model is at home in clips of as many frames as it was trained on.
        own = assistant.model.config.name_or_path == str(nano.path())
        self.frames = stories.FRAMES if own else 32

    def routes(self) -> list[BaseRoute]:
        """What a Starlette or FastAPI application takes in."""
        files: list[BaseRoute] = [
            Route(f"/{path}", functools.partial(_file, *names)) for path, names in FILES.items()
        ]
        return [
            *files,
            Route("/viewer/config", self._config),
            Route("/viewer/stories/{seed}.jpg", self._picture),
            Route("/viewer/ask", self._ask, methods=["POST"]),
        ]

    def app(self) -> Starlette:
        """An application of the page alone."""
        return Starlette(routes=self.routes())

    async def _config(self, request: Request) -> Response:
        methods = [{"name": n, "about": e.about} for n, e in METHODS.items() if n != "full"]
        return JSONResponse(
            {
                "model": self.name,
                "frames": self.frames,
                "max_bytes": self.max_bytes,
                "question": stories.DESCRIBE[0],
                "stories": list(SHOWN),
                "methods": methods,
            },
            headers=HEADERS,
        )

    async def _picture(self, request: Request) -> Response:
        told = request.path_params["seed"]
        seed = next((seed for seed in SHOWN if str(seed) == told), None)
        if seed is None:
            return _refusal(ApiError(404, f"there is no story {told[:40]} here"))
        picture = await asyncio.to_thread(story_picture, seed)
        return Response(picture, media_type="image/jpeg", headers=HEADERS)

    async def _ask(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            _same_origin(request)
            asked = Asked.of(request.query_params, self.frames)
            videos = await self._videos(request, asked)
            inbox = _Inbox()
            try:
                self._submit(functools.partial(self._answer, asked, videos, inbox, began))
            except Exception as error:
                raise ApiError(429, "too many questions are waiting; try again") from error
        except ApiError as error:
            return _refusal(error)
        return StreamingResponse(
            inbox.lines(request), media_type="application/x-ndjson", headers=HEADERS
        )

    async def _videos(self, request: Request, asked: Asked) -> list[Video]:
        """The story that was chosen, or the clips in the request's body."""
        if asked.story is not None:
            return [await asyncio.to_thread(story_video, asked.story, asked.frames)]
        too_large = ApiError(413, f"larger than {self.max_bytes >> 20} MiB")
        length = _whole(request.headers.get("content-length", "0"))
        if length is None or length > self.max_bytes:  # h11 lets digits through alone
            raise too_large
        data = await read_body(request, too_large, self.max_bytes, self.patience)
        if not data:
            raise ApiError(400, "there is no clip: the request's body is empty")
        sizes = asked.sizes or [len(data)]
        if sum(sizes) != len(data):
            raise ApiError(400, f"sizes say {sum(sizes)} bytes, and the body has {len(data)}")
        videos, at = [], 0
        for place, size in enumerate(sizes):
            clip, name = data[at : at + size], asked.file(place)
            videos.append(await asyncio.to_thread(clip_video, clip, name, asked.frames))
            at += size
        return videos

    def _generate(self, asked: Asked, videos: list[Video], on_step: OnStep) -> tuple[Answer, Row]:
        """Ask the model; in the thread that generates."""
        began, row = time.perf_counter(), Row(asked.words)
        content = [*({"type": "video"} for _ in videos), {"type": "text", "text": asked.question}]
        inputs = self.assistant.prepare_chat([{"role": "user", "content": content}], videos)
        (answer,) = answer_rows(
            self.assistant,
            inputs,
            [row],
            asked.method,
            on_step=on_step,
            frame_source=source_of(self.assistant, videos),
            before=(0.0, time.perf_counter() - began),
        )
        return answer, row

    def _answer(self, asked: Asked, videos: list[Video], inbox: _Inbox, began: float) -> None:
        """In the thread that generates: ask, and send what happens."""

        def emit(event: Event) -> None:
            if inbox.left.is_set():
                raise _Left
            if event["event"] == "start":
                event["truth"] = asked.truth
                event["method"] = asked.name
            inbox.put(event)

        tokenizer = self.assistant.processor.tokenizer
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        steps = Steps(videos, decode, emit)
        try:
            if inbox.left.is_set():  # while it waited
                return
            answer, row = self._generate(asked, videos, steps)
            steps.finish(row.ids[-1] if row.ids else None)
            assert answer.report is not None
            took = time.perf_counter() - began
            timings = answer.timings.to_dict() | {"total_s": took}
            report = answer.report.to_dict()
            if not answer.report.samples:
                raise UnsupportedError(answer.report.reason or "there is no video in the prompt")
            emit({"event": "done", "text": answer.text, "report": report, "timings": timings})
        except _Left:
            pass
        except (UnsupportedError, ValueError) as error:
            inbox.put({"event": "error", "message": str(error)})
        except Exception as error:
            LOG.exception("an answer failed")
            inbox.put({"event": "error", "message": f"{type(error).__name__}: {error}"})
        finally:
            inbox.put(None)


class Asked:
    """What a request asks for, from its query.

    Attributes
    ----------
    question : the user's words.
    story : seed of the story that is asked about; None for a clip in the body.
    sizes : bytes of each clip in the body, in order; empty where it is one clip.
    frames, words : frames to sample; length limit of the answer, in tokens.
    name, method : the method's name and settings. The full model is watched as settings that
        remove nothing.
    """

    def __init__(self, values: Any, frames: int) -> None:
        self.question: str = values.get("question", "").strip()
        if not self.question:
            raise ApiError(400, "there is no question")
        if len(self.question) > LONGEST_QUESTION:
            raise ApiError(400, f"the question is longer than {LONGEST_QUESTION} characters")
        self._names = [Path(name).name[:80] for name in values.getlist("name")]
        self.sizes = _sizes(values.get("sizes", ""))
        self.frames = _count(values, "frames", frames, MOST_FRAMES)
        self.words = _count(values, "words", 128, MOST_WORDS)
        self.story: int | None = None
        if "story" in values:
            self.story = _count(values, "story", 0, 1 << 31, least=0)
        self.name: str = values.get("method") or "dycoke+"
        self.method = _method(self.name, values.get("settings"))

    @classmethod
    def of(cls, values: Any, frames: int) -> Asked:
        """From a request's query; raises `ApiError`."""
        return cls(values, frames)

    def file(self, place: int) -> str:
        """What a clip of the body is called in messages."""
        named = self._names[place] if place < len(self._names) else ""
        return named or "the clip"

    @property
    def truth(self) -> str | None:
        """What happens in the story; None for a clip."""
        return None if self.story is None else stories.describe(stories.make("seen", self.story))


class _Inbox:
    """Events on their way from the thread that generates to the connection."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def put(self, event: Event | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, event)

    async def lines(self, request: Request) -> AsyncIterator[str]:
        """The events as they come, until there are no more or nobody reads them."""
        try:
            while not await request.is_disconnected():
                try:
                    event = await asyncio.wait_for(self._items.get(), LOOK_EVERY)
                except TimeoutError:
                    continue
                if event is None:
                    return
                yield json.dumps(event, separators=(",", ":")) + "\n"
        finally:
            self.left.set()


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, HEADERS)


def _file(name: str, kind: str, request: Request) -> Response:
    content = resources.files("dycoke.serve").joinpath("static", name).read_bytes()
    return Response(content, headers={**HEADERS, "content-type": kind})


def _same_origin(request: Request) -> None:
    """Refuse what another site's page sends: its visitors' browsers could reach this one."""
    origin = request.headers.get("origin")
    if origin is None:
        return
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        host = ""
    if host != request.headers.get("host"):
        raise ApiError(403, f"a page of {origin} may not ask here")


def _count(values: Any, name: str, default: int, most: int, least: int = 1) -> int:
    text = values.get(name) or str(default)
    number = _whole(text)
    if number is None or not least <= number <= most:
        raise ApiError(400, f"{name} must be a number from {least} to {most}, got {text[:40]!r}")
    return number


def _whole(text: str) -> int | None:
    """A number of up to 15 digits; int() alone refuses long ones, and takes those of any script."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def _sizes(text: str) -> list[int]:
    sizes = [_whole(part) or 0 for part in text.split(",")] if text else []
    if not all(sizes) or len(sizes) > MOST_CLIPS:
        raise ApiError(400, f"sizes must be up to {MOST_CLIPS} lengths in bytes, got {text[:40]!r}")
    return sizes


def _method(name: str, settings: str | None) -> Compressor:
    try:
        given = parse_json(settings.encode()) if settings else {}
        if not isinstance(given, dict):
            raise TypeError(f"settings must be an object, got {settings!r}")
        return choose({**given, "method": name}) or WATCHED_FULL
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error)) from None


def clip_video(data: bytes, name: str, frames: int) -> Video:
    """The frames of an uploaded file; raises `ApiError` in its own name."""
    with media.on_disk(data, name) as path:
        return read(path, frames)


@functools.lru_cache(maxsize=8)
def story_video(seed: int, frames: int) -> Video:
    """A story as it is read from its file, as ``dycoke run`` would."""
    with tempfile.TemporaryDirectory() as folder:
        path = stories.write(stories.make("seen", seed), Path(folder) / f"story-{seed}.mp4")
        return read(path, frames)


@functools.lru_cache(maxsize=len(SHOWN))
def story_picture(seed: int) -> bytes:
    """Three frames of a story side by side, as JPEG."""
    frames = stories.render(stories.make("seen", seed))
    chosen = [frames[len(frames) * part // 8] for part in (1, 4, 7)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(chosen, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()
