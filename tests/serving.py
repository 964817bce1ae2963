"""A server that listens on loopback, and what its tests send."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FRAMES = 24


@contextmanager
def listening(server: Any) -> Iterator[str]:
    """The address of a server while it listens; afterwards it is drained."""
    import uvicorn

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


def data_url(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def ask_about(url: str, question: str) -> list[dict[str, Any]]:
    """Messages of one question about one video."""
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]
