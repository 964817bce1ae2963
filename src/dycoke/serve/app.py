"""The HTTP application: routes, keys, limits, and the way of a request through the server."""

from __future__ import annotations

import asyncio
import functools
import hmac
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from dycoke import __version__
from dycoke.assistant import Answer, Assistant, Seen
from dycoke.batching import Row
from dycoke.compressor import Compressor
from dycoke.methods import choose
from dycoke.models.locate import visual_tokens
from dycoke.serve import media
from dycoke.serve.bodies import read_body
from dycoke.serve.media import Policy
from dycoke.serve.metrics import Metrics
from dycoke.serve.protocol import (
    ApiError,
    ChatRequest,
    Head,
    Usage,
    as_api_error,
    event,
    parse_chat,
    parse_json,
)
from dycoke.serve.steps import WATCHED_FULL, Event, Steps
from dycoke.serve.viewer import Viewer
from dycoke.serve.work import Emit, Job, Watcher, Worker, full, source_of
from dycoke.video import Video, read


@dataclass(frozen=True)
class Settings:
    """How a server was started.

    Attributes
    ----------
    name : what the model is called.
    compressor : for requests that do not say; None for the full model.
    method : its name, for requests that say a retention alone; None for DyCoke's.
    keys : API keys; none for no check.
    policy : what may be read.
    frames : frames that are sampled where a request does not say.
    max_frames : most frames of one video.
    max_pixels : most pixels of all its sampled frames.
    max_tokens : limit of an answer where a request does not say, and the most that it may ask for.
    max_batch : most requests in one batch.
    max_waiting : most requests that are prepared or wait.
    cache_bytes : bytes of watched videos that are kept.
    threads : that decode videos and make inputs.
    viewer : whether the page is served at "/".
    patience : seconds in which the next piece of a body must come.
    """

    name: str = "nano"
    compressor: Compressor | None = None
    method: str | None = None
    keys: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    frames: int = 32
    max_frames: int = 512
    max_pixels: int = 1 << 28
    max_tokens: tuple[int, int] = (256, 4096)
    max_batch: int = 8
    max_waiting: int = 64
    cache_bytes: int = 1 << 30
    threads: int = 2
    viewer: bool = False
    patience: float = 60.0


class Server:
    """A model behind HTTP; ``app`` is the application."""

    def __init__(self, assistant: Assistant, settings: Settings) -> None:
        self.assistant, self.settings = assistant, settings
        self.metrics = Metrics()
        self.worker = Worker(
            assistant, settings.max_batch, settings.max_waiting, settings.cache_bytes
        )
        self._threads = ThreadPoolExecutor(settings.threads, "dycoke-prepare")
        # The threads share a reader, one at a time.
        self._reader = assistant.reader()
        self._tokenizing = threading.Lock()
        self._preparing = 0
        self._started = int(time.time())
        self.app = FastAPI(
            title="dycoke",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            lifespan=self._life,
        )
        self.app.add_middleware(_Around, server=self)
        self.app.get("/health")(self._health)
        self.app.get("/version")(self._version)
        self.app.get("/metrics")(self._metrics)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)
        if settings.viewer:
            submit, most = self.worker.submit, settings.policy.max_bytes
            viewer = Viewer(assistant, settings.name, submit, most, settings.patience)
            self.app.router.routes.extend(viewer.routes())
        for status in (404, 405):
            self.app.exception_handler(status)(_no_route)
        self.app.exception_handler(Exception)(_fault)

    def stop(self) -> None:
        """Finish what waits, and end the threads."""
        self._threads.shutdown()
        self.worker.stop()

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.stop)

    # Small routes

    async def _health(self) -> dict[str, Any]:
        return {"status": "ok", "waiting": self.worker.waiting, "running": self.worker.running}

    async def _version(self) -> dict[str, str]:
        return {"version": __version__}

    async def _metrics(self) -> Response:
        worker = self.worker
        gauges = {
            "dycoke_requests_waiting": worker.waiting + self._preparing,
            "dycoke_requests_running": worker.running,
            "dycoke_watched_videos": len(worker.cache),
            "dycoke_watched_videos_bytes": worker.cache.bytes,
            "dycoke_watched_videos_hits": worker.cache.hits,
            "dycoke_watched_videos_misses": worker.cache.misses,
        }
        return PlainTextResponse(self.metrics.text(gauges))

    async def _models(self) -> dict[str, Any]:
        own = {"object": "model", "created": self._started, "owned_by": "dycoke"}
        return {"object": "list", "data": [{"id": self.settings.name, **own}]}

    # Chat

    async def _chat(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            asked = parse_chat(await self._body(request), [self.settings.name])
            compressor = self._compressor(asked)
            if self.worker.waiting + self._preparing >= self.settings.max_waiting:
                raise full(self.settings.max_waiting)
        except ApiError as error:
            return _refusal(error)
        told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def emit(what: tuple[Any, ...]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, what)

        self._preparing += 1
        try:
            work = loop.run_in_executor(
                self._threads, self._prepare, asked, compressor, emit, gone.is_set
            )
            job = await asyncio.shield(work)
            self.worker.submit(job)
        except asyncio.CancelledError:
            gone.set()
            raise
        except Exception as error:
            return _refusal(as_api_error(error))
        finally:
            self._preparing -= 1
        head = Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.settings.name)
        replies = _Replies(told, request, gone, self.metrics, began, job)
        if asked.stream:
            parts = replies.stream(head, asked.usage)
            quiet = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(parts, media_type="text/event-stream", headers=quiet)
        return await replies.whole(head)

    async def _body(self, request: Request) -> Any:
        """The body as JSON, within bounds."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # A web page of somebody else can send other types without asking first.
            raise ApiError(415, f"the content type must be application/json, got {kind!r}")
        most = self.settings.policy.max_bytes * 4 // 3 + (4 << 20)
        too_large = ApiError(413, f"the body is larger than {most} bytes")
        body = await read_body(request, too_large, most, self.settings.patience)
        return await asyncio.to_thread(parse_json, body)

    def _compressor(self, asked: ChatRequest) -> Compressor | None:
        """What a request's ``dycoke`` field says."""
        method = self.settings.compressor
        if asked.compress is not None:
            given = dict(asked.compress)
            if given.get("retention") is not None and given.get("method") is None:
                given["method"] = self.settings.method
            try:
                method = choose(given, method)
            except (TypeError, ValueError) as error:
                raise ApiError(400, f"dycoke: {error}", "dycoke") from None
        return WATCHED_FULL if method is None and asked.steps else method

    def _prepare(
        self,
        asked: ChatRequest,
        compressor: Compressor | None,
        emit: Emit,
        cancelled: Callable[[], bool],
    ) -> Job:
        """Fetch, decode and process: in a thread."""
        began = time.perf_counter()
        videos: list[Video] = []
        images: list[Any] = []
        for part in asked.media:
            if cancelled():
                raise ApiError(499, "cancelled")
            found = media.load(part.url, self.settings.policy)
            if part.kind == "image":
                images.append(media.as_image(found))
            else:
                videos.append(self._read(found, asked))
        decoded = time.perf_counter()
        # A step's masks come with the video's own forward, which a kept one has behind it.
        key = None
        if not asked.steps:
            key = self.worker.key_of(asked.turns, videos, images, compressor)
        seen = None if key is None else self.worker.cache.get(key)
        with self._tokenizing:
            inputs = None
            if seen is not None:
                with suppress(ValueError):  # this conversation does not begin with it
                    inputs = {"input_ids": seen.tokens(asked.turns, self._reader)}
            if inputs is None:
                seen = None
                inputs = self._reader.prepare_chat(asked.turns, videos, images)
        default, most = self.settings.max_tokens
        limit = default if asked.max_tokens is None else asked.max_tokens
        if limit > most:
            raise ApiError(400, f"max_tokens must be at most {most}, got {limit}", "max_tokens")
        self._check_length(inputs["input_ids"].shape[1], limit)
        row = Row(limit, asked.stop, cancelled=cancelled)
        return Job(
            turns=asked.turns,
            videos=videos,
            images=images,
            inputs=inputs,
            compressor=compressor,
            generate=asked.sampling,
            seed=asked.seed if asked.sampling.get("do_sample") else None,
            row=row,
            emit=emit,
            watch=self._watch(videos, row, emit) if asked.steps else None,
            before=(decoded - began, time.perf_counter() - decoded),
            seen=seen,
            video_key=key,
            visual=0 if compressor is not None else self._visual(videos, inputs, seen),
        )

    def _visual(self, videos: Sequence[Video], inputs: Mapping[str, Any], seen: Seen | None) -> int:
        if seen is not None:
            return seen.visual_tokens
        source = source_of(self.assistant, videos)
        return visual_tokens(self.assistant.model.config, inputs, source)

    def _watch(self, videos: Sequence[Video], row: Row, emit: Emit) -> Callable[[int], Watcher]:
        """Listeners that tell what each token looked at, as the page has it."""
        if not videos:
            raise ApiError(400, "dycoke: steps are of videos, and there is none here", "dycoke")
        decode = functools.partial(
            self.assistant.processor.tokenizer.decode, skip_special_tokens=True
        )

        def tell(what: Event) -> None:
            emit(("step", what))

        return lambda place: Steps(videos, decode, tell, row=place, ended=lambda: row.done)

    def _check_length(self, prompt: int, new: int) -> None:
        config = self.assistant.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and prompt + new > most:
            raise ApiError(
                400,
                f"{prompt} prompt tokens and {new} new ones are more than the model's {most}; "
                "ask for fewer frames (media_io_kwargs.video.num_frames) or tokens",
                "messages",
                "context_length_exceeded",
            )

    def _read(self, found: bytes | Path, asked: ChatRequest) -> Video:
        """The frames of a video."""
        most, pixels = self.settings.max_frames, self.settings.max_pixels
        with media.on_disk(found, "video") as path:
            count = asked.frames or self.settings.frames
            if asked.fps is not None:
                wanted = read(path, 1, max_pixels=pixels).duration * asked.fps
                count = max(1, round(min(wanted, most + 1)))
            if count > most:
                raise ApiError(
                    400, f"{count} frames are more than this server's {most}", "media_io_kwargs"
                )
            return replace(read(path, count, max_pixels=pixels), path="video")


class _Around:
    """Around every route: keys, request ids, and the count of requests."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        path, given = request.url.path, request.headers.get("x-request-id", "")
        number = given if given and given.isascii() and given.isprintable() else uuid.uuid4().hex

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
                if path == "/v1/chat/completions":
                    label = f'{{status="{message["status"]}"}}'
                    self.server.metrics.add("dycoke_requests_total", 1, label)
            await send(message)

        if path.startswith("/v1/") and not self._allowed(request):
            wrong = ApiError(401, "wrong API key", None, "invalid_api_key")
            await _refusal(wrong)(scope, receive, answer)
            return
        await self.app(scope, receive, answer)

    def _allowed(self, request: Request) -> bool:
        keys = self.server.settings.keys
        given = request.headers.get("authorization", "").encode()
        # All are compared, so that time tells nothing.
        same = [hmac.compare_digest(given, f"Bearer {key}".encode()) for key in keys]
        return not keys or any(same)


class _Replies:
    """What the generating thread tells of one job, as HTTP says it."""

    def __init__(
        self,
        told: asyncio.Queue[tuple[Any, ...]],
        request: Request,
        gone: threading.Event,
        metrics: Metrics,
        began: float,
        job: Job,
    ) -> None:
        self._told, self._request, self._gone, self._metrics = told, request, gone, metrics
        self._began, self._job = began, job
        self._first = True

    async def _next(self) -> tuple[Any, ...]:
        what = await self._told.get()
        if what[0] == "text" and self._first:
            self._first = False
            took = time.perf_counter() - self._began
            self._metrics.add("dycoke_first_token_seconds_total", took)
        return what

    async def whole(self, head: Head) -> Response:
        """One answer at the end; a client that goes away ends it."""
        leaving = asyncio.ensure_future(self._follow())
        try:
            while True:
                what = await self._next()
                if what[0] == "error":
                    return _refusal(what[1])
                if what[0] == "done":
                    _, answer, cached = what
                    usage = self._count(answer, cached)
                    return JSONResponse(
                        head.completion(answer.text, _reason(answer), usage, _report(answer))
                    )
        finally:
            self._gone.set()
            leaving.cancel()

    async def _follow(self) -> None:
        """Say so when the client has gone."""
        while not await self._request.is_disconnected():
            await asyncio.sleep(0.1)
        self._gone.set()

    async def stream(self, head: Head, wants_usage: bool) -> AsyncIterator[str]:
        """Chunks; a client that goes away ends it."""
        try:
            yield event(head.chunk({"role": "assistant", "content": ""}))
            while True:
                what = await self._next()
                if what[0] == "text" and what[1]:
                    yield event(head.chunk({"content": what[1]}))
                elif what[0] == "step":
                    yield event(head.chunk({}, dycoke=what[1]))
                elif what[0] == "error":
                    yield event(what[1].body)
                    return
                elif what[0] == "done":
                    _, answer, cached = what
                    usage = self._count(answer, cached)
                    yield event(head.chunk({}, _reason(answer), dycoke=_report(answer)))
                    if wants_usage:
                        yield event(head.chunk(None, usage=usage.body()))
                    yield event("[DONE]")
                    return
        finally:
            self._gone.set()

    def _count(self, answer: Answer, cached: int) -> Usage:
        prompt, new = self._job.inputs["input_ids"].shape[1], len(answer.tokens)
        visual = kept = self._job.visual
        if answer.report is not None:
            visual = sum(sample.visual_tokens for sample in answer.report.samples)
            kept = sum(sample.kept_tokens for sample in answer.report.samples)
        for name, amount in (
            ("prompt_tokens", prompt),
            ("generated_tokens", new),
            ("visual_tokens", visual),
            ("visual_tokens_kept", kept),
            ("request_seconds", time.perf_counter() - self._began),
        ):
            self._metrics.add(f"dycoke_{name}_total", amount)
        return Usage(prompt, new, visual, kept, cached)


def _report(answer: Answer) -> dict[str, Any] | None:
    """The report, and where the time went."""
    own = {} if answer.report is None else answer.report.to_dict()
    return {**own, "timings": answer.timings.to_dict()}


def _reason(answer: Answer) -> str:
    return "length" if answer.finish_reason == "length" else "stop"


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def _no_route(request: Request, error: Exception) -> Response:
    path = request.url.path
    known = "/v1/chat/completions (POST), /v1/models, /health, /metrics and /version"
    status = getattr(error, "status_code", 404)
    return _refusal(ApiError(status, f"no {request.method} {path} here; there are {known}"))


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours outside of what a request asks for; uvicorn logs it."""
    return _refusal(ApiError(500, f"{type(error).__name__} in the server"))
