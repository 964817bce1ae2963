"""How many requests a server answers: full against compressed, at several concurrencies."""

from __future__ import annotations

import base64
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dycoke.nano import stories

QUESTION = stories.DESCRIBE[0]
CLIPS = 8


class LoadError(Exception):
    """What was asked for cannot be measured here; the message names the way out."""


@dataclass(frozen=True)
class Timed:
    """One request: seconds to its first word and to its end, tokens of its answer."""

    first_s: float
    total_s: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """What to measure.

    Attributes
    ----------
    methods : names from `dycoke.methods`.
    concurrency : requests under way at once, one measurement each.
    requests : in one measurement, and at least twice the concurrency.
    repeat : turns of all methods at each concurrency.
    video : a file; None for as many rendered stories as `CLIPS`.
    frames, new_tokens : of each request.
    server : more arguments of ``dycoke serve``.
    """

    methods: tuple[str, ...] = ("full", "dycoke")
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 16
    repeat: int = 3
    video: str | None = None
    frames: int = 24
    new_tokens: int = 32
    server: tuple[str, ...] = ()


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[int]:
    """The port of a server in a process of its own, which ends with the block."""
    command = [sys.executable, "-u", "-m", "dycoke.cli", "serve", "--port", "0", *arguments]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+)/v1", process.stdout.readline())
            if found is None:
                said.seek(0)
                lines = said.read().strip().splitlines() or ["it said nothing"]
                raise LoadError(f"the server did not start: {lines[-1]}")
            yield int(found[1])
        finally:
            process.terminate()


def bodies(load: Load) -> dict[str, list[bytes]]:
    """Requests of each method, one per clip."""
    with tempfile.TemporaryDirectory() as folder:
        if load.video is not None:
            files = [Path(load.video)]
        else:
            told = (stories.make("seen", seed) for seed in range(CLIPS))
            files = [
                stories.write(story, Path(folder) / f"{i}.mp4") for i, story in enumerate(told)
            ]
        urls = [
            "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
            for file in files
        ]
    made: dict[str, list[bytes]] = {}
    for method in load.methods:
        settings = {"off": True} if method == "full" else {"method": method}
        made[method] = [
            json.dumps(
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "video_url", "video_url": {"url": url}},
                                {"type": "text", "text": QUESTION},
                            ],
                        }
                    ],
                    "max_tokens": load.new_tokens,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "media_io_kwargs": {"video": {"num_frames": load.frames}},
                    "dycoke": settings,
                }
            ).encode()
            for url in urls
        ]
    return made


def ask(port: int, body: bytes) -> Timed:
    """One request, from its first byte to the last chunk.

    Raises
    ------
    LoadError
        Where it is not answered.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began, first, tokens = time.perf_counter(), 0.0, 0
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise LoadError(f"the server answered {answer.status}: {answer.read(300).decode()}")
        while line := answer.readline():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise LoadError(f"the server failed: {chunk['error']['message']}")
            if not first and any(c["delta"].get("content") for c in chunk["choices"]):
                first = time.perf_counter() - began
            if usage := chunk.get("usage"):
                tokens = usage["completion_tokens"]
    finally:
        connection.close()
    total = time.perf_counter() - began
    return Timed(first or total, total, tokens)


def measure(load: Load, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """One row per concurrency and method: medians over the turns.

    All methods take turns on one server, which keeps no videos from one request to the next.
    """
    asked = bodies(load)
    most = max(load.concurrency)
    room = ["--cache-mb", "0", "--max-waiting", str(2 * most), *load.server]
    rows = []
    with serving(room) as port:
        for method in load.methods:
            tell(f"warm-up: {method}")
            ask(port, asked[method][0])
        for at_once in load.concurrency:
            count = max(load.requests, 2 * at_once)
            turns: dict[str, list[dict[str, float]]] = {method: [] for method in load.methods}
            for turn in range(load.repeat):
                for method in load.methods:
                    tell(f"{at_once} at once, turn {turn + 1} of {load.repeat}: {method}")
                    turns[method].append(turn_of(port, asked[method], at_once, count))
            for method, own in turns.items():
                middle = {key: statistics.median(one[key] for one in own) for key in own[0]}
                rows.append({"method": method, "concurrency": at_once, "requests": count, **middle})
    return rows


def turn_of(port: int, asked: Sequence[bytes], at_once: int, count: int) -> dict[str, float]:
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [pool.submit(ask, port, asked[i % len(asked)]) for i in range(count)]
        timed = [job.result() for job in jobs]
    took = time.perf_counter() - began
    return {
        "requests_per_s": count / took,
        "tokens_per_s": sum(one.tokens for one in timed) / took,
        "ttft_s": statistics.median(one.first_s for one in timed),
        "request_s": statistics.median(one.total_s for one in timed),
    }
