"""Paths for the tests' own modules, and what the tests of commands share."""

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
