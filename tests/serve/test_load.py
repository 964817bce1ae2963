"""``dycoke bench --serve`` on its smallest size, and what it says where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dycoke.bench.show import load_table
from dycoke.cli import bench
from dycoke.cli.console import BadInput, out
from dycoke.serve.load import Load, LoadError, ask, bodies, serving

pytestmark = pytest.mark.once


def test_a_small_load(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "load.json"
    bench.bench(serve=True, concurrency="1,2", repeat=1, frames=8, new_tokens=3, json_file=file)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads(file.read_text())
    rows = last["results"]
    assert [(row["concurrency"], row["method"]) for row in rows] == [
        (1, "full"), (1, "dycoke"), (2, "full"), (2, "dycoke"),
    ]  # fmt: skip
    for row in rows:
        # Each answer has 3 tokens, so that the rates are one and the same thing.
        assert row["tokens_per_s"] == pytest.approx(3 * row["requests_per_s"])
        assert 0 < row["ttft_s"] <= row["request_s"]


def test_ratios_are_to_the_full_model_at_the_same_concurrency() -> None:
    base = {"tokens_per_s": 1.0, "ttft_s": 1.0, "request_s": 1.0}
    rows = [
        {"method": "full", "concurrency": 1, "requests_per_s": 2.0, **base},
        {"method": "dycoke", "concurrency": 1, "requests_per_s": 3.0, **base},
        {"method": "dycoke", "concurrency": 4, "requests_per_s": 3.0, **base},
    ]
    with out.capture() as said:
        out.print(load_table(rows))
    lines = [line.split() for line in said.get().splitlines()]
    assert ["1", "dycoke", "3.00", "(1.50x)", "1.0", "1.00", "1.00"] in lines
    assert ["4", "dycoke", "3.00", "1.0", "1.00", "1.00"] in lines


def test_a_server_that_does_not_start_is_named() -> None:
    with pytest.raises(LoadError, match=r"did not start: dycoke: .*--max-batch"):
        with serving(["--max-batch", "none"]):
            pass


def test_a_refused_request_is_no_measurement(address: str) -> None:
    port, (body, *_) = int(address.rsplit(":", 1)[1]), bodies(Load(frames=65))["full"]
    with pytest.raises(LoadError, match=r"the server answered 400: .*65 frames are more than"):
        ask(port, body)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"concurrency": "1,x"}, "counts such as 1,4,16"),
        ({"concurrency": "0"}, "counts such as 1,4,16"),
        ({"methods": "full,nothing"}, "unknown method 'nothing'"),
        ({"video": Path("/no/such.mp4")}, "no such file"),
        ({"arch": "llava-onevision-0.5b"}, "exclude each other"),
        ({"skip_ratio": 0.5}, "--serve and --skip-ratio exclude each other"),
        ({"batch": 2}, "--serve and --batch exclude each other"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        bench.bench(serve=True, **options)
