"""Ray gives out shards, and neither a death nor a poisoned video costs a row."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import batch_stub
import pytest
from batch_stub import Stub, items_of

ray: Any = pytest.importorskip("ray", reason="dycoke[batch] is not installed")

from dycoke.batch.drive import drive  # noqa: E402
from dycoke.batch.on_ray import run_ray  # noqa: E402
from dycoke.batch.shards import Folder  # noqa: E402
from dycoke.batch.worker import Plan  # noqa: E402


@pytest.mark.skipif("DYCOKE_TEST_RAY" not in os.environ, reason="a minute; DYCOKE_TEST_RAY=1")
def test_ray_finishes_what_kills_its_actors(tmp_path: Path) -> None:
    tests = str(Path(batch_stub.__file__).parent)
    environment = {"env_vars": {"PYTHONPATH": tests}}
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
    assert sorted(told) == [(0, 2, 1), (1, 2, 1), (2, 2, 1), (3, 1, 0)]
