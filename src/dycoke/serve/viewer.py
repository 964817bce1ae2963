"""The page's own routes: its files, the stories to choose from, and answers with their steps.

An answer is asked for with the clip as the request's body and comes as one JSON line per event
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
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from dycoke import nano
from dycoke.assistant import Answer
from dycoke.batching import Row
from dycoke.compressor import Compressor
from dycoke.methods import METHODS, create
from dycoke.nano import stories
from dycoke.serve.app import UNTOUCHED, Server
from dycoke.serve.protocol import ApiError, as_api_error
from dycoke.serve.steps import Event
from dycoke.serve.work import Job
from dycoke.video import Video, VideoError, read

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
LOOK_EVERY = 0.5  # seconds after which a silent connection is looked at


class Viewer:
    """A server's model, shown while it answers. Its answers go the way of all others.

    Parameters
    ----------
    server : its application takes in the page's routes.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.assistant = server, server.assistant
        self.max_bytes = server.settings.policy.max_bytes
        # The embedded model is at home in clips of as many frames as it was trained on.
        own = server.assistant.model.config.name_or_path == str(nano.path())
        self.frames = stories.FRAMES if own else server.settings.frames
        for path, names in FILES.items():
            server.app.add_route(f"/{path}", functools.partial(_file, *names))
        server.app.add_route("/viewer/config", self._config)
        server.app.add_route("/viewer/stories/{seed:int}.jpg", self._picture)
        server.app.add_route("/viewer/ask", self._ask, methods=["POST"])

    async def _config(self, request: Request) -> Response:
        methods = [{"name": n, "about": e.about} for n, e in METHODS.items() if n != "full"]
        return JSONResponse(
            {
                "model": self.server.settings.name,
                "frames": self.frames,
                "max_bytes": self.max_bytes,
                "question": stories.DESCRIBE[0],
                "stories": list(SHOWN),
                "methods": methods,
            },
            headers=HEADERS,
        )

    async def _picture(self, request: Request) -> Response:
        seed = int(request.path_params["seed"])
        if seed not in SHOWN:
            return _refusal(ApiError(404, f"there is no story {seed} here"))
        picture = await asyncio.to_thread(story_picture, seed)
        return Response(picture, media_type="image/jpeg", headers=HEADERS)

    async def _ask(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            _same_origin(request)
            asked = Asked.of(request.query_params, self.frames)
            video = await self._video(request, asked)
            inbox = _Inbox()
            job = await asyncio.to_thread(self._job, asked, video, inbox, began)
            self.server.worker.submit(job)
        except Exception as error:
            return _refusal(as_api_error(error))
        return StreamingResponse(
            inbox.lines(request), media_type="application/x-ndjson", headers=HEADERS
        )

    async def _video(self, request: Request, asked: Asked) -> Video:
        """The story that was chosen, or the clip in the request's body."""
        if asked.story is not None:
            return await asyncio.to_thread(story_video, asked.story, asked.frames)
        too_large = ApiError(413, f"the clip is larger than {self.max_bytes >> 20} MiB")
        if int(request.headers.get("content-length", 0)) > self.max_bytes:
            raise too_large
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.max_bytes:
                raise too_large
        if not data:
            raise ApiError(400, "there is no clip: the request's body is empty")
        return await asyncio.to_thread(clip_video, bytes(data), asked)

    def _job(self, asked: Asked, video: Video, inbox: _Inbox, began: float) -> Job:
        """What the server's worker does for one question; it ends when nobody reads any more."""
        parts = [{"type": "video"}, {"type": "text", "text": asked.question}]
        turns = [{"role": "user", "content": parts}]
        row = Row(asked.words, cancelled=inbox.left.is_set)

        def step(event: Event) -> None:
            own = {"truth": asked.truth} if event["event"] == "start" else {}
            inbox.put(event | own)

        def told(what: tuple[Any, ...]) -> None:
            if what[0] == "done":
                inbox.put(_done(what[1]))
            elif what[0] == "error":
                inbox.put({"event": "error", "message": str(what[1])})
            if what[0] in ("done", "error"):
                inbox.put(None)

        return Job(
            turns=turns,
            videos=[video],
            images=[],
            inputs=self.server.inputs(turns, [video], [], asked.words),
            compressor=asked.method,
            generate={},
            seed=None,
            row=row,
            emit=told,
            watch=self.server.watch([video], row, step),
            video_s=time.perf_counter() - began,
        )


class Asked:
    """What a request asks for, from its query.

    Attributes
    ----------
    question : the user's words.
    story : seed of the story that is asked about; None for a clip in the body.
    file : what the clip is called in messages.
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
        self.file: str = Path(values.get("name") or "the clip").name[:80]
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


def _done(answer: Answer) -> Event:
    """The end of an answer, with its report and times."""
    report = answer.report
    if report is None or not report.samples:
        why = "nothing was watched" if report is None else report.reason
        return {"event": "error", "message": why or "there is no video in the prompt"}
    return {
        "event": "done",
        "text": answer.text,
        "report": report.to_dict(),
        "timings": answer.timings.to_dict(),
    }


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, HEADERS)


def _file(name: str, kind: str, request: Request) -> Response:
    content = resources.files("dycoke.serve").joinpath("static", name).read_bytes()
    return Response(content, headers={**HEADERS, "content-type": kind})


def _same_origin(request: Request) -> None:
    """Refuse what another site's page sends: its visitors' browsers could reach this one."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, f"a page of {origin} may not ask here")


def _count(values: Any, name: str, default: int, most: int, least: int = 1) -> int:
    text = values.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise ApiError(400, f"{name} must be a number from {least} to {most}, got {text[:40]!r}")
    return int(text)


def _method(name: str, settings: str | None) -> Compressor:
    try:
        given = json.loads(settings) if settings else {}
        if not isinstance(given, dict):
            raise TypeError(f"settings must be an object, got {settings!r}")
        if name == "full":
            return UNTOUCHED
        method = create(name)
        assert method is not None
        return method if not given else type(method).from_dict({**method.to_dict(), **given})
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error)) from None


def clip_video(data: bytes, asked: Asked) -> Video:
    """The frames of an uploaded file; raises `ApiError` in its own name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        path.write_bytes(data)
        try:
            return read(path, asked.frames)
        except VideoError as error:
            raise ApiError(422, str(error).replace(str(path), asked.file)) from None


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
