"""Paths for the tests' own modules, what tests of commands share, and what users of image-framed
families say about them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "parity"))


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


# Families that differ from another row by nothing that DyCoke touches: the same layout file, the
# same kinds of layers. The whole matrix over them is half of its time; `--every-family` runs it.
TWINS = {"qwen2_vl", "glm46v", "glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe"}
TWINS_RUN = {
    "test_scores_and_keys_equal_the_oracle",
    "test_every_backend_equals_the_oracle",
    "test_a_left_padded_batch_equals_each_sample_alone",
    "test_a_follow_up_turn_equals_the_oracle",
    "test_ratio_zero_gives_the_same_tokens_and_logits",
    "test_rows_after_prefill_and_bytes",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-family", action="store_true", help="twins of a family in full, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every-family"):
        left_out = [item for item in items if _left_out(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _left_out(item)]


def _left_out(item: pytest.Item) -> bool:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if values.get("family") not in TWINS:
        return False
    name = getattr(item, "originalname", item.name)
    return name not in TWINS_RUN or values.get("backend", "sdpa") != "sdpa"


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix means videos: where a family's frames are images, they are declared so.

    `test_images.py`, which is about that, goes without.
    """
    from dycoke import compressor
    from dycoke.core import engine

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
