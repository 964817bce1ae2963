"""Ray gives out shards, and neither a death nor a poisoned video costs a row."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import batch_stub
import pytest
from batch_stub import Stub, items_of

ray: Any = pytest.importorskip("ray", reason="dycoke[batch] is not installed")

from dycoke.batch.answering import ModelSpec  # noqa: E402
from dycoke.batch.drive import drive  # noqa: E402
from dycoke.batch.items import BatchError  # noqa: E402
from dycoke.batch.on_ray import run_ray  # noqa: E402
from dycoke.batch.shards import Folder  # noqa: E402
from dycoke.batch.worker import Plan  # noqa: E402

PATH = os.pathsep.join([str(Path(batch_stub.__file__).parent), *filter(None, sys.path)])
minutes = pytest.mark.skipif(
    "DYCOKE_TEST_RAY" not in os.environ, reason="minutes; DYCOKE_TEST_RAY=1"
)


@minutes
def test_ray_finishes_what_kills_its_actors(tmp_path: Path) -> None:
    environment = {"env_vars": {"PYTHONPATH": PATH}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        names = ["a0", "exit1", "a2", "bad3", "a4", "late5", "a6"]
        folder = Folder(tmp_path)
        told: list[tuple[int, int, int]] = []
        runner = partial(run_ray, Stub(), folder, Plan(), 2)

        def listened(shards: Any, tell: Any) -> None:
            def hear(shard: int, done: int, failed: int) -> None:
                told.append((shard, done, failed))
                tell(shard, done, failed)

            runner(shards, hear)

        drive(items_of(*names), folder, {}, listened, shard_size=2)
    finally:
        ray.shutdown()
    rows = [row for shard in range(4) for row in folder.rows(shard)]
    assert [row["id"] for row in rows] == names
    assert {row["id"]: row["error"]["type"] for row in rows if row["error"]} == {
        "exit1": "ProcessDied",
        "bad3": "ValueError",
        "late5": "ProcessDied",
    }
    last = {shard: (done, failed) for shard, done, failed in told}
    assert last == {0: (2, 1), 1: (2, 1), 2: (2, 1), 3: (1, 0)}


@minutes
def test_drivers_and_actors_that_are_killed(tmp_path: Path) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    names = [f"a{place}" for place in range(40)]
    chance, deaths = random.Random(7), Counter[str]()
    for _ in range(8):
        for left in pids.iterdir():
            left.unlink()
        driver = subprocess.Popen(
            [sys.executable, batch_stub.__file__, "ray", out, "0.3", *names],
            env={**os.environ, "PYTHONPATH": PATH, "DYCOKE_TEST_PIDS": str(pids)},
            start_new_session=True,
        )
        while driver.poll() is None and not (actors := list(pids.iterdir())):
            time.sleep(0.1)
        time.sleep(chance.random() * 2)
        if driver.poll() is None:
            os.kill(int(chance.choice(actors).name), signal.SIGKILL)
            deaths["actor"] += 1
            time.sleep(chance.random() * 3)
        if driver.poll() is None and deaths["driver"] < 3:
            driver.kill()
            deaths["driver"] += 1
        if not driver.wait():
            break
    assert driver.returncode == 0
    assert deaths["driver"] == 3 and deaths["actor"] > 2
    rows = [row for shard in range(10) for row in Folder(out).rows(shard)]
    assert [row["id"] for row in rows] == names
    assert all(row["text"] == f"{row['id']} ?" for row in rows)
    assert not list((out / "work").glob("*.journal"))


@minutes
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    runner = partial(
        run_ray, ModelSpec("/nowhere/model", device="cpu"), Folder(tmp_path), Plan(), 1
    )
    with pytest.raises(BatchError, match=r"cannot begin: OSError: .*nowhere") as raised:
        drive(items_of("a0"), Folder(tmp_path), {}, runner)
    assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 300


@minutes
def test_workers_that_die_before_they_have_a_model_end_the_run(tmp_path: Path) -> None:
    environment = {"env_vars": {"PYTHONPATH": PATH}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        runner = partial(run_ray, Stub(born=False), Folder(tmp_path), Plan(), 1)
        with pytest.raises(BatchError, match="3 workers or more in a row died before"):
            drive(items_of("a0"), Folder(tmp_path), {}, runner)
    finally:
        ray.shutdown()
    assert not list((tmp_path / "work").glob("loading-*"))
