"""How many actors Ray is asked for, and what it tells of them; without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from dycoke.batch.items import BatchError
from dycoke.batch.on_ray import Births, _Watch, placing
from dycoke.batch.shards import Folder


def test_an_actor_has_a_gpu_where_the_cluster_has_any() -> None:
    # The driver's machine may have none, such as a cluster's head.
    assert placing({"CPU": 8.0}, None, None, own=True) == (1, 0.0)
    assert placing({"CPU": 8.0, "GPU": 4.0}, None, None, own=False) == (4, 1.0)
    assert placing({"GPU": 4.0}, None, 0.5, own=False) == (8, 0.5)
    assert placing({"GPU": 4.0}, 2, None, own=False) == (2, 1.0)
    assert placing({"GPU": 4.0}, None, 0.0, own=False) == (1, 0.0)
    assert placing({"GPU": 0.0}, None, 1.0, own=False) == (1, 1.0)  # one may still be started
    with pytest.raises(BatchError, match="--gpus 2: this machine has 1 for Ray"):
        placing({"GPU": 1.0}, None, 2.0, own=True)


def test_shards_are_told_of_while_they_are_under_way(tmp_path: Path) -> None:
    folder, told = Folder(tmp_path), list[tuple[int, int, int]]()
    folder.begin({})
    watch = _Watch(folder, [0, 1], lambda *said: told.append(said))
    watch.look()
    assert told == []
    with folder.journal(0) as first, folder.journal(5) as other:
        other.finish(0, [{"error": None}])  # of another job
        first.finish(0, [{"error": {"type": "ValueError"}}])
        watch.look()
        assert told == [(0, 1, 1)]
        watch.finished(0, 4, 1)
        watch.look()
    assert told == [(0, 1, 1), (0, 4, 1)]


def test_deaths_before_there_is_a_model_are_counted(tmp_path: Path) -> None:
    births = Births(tmp_path / "loading", workers=2)
    assert births.begin() == births.begin() == ""  # both load
    births.done()
    # Three that die beside one that loads: the next may not.
    assert [births.begin() for _ in range(4)] == [""] * 4
    assert "3 workers or more in a row died before they had a model" in births.begin()
    births.end()
    assert not list(tmp_path.iterdir())
