"""Every script of `benchmarks/` runs, on its smallest size, and prints what it promises."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clips
import pytest
import transformers

from dycoke.vision import memory

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")}

CORE = {"core/engine.py", "core/cache.py", "core/selection.py", "attention.py"}
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: Any, capsys: Any) -> Script:
    """Runs a script of `benchmarks/` in this process; what it prints."""

    def call(name: str, *args: object) -> str:
        path = FOLDER / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        module.main()
        printed: str = capsys.readouterr().out
        return printed

    return call


def last(printed: str) -> Any:
    return json.loads(printed.splitlines()[-1])


@pytest.mark.once
def test_batch_throughput() -> None:
    # In a process of its own: its workers import it.
    command = [
        str(FOLDER / "batch_throughput.py"),
        "overhead",
        "--videos",
        "8",
        "--shard-size",
        "2",
    ]
    printed = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    found = last(printed.stdout)
    assert found["videos"] == 8 and found["1_workers"]["ms_per_video"] > 0


@pytest.mark.once
def test_serve_soak(script: Script) -> None:
    result = last(script("serve_soak", "--requests", 12, "--minutes", 1, "--clients", 2))
    assert (result["requests"], result["wrong"]) == (12, 0) and result["right"] >= 3


def test_all_scripts_are_run_here() -> None:
    run = {
        "batch_throughput",
        "echo_memory",
        "encoder_accuracy",
        "encoder_memory",
        "encoder_motion",
        "encoder_speed",
        "lmms_storyqa",
        "many_questions",
        "memory",
        "nano_merging",
        "serve_soak",
    }
    # The last needs vLLM, which `make test-vllm` has.
    assert run | {"decode_walk", "host_overhead", "viewer_images", "vllm_serving"} == SCRIPTS


def test_decode_walk(script: Script) -> None:
    *files, step, modules = script("decode_walk").splitlines()
    found = re.fullmatch(r"one decode step: (\d+) functions, (\d+) files, (\d+) lines", step)
    assert found is not None and files[-int(found[2])].split()[0] in CORE | {"methods/dycoke.py"}
    # What somebody has to read to know what a decode step does; docs/design.md walks through it.
    # The oldest supported release makes a mask in each step, which two more files look at.
    limits = (5, 450) if transformers.__version__ >= "5.24" else (7, 480)
    assert int(found[2]) <= limits[0] and int(found[3]) <= limits[1]
    assert int(modules.split(": ")[1].split()[0]) <= 900


def test_host_overhead(script: Script) -> None:
    result = last(script("host_overhead", "--layers", 5, "--steps", 2, "--repeat", 1))
    assert (result["layers"], result["steps"]) == (5, 2)
    for name in ("steady", "refresh"):
        assert result[f"{name}_ratio"] == pytest.approx(
            result[f"{name}_ms"] / result["stock_ms"], rel=0.01
        )


def test_nano_merging(script: Script) -> None:
    lines = script("nano_merging", "--stories", 1).splitlines()
    assert [line.split()[0] for line in lines] == ["full", "text", "frames", "merged", "weighted"]
    counts = [(int(line.split()[1]), int(line.split()[3])) for line in lines]
    assert all(right <= events for right, events in counts) and counts[0][0] > 0


def test_encoder_memory(script: Script) -> None:
    result = last(
        script("encoder_memory", "--families", "smolvlm", "--dtypes", "float32", "--layers", 1)
    )
    (line,) = result["lines"]
    assert (line["family"], line["patches"]) == ("smolvlm", 1024)
    assert line["ratio"] > 1 and line["counted_mib"] > 0


def test_encoder_speed(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = last(
        script("encoder_speed", "--layers", 1, "--size", 56, "--frames", 4, "--repeat", 1,
               "--ratios", 0.5, 0.7, "--json", file)
    )  # fmt: skip
    assert json.loads(file.read_text()) == result
    assert result["command"].startswith("python benchmarks/encoder_speed.py --layers 1 ")
    assert (result["frames"], result["layers"], result["dtype"]) == (4, 1, "float32")
    whole, *skipping = result["lines"]
    assert (whole["skip_ratio"], whole["computed"], whole["wall_s_ratio"]) == (0, 1, 1)
    # An anchor of 4 tokens, and 3 frames with 2 or 1 of them, and what shares patches with these.
    assert [line["skip_ratio"] for line in skipping] == [0.5, 0.7]
    assert 1 > skipping[0]["computed"] >= 10 / 16 and skipping[1]["computed"] >= 7 / 16
    for line in skipping:
        assert line["wall_s_ratio"] == pytest.approx(
            whole["wall_s"][0] / line["wall_s"][0], rel=0.1
        )


def test_many_questions(script: Script, tmp_path: Path) -> None:
    clip = clips.render(tmp_path / "clip.mp4", 6)
    sizes = ("--frames", 2, "--questions", 2, "--new-tokens", 2, "--repeat", 1)
    result = last(script("many_questions", "--video", clip, *sizes))
    assert result["frames"] == result["questions"] == result["new_tokens"] == 2
    assert set(result["once_vs_each"]) == set(result["same_answers"]) == {"full", "dycoke"}


def test_memory(script: Script, monkeypatch: Any) -> None:
    """Its processes are run in this one, which saves the time of their imports."""

    def here(command: list[str], **_: Any) -> Any:
        name = Path(command[1]).stem
        return SimpleNamespace(stdout=script(name, *command[2:]))

    monkeypatch.setattr(memory, "free_memory", memory.free_memory)  # put back afterwards
    monkeypatch.setattr(subprocess, "run", here)
    result = last(script("memory", "--frames", 3, "--chunk", 2))
    assert [line["chunk"] for line in result["lines"]] == [0, 2, "auto"]
    assert all(line["frames"] == 3 for line in result["lines"])
    assert len({line["kept"] for line in result["lines"]}) == 1  # chunks change nothing


@pytest.mark.once
def test_echo_memory(script: Script) -> None:
    result = last(script("echo_memory", "--frames", 3, "--width", 64))
    assert [line["frames"] for line in result["lines"]] == [3]
    assert {"dycoke", "dycoke+", "more_per_frame_mib"} <= set(result["lines"][0])


@pytest.mark.once
def test_encoder_motion(script: Script) -> None:
    lines = script("encoder_motion", "--clips", 1).splitlines()
    found = {line[:42].strip(): [float(x) for x in line[42:].split()] for line in lines[1:]}
    apart, error, _, encoded = found["strong middle texture, cut"]
    assert apart > 0.5 and error == 0 and encoded == 1  # a cut is seen, and then all is computed
    apart, error, _, encoded = found["strong middle texture, 0 px a frame"]
    assert apart < 0.5 and 0 < error < 1 and encoded < 0.5


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="it does not take features")
@pytest.mark.once
def test_encoder_accuracy(script: Script) -> None:
    lines = script("encoder_accuracy", "--stories", 2, "--seed", 7).splitlines()
    shares = {line[:20].strip(): [float(x) for x in line[20:].split()] for line in lines[:9]}
    assert shares["full"][0] > 80 and len(shares) == 9
    assert lines[9].startswith("skipping P=0 - same mask P=0:")


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
def test_lmms_storyqa(script: Script) -> None:
    lines = script("lmms_storyqa", "--stories", 1).splitlines()
    assert {line.rsplit("%", 2)[0].split()[0] for line in lines[-4:]} == {"full", "dycoke"}
