"""Which cases are run, what tests of commands share, and what users of image-framed families say
about them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from covering import COLLECTED, design
from hypothesis import HealthCheck, settings

# No test times anything: on a busy machine an example may be slow to make, and to run.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        from dycoke import cli

        monkeypatch.setattr(sys, "argv", ["dycoke", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole product of each test's axes")
    parser.addoption("--light", action="store_true", help="fewer cases: see tests/covering.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A covering design of each test function's cases, but with `--all` and for cases named."""
    collected = list(items)
    if not config.getoption("--all") and not any("[" in arg for arg in config.args):
        kept = {id(item) for item in design(items, config.getoption("--light"))}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = [item for item in items if id(item) in kept]
    config.stash[COLLECTED] = collected, list(items)


@pytest.fixture
def float64() -> Iterator[None]:
    """`support.in_float64` for a whole test."""
    from support import in_float64

    with in_float64():
        yield


@pytest.fixture(autouse=True, scope="session")
def plain_processor() -> Iterator[None]:
    """Whatever the processor can do, models are float32 where nothing is said."""
    from dycoke import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "instructions", frozenset)
        yield


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix means videos: where a family's frames are images, they are declared so.

    `test_images.py`, which is about that, goes without.
    """
    from dycoke import compressor
    from dycoke.core import engine

    class Declaring(engine.Engine):
        def __init__(
            self, model: Any, method: Any, trace: bool, layout: Any, frame_source: Any, on_step: Any
        ) -> None:
            import tiny

            family = tiny.FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
            if frame_source is None and layout is None and family is not None and family.images:
                frame_source = "images"
            super().__init__(model, method, trace, layout, frame_source, on_step)

    monkeypatch.setattr(compressor, "Engine", Declaring)
