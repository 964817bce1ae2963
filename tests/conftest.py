"""Paths for the tests' own modules, and what users of image-framed families say about them."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "parity"))


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix means videos: where a family's frames are images, they are declared so.

    `test_images.py`, which is about that, goes without.
    """
    from dycoke import compressor, engine

    class Declaring(engine.Engine):
        def __init__(
            self, model: Any, method: Any, trace: bool, layout: Any = None, frames: Any = None
        ) -> None:
            import tiny

            family = tiny.FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
            if frames is None and layout is None and family is not None and family.images:
                frames = "images"
            super().__init__(model, method, trace, layout, frames)

    monkeypatch.setattr(compressor, "Engine", Declaring)
