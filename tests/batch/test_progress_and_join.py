"""What a run shows of itself, and its rows in one file."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from batch_stub import Stub, items_of
from rich.console import Console

from dycoke.batch.drive import drive
from dycoke.batch.items import BatchError, Item
from dycoke.batch.join import join, summary
from dycoke.batch.local import Told
from dycoke.batch.progress import Progress
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Plan, Worker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(path: Path, items: list[Item], **options: Any) -> Folder:
    """A finished run of a stub in this process."""
    folder = Folder(path)

    def runner(shards: Any, told: Told) -> None:
        for number, shard in shards.items():
            Worker(Stub(), folder, Plan()).run(number, shard, tell=partial(told, number))

    drive(items, folder, {}, runner, **{"shard_size": 2, **options})
    return folder


def test_lines_and_file(tmp_path: Path) -> None:
    clock, screen, file = Clock(), io.StringIO(), tmp_path / "progress.json"
    progress = Progress(100, Console(file=screen, width=40), file, clock)
    progress.known(7, 10, 1)  # by another run
    progress.known(0, 6, 0)  # as the journal of one that was broken off says
    with progress:
        for second in range(1, 62):
            clock.now = float(second)
            progress.told(0, 6 + second // 2, second // 30)
            assert json.loads(file.read_text())["done"] == 16 + second // 2
        (line,) = screen.getvalue().splitlines()  # one, after a minute
        assert line == "46 of 100 videos, 0.50 a second, 3 failed, 0:01:48 left"
        clock.now = 61.5
        progress.told(0, 90, 2)
        assert json.loads(file.read_text())["done"] == 46  # at most once a second
    state = json.loads(file.read_text())
    assert (state["done"], state["total"], state["failed"], state["left_s"]) == (100, 100, 3, 0)
    assert screen.getvalue().splitlines()[-1].startswith("100 of 100 videos")


def test_the_rate_is_of_what_this_run_does(tmp_path: Path) -> None:
    clock = Clock()
    progress = Progress(100, None, tmp_path / "p.json", clock)
    progress.known(0, 10, 0)
    with progress:
        clock.now = 10.0
        progress.told(1, 64, 0)  # whole, and for the first time: as Ray hands it over
        assert progress.state() | {"seconds": 0} == {
            "done": 74,
            "total": 100,
            "failed": 0,
            "per_second": 6.4,
            "seconds": 0,
            "left_s": 4.1,
        }


def test_what_journals_hold_is_known_from_the_start(tmp_path: Path) -> None:
    items, folder = items_of("a0", "bad1", "a2", "a3"), Folder(tmp_path)

    def broken_off(shards: Any, told: Told) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            drive(items, folder, {}, broken_off, shard_size=2)
        with folder.journal(1) as journal:
            journal.finish(0, [{"error": {"type": "ValueError"}}])
    state = json.loads((tmp_path / "progress.json").read_text())
    assert (state["done"], state["failed"], state["per_second"]) == (1, 1, 0)


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with Progress(4, console, tmp_path / "p.json") as progress:
        progress.told(0, 3, 1)
    assert "3 of 4 videos" in screen.getvalue()


def test_rows_are_joined_in_order(tmp_path: Path) -> None:
    names = ["a0", "bad1", "a2", "a3", "a4"]
    folder = done(tmp_path / "out", items_of(*names, prompts=("?", "!")))
    target = tmp_path / "rows.jsonl"
    assert join(folder, target) == 10
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [(n, p) for n in names for p in "?!"]
    whole = summary(folder, range(3))
    assert (whole.rows, dict(whole.failed), whole.failed_share) == (10, {"ValueError": 2}, 0.2)


def test_rows_as_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="dycoke[batch] is not installed")
    from pyarrow import parquet

    folder = done(tmp_path / "out", items_of("a0", "bad1", "a2"))
    assert join(folder, tmp_path / "rows.parquet") == 3
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    lines = [row for shard in range(2) for row in folder.rows(shard)]
    assert [row | {"settings": json.loads(row["settings"])} for row in rows] == lines


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="no run was begun"):
        join(Folder(tmp_path), tmp_path / "rows.jsonl")
    folder = done(tmp_path / "out", items_of(*"abcde"))
    with pytest.raises(BatchError, match=r"a \.jsonl or \.parquet file"):
        join(folder, tmp_path / "rows.csv")
    with pytest.raises(BatchError, match="cannot write"):
        join(folder, tmp_path / "gone" / "rows.jsonl")
    part = folder.part(2)
    lines = part.read_text()
    part.write_text(lines + lines)
    with pytest.raises(BatchError, match="has 6 rows, and its inputs ask for 5"):
        join(folder, tmp_path / "rows.jsonl")
    part.unlink()
    with pytest.raises(BatchError, match=r"1 of 3 shards are not done \(2\)"):
        join(folder, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
