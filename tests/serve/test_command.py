"""``dycoke serve`` and ``dycoke view`` from the outside."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ask_about, data_url

from dycoke.cli import serve
from dycoke.cli.console import BadInput
from dycoke.nano import stories


def test_a_process_that_is_told_to_stop_answers_first(tmp_path: Path) -> None:
    clip = stories.write(stories.make("seen", 301), tmp_path / "clip.mp4")
    command = [sys.executable, "-m", "dycoke.cli", "serve", "--port", "0", "--api-key", "k"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = re.search(r"nano answers at (http://\S+)", process.stdout.readline())
        assert found is not None
        with httpx.stream(
            "POST",
            f"{found[1]}/chat/completions",
            json={"messages": ask_about(data_url(clip), stories.DESCRIBE[0]), "stream": True},
            headers={"authorization": "Bearer k"},
            timeout=60,
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert "[DONE]" in rest and '"finish_reason": "stop"' in rest
        process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"allowed_local_media_path": Path("/no/such")}, "no such folder"),
        ({"viewer": True, "api_key": ["k"]}, "the page sends no key"),
        ({"api_key": ["k", ""]}, "--api-key is empty"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        serve.serve(**options)


def test_a_port_in_use_is_said_before_the_model_is_loaded(monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(BadInput, match="choose another --port"):
            serve.run(lambda: pytest.fail("loaded"), "127.0.0.1", taken.getsockname()[1])


def test_without_the_extra_there_is_one_line(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"fastapi and uvicorn not installed; pip install 'dycoke"):
        serve.serve()
