"""A server on loopback that many tests talk to."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="dycoke[serve] is not installed")

from dycoke.assistant import Assistant  # noqa: E402
from dycoke.methods import create  # noqa: E402
from dycoke.nano import stories  # noqa: E402
from dycoke.serve.app import Server, Settings  # noqa: E402
from dycoke.serve.media import Policy  # noqa: E402

FRAMES = 24


@pytest.fixture(scope="session")
def nano() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: Any) -> Callable[[int], Path]:
    """The file of a story."""
    folder = tmp_path_factory.mktemp("stories")
    made: dict[int, Path] = {}

    def of(seed: int) -> Path:
        if seed not in made:
            made[seed] = stories.write(stories.make("seen", seed), folder / f"{seed}.mp4")
        return made[seed]

    return of


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """The address of a server while it listens; afterwards it is drained."""
    config = uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="error")
    socket = config.bind_socket()
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([socket],), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    return Path(tmp_path_factory.mktemp("allowed"))


@pytest.fixture(scope="session")
def server(nano: Assistant, folder: Path) -> Server:
    return Server(
        nano,
        Settings(
            compressor=create("dycoke"),
            frames=FRAMES,
            max_frames=64,
            policy=Policy(folder=folder, max_bytes=1 << 20),
        ),
    )


@pytest.fixture(scope="session")
def address(server: Server) -> Iterator[str]:
    with listening(server) as url:
        yield url


def data_url(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def ask_about(url: str, question: str) -> list[dict[str, Any]]:
    """Messages of one question about one video."""
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]
