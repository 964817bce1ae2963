"""A server on loopback that many tests talk to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import FRAMES, listening

pytest.importorskip("uvicorn", reason="dycoke[serve] is not installed")

from dycoke.assistant import Assistant
from dycoke.methods import create
from dycoke.nano import stories
from dycoke.serve.app import Server, Settings
from dycoke.serve.media import Policy


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
