"""Whatever dies, every question has exactly one row."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import batch_stub
import pytest
from batch_stub import Stub, items_of

from dycoke.batch.drive import drive
from dycoke.batch.items import BatchError, Item
from dycoke.batch.journal import Journal
from dycoke.batch.local import run_local
from dycoke.batch.shards import Folder, Slice, cut
from dycoke.batch.worker import Plan, Stopped, Worker

pytestmark = pytest.mark.once  # a stub answers

TESTS = Path(batch_stub.__file__).parent
SCHEDULES = 50


def run(
    path: Path,
    items: Sequence[Item],
    plan: Plan | None = None,
    stub: Stub | None = None,
    workers: int = 2,
    **options: Any,
) -> list[dict[str, Any]]:
    """A run in processes; its rows in order."""
    folder = Folder(path)
    runner = partial(run_local, stub or Stub(), folder, plan or Plan(), workers)
    drive(items, folder, {"stub": True}, runner, **{"shard_size": 4, **options})
    return rows_of(folder)


def rows_of(folder: Folder) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.parts()) for row in folder.rows(shard)]


def alone(path: Path, items: Sequence[Item], plan: Plan | None = None) -> list[dict[str, Any]]:
    """One shard, in this process."""
    folder = Folder(path)
    folder.begin({})
    Worker(Stub(), folder, plan or Plan()).run(0, items)
    return rows_of(folder)


def kinds(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What failed, and how."""
    return {row["id"]: row["error"]["type"] for row in rows if row["error"] is not None}


def script(*command: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_every_schedule_of_deaths_gives_each_question_one_row(tmp_path: Path) -> None:
    process = script(TESTS / "batch_schedules.py", tmp_path, 0, SCHEDULES)
    said, warned = process.communicate(timeout=240)
    assert (process.returncode, warned) == (0, "")  # no worker cries over its driver's death
    found = json.loads(said)
    assert found["wrong"] == {}
    assert min(found["deaths"][who] for who in ("driver", "worker")) >= SCHEDULES


def test_drivers_and_workers_that_are_killed(tmp_path: Path) -> None:
    names = [f"a{place}" for place in range(16)]
    chance = random.Random(4)
    deaths = 0
    for _ in range(100):
        began = len(os.listdir(tmp_path))
        driver = script(TESTS / "batch_stub.py", "local", tmp_path, 0.02, *names)
        # Kill once something new was written, at whatever point that is by then.
        while driver.poll() is None and len(os.listdir(tmp_path)) == began:
            time.sleep(chance.random() * 0.05)
        if driver.poll() is not None:
            break
        if chance.random() < 0.5:
            os.kill(driver.pid, signal.SIGKILL)  # its workers end by themselves
        else:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        deaths += 1
    rows = rows_of(Folder(tmp_path))
    assert deaths > 2
    assert driver.returncode == 0
    assert Counter(row["id"] for row in rows) == Counter(names)
    assert all(row["text"] == f"{row['id']} ?" for row in rows)


def test_videos_that_kill_their_process_become_rows(tmp_path: Path) -> None:
    names = ["a0", "exit1", "a2", "a3", "late4", "a5", "a6", "kill7", "a8"]
    rows = run(tmp_path, items_of(*names), Plan(batch_size=3))
    assert [row["id"] for row in rows] == names
    assert kinds(rows) == {"exit1": "ProcessDied", "late4": "ProcessDied", "kill7": "ProcessDied"}
    said = {row["id"]: row["error"]["message"] for row in rows if row["error"]}
    assert said["exit1"] == "the process died over this video, 2 times (exit code 7)"
    assert said["kill7"].endswith("(SIGKILL, perhaps for want of memory)")
    assert {row["attempt"] for row in rows if row["error"]} == {2}
    assert all(row["text"] == f"{row['id']} ?" for row in rows if not row["error"])


@pytest.mark.parametrize("attempts", [1, 4])
def test_a_video_has_as_many_attempts_as_are_allowed(tmp_path: Path, attempts: int) -> None:
    rows = run(tmp_path, items_of("late0", "a1", "a2"), Plan(2, attempts), workers=1)
    # With one allowed there are two: in the first others were under way, which are not to blame.
    assert [row["attempt"] for row in rows if row["error"]] == [max(2, attempts)]
    assert kinds(rows) == {"late0": "ProcessDied"}


def test_errors_are_rows_and_end_nothing(tmp_path: Path) -> None:
    names = ["a0", "bad1", "d2", "dull3", "d4", "a5"]
    rows = alone(tmp_path, items_of(*names, prompts=("?", "!")))
    assert [(row["id"], row["prompt"]) for row in rows] == [(n, p) for n in names for p in "?!"]
    assert kinds(rows) == {"bad1": "ValueError", "dull3": "RuntimeError"}
    bad, dull = rows[2], rows[6]
    assert bad["error"]["message"] == "bad1: not a video"
    assert bad["text"] is None and bad["frames"] is None and bad["finish_reason"] is None
    assert dull["frames"] == 8 and dull["duration_s"] == 1.5


def test_a_batch_that_fails_is_answered_one_by_one(tmp_path: Path) -> None:
    rows = alone(tmp_path, items_of("d0", "dull1", "d2", "d3", "a4"), Plan(batch_size=4))
    assert kinds(rows) == {"dull1": "RuntimeError"}
    # The stub says how many it answered together.
    assert [row["tokens"]["new"] for row in rows] == [1, None, 1, 1, 1]


def test_batches_are_of_what_is_alike_and_rows_are_in_order(tmp_path: Path) -> None:
    names = ["a0", "b1", "a2", "b3", "a4", "b5", "c6"]
    rows = alone(tmp_path, items_of(*names), Plan(batch_size=2))
    assert [row["id"] for row in rows] == names
    assert [row["tokens"]["new"] for row in rows] == [2, 2, 2, 2, 1, 1, 1]


def test_too_many_kinds_do_not_wait_for_each_other(tmp_path: Path) -> None:
    names = [f"{kind}{place}" for place, kind in enumerate("abcdefghij")]
    rows = alone(tmp_path, items_of(*names), Plan(batch_size=4))
    assert [row["id"] for row in rows] == names


def test_a_broken_process_is_replaced(tmp_path: Path) -> None:
    rows = run(tmp_path, items_of("a0", "lost1", "a2"), workers=1)
    assert kinds(rows) == {"lost1": "ProcessDied"}
    assert "exit code 70" in rows[1]["error"]["message"]


def test_workers_that_never_begin_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"3 workers in a row died before.*exit code 3"):
        run(tmp_path, items_of("a0"), stub=Stub(born=False))
    assert not Folder(tmp_path).parts()


def test_who_is_stopped_blames_no_video(tmp_path: Path) -> None:
    folder, asked = Folder(tmp_path), list[None]()
    folder.begin({})

    def stopping() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(Stopped):
        Worker(Stub(), folder, Plan(batch_size=2), stopping).run(0, items_of(*"abcdefgh"))
    with folder.journal(0) as journal:
        assert not +journal.tries and not +journal.alone
    rows = alone(tmp_path, items_of(*"abcdefgh"), Plan(max_attempts=1))
    assert not kinds(rows) and len(rows) == 8


def test_journals_lose_at_most_what_was_being_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.begin(0, alone=False)
        journal.finish(0, [{"id": "ü"}])
        journal.begin(1, alone=True)
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            lines = whole[:end].count(b"\n")
            assert journal.rows == ({0: [{"id": "ü"}]} if lines > 1 else {})
            assert (
                +journal.tries == Counter({0: lines > 0, 1: lines > 2} if lines else {}) + Counter()
            )
            journal.finish(5, [])  # what comes next is not spoilt by a broken line
        with Journal(path) as journal:
            assert 5 in journal.rows
    path.write_bytes(whole + b"\0\0\0\n" + whole)
    with Journal(path) as journal:
        assert journal.tries[1] == 1


def test_runs_go_on_in_their_own_settings_only(tmp_path: Path) -> None:
    items = items_of("a0", "a1")
    first = run(tmp_path, items)
    written = Folder(tmp_path).part(0).stat().st_mtime_ns
    assert run(tmp_path, items) == first
    assert Folder(tmp_path).part(0).stat().st_mtime_ns == written
    with pytest.raises(BatchError, match="shard_size was 4, now 5"):
        run(tmp_path, items, shard_size=5)
    with pytest.raises(BatchError, match="videos was 2, now 3"):
        run(tmp_path, [*items, *items_of("a2")])
    with pytest.raises(BatchError, match=r"other settings \(inputs are others\);"):
        run(tmp_path, items[::-1])
    other = Folder(tmp_path / "other")
    other.begin({"method": "a", "settings": dict.fromkeys("abcdef", 1)})
    for now, said in [
        ({**dict.fromkeys("abcde", 1), "f": 2}, r"\(settings\.f was 1, now 2\);"),
        ({}, r"settings\.d was 1, now None; and 2 more\);"),
    ]:
        with pytest.raises(BatchError, match=said):
            other.begin({"method": "a", "settings": now})
    assert rows_of(Folder(tmp_path)) == first
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match="cannot write to"):
        run(tmp_path / "file" / "out", items)


def test_rows_of_nobody_knows_which_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path, items_of("a0", "a1"))
    Folder(tmp_path).run_file.unlink()
    with pytest.raises(BatchError, match=r"has rows, and no run\.json.*another --out"):
        run(tmp_path, items_of("a0", "a1"))
    part = Folder(tmp_path).part(0)
    part.rename(tmp_path / "work" / "000000.journal")
    with pytest.raises(BatchError, match=r"no run\.json"):
        run(tmp_path, items_of("a0", "a1"))


def test_parts_that_somebody_changed_are_named(tmp_path: Path) -> None:
    items = items_of("a0", "a1")
    run(tmp_path, items)
    part = Folder(tmp_path).part(0)
    whole = part.read_text()
    for changed, said in [
        (whole[:-20], r"part-000000\.jsonl, line 2: no row"),
        (whole.splitlines()[0], "has not the 2 rows"),
        (whole + whole, "has not the 2 rows"),
        (whole.replace('"a1"', '"a9"'), "has not the 2 rows"),
    ]:
        part.write_text(changed)
        with pytest.raises(BatchError, match=said):
            run(tmp_path, items)
    part.unlink()
    assert [row["id"] for row in run(tmp_path, items)] == ["a0", "a1"]


def test_what_a_journal_has_is_known_while_others_write_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.begin({})
    assert folder.so_far(0) == (0, 0) and not folder.journals()
    with folder.journal(0) as journal:
        journal.begin(0, alone=False)
        assert folder.so_far(0) == (0, 0) and folder.journals() == {0}
        journal.finish(0, [{"error": None}])
        journal.finish(2, [{"error": None}, {"error": {"type": "ValueError"}}])
        with open(journal.path, "a") as file:
            file.write('{"end": 1, "ro')
        assert folder.so_far(0) == (2, 1)


def test_retrying_takes_up_what_failed_and_nothing_else(tmp_path: Path) -> None:
    items = items_of(*[f"a{place}" for place in range(6)], prompts=("?", "!"))
    run(tmp_path, items)
    folder = Folder(tmp_path)
    rows = list(folder.rows(0))
    rows[3] |= {"text": None, "error": {"type": "ValueError", "message": "once"}}
    rows = [row | {"host": "before"} for row in rows]
    folder.write_part(0, rows)
    assert run(tmp_path, items)[:8] == rows  # not without being told to
    again = run(tmp_path, items, retry_failed=True)
    assert [row["id"] for row in again] == [i.questions[0].id for i in items for _ in "?!"]
    assert not kinds(again)
    assert [row["host"] == "before" for row in again[:8]] == [True, True, False, False] + [True] * 4


def test_slices_together_are_the_run(tmp_path: Path) -> None:
    items = items_of(*[f"a{place}" for place in range(13)])
    for index in range(3):
        run(tmp_path, items, slice=Slice(index, 3), workers=1)
        state = json.loads((tmp_path / f"progress-{index}-of-3.json").read_text())
        assert state["done"] == state["total"] == [5, 4, 4][index]
    assert [row["id"] for row in rows_of(Folder(tmp_path))] == [i.questions[0].id for i in items]
    assert len(cut(items, 4)) == 4
