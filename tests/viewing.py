"""The page's own server, over the embedded model, on a free port of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Served:
    """Where the page is, and what answers behind it."""

    port: int
    viewer: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    uvicorn: Any = pytest.importorskip("uvicorn", reason="needs dycoke[serve]")
    from dycoke.assistant import Assistant
    from dycoke.serve.viewer import Viewer

    viewer = Viewer(Assistant.load(device="cpu"), "nano", max_bytes=1 << 20)
    server = uvicorn.Server(
        uvicorn.Config(viewer.app(), log_level="error", timeout_graceful_shutdown=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Served(listener.getsockname()[1], viewer)
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
