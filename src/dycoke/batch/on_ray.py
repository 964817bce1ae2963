"""The Ray runner: Ray places workers and gives them shards; what survives what is ours."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dycoke.batch.items import BatchError, Item
from dycoke.batch.local import STILLBORN, Told, cannot_begin, cannot_write
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Plan, Spec, Worker

EVERY_LOOK = 2.0  # seconds


class Births:
    """Counts workers that die before they have a model, over processes and machines.

    Ray begins such a worker again without end. Each leaves a file before it loads, and one that has
    loaded takes all away: what is left are deaths in a row, and those that load at this moment.

    Parameters
    ----------
    path : a folder of this run alone.
    workers : that may load at once.
    """

    def __init__(self, path: Path, workers: int) -> None:
        self.path, self.most = path, STILLBORN + workers - 1

    def begin(self) -> str:
        """Why no more of them should begin; empty where one may."""
        self.path.mkdir(parents=True, exist_ok=True)
        if len(list(self.path.iterdir())) >= self.most:
            return f"{STILLBORN} workers or more in a row died before they had a model"
        (self.path / uuid.uuid4().hex).touch()
        return ""

    def done(self) -> None:
        """The model is there."""
        for mark in self.path.iterdir():
            mark.unlink(missing_ok=True)  # another may do the same

    def end(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Actor:
    """A worker as Ray sees it: made once in its process, and called with a shard at a time.

    A process that dies is replaced by Ray, which repeats its shard without end; the journal counts,
    and so it ends. What no other process would do better is said instead of raised, since Ray
    makes pages of it.
    """

    def __init__(self, spec: Spec, path: str, plan: Plan, births: Births) -> None:
        self.path = path
        try:
            self.fault = births.begin()
            if not self.fault:
                self.worker = Worker(spec.build(), Folder(path), plan)
                births.done()
        except Exception as error:
            self.fault = cannot_begin(error)

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        done = failed = 0
        try:
            if not self.fault:
                items = [Item.from_dict(made) for made in json.loads(given["items"])]
                done, failed = self.worker.run(int(given["shard"]), items)
        except OSError as error:
            self.fault = cannot_write(self.path, error)
        return {"shard": given["shard"], "done": done, "failed": failed, "fault": self.fault}


class _Watch:
    """Tells how far shards are while actors work on them, from their journals.

    Ray hands over what an actor returns, and that only when a shard is done.
    """

    def __init__(self, folder: Folder, shards: Iterable[int], told: Told) -> None:
        self._folder, self._told, self._left = folder, told, set(shards)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="dycoke-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def finished(self, shard: int, done: int, failed: int) -> None:
        with self._lock:
            self._left.discard(shard)
            self._told(shard, done, failed)

    def look(self) -> None:
        for shard in self._folder.journals():
            with self._lock:
                # One whose journal is gone is done, and Ray is about to say so.
                if shard in self._left and (done := self._folder.so_far(shard))[0]:
                    self._told(shard, *done)

    def _work(self) -> None:
        while not self._over.wait(EVERY_LOOK):
            self.look()


def placing(
    there: Mapping[str, float], workers: int | None, gpus: float | None, own: bool
) -> tuple[int, float]:
    """How many actors there are, and the GPUs of each.

    Parameters
    ----------
    there : what the cluster has, as Ray names it.
    workers : None for as many as its GPUs serve, at least one.
    gpus : of each; None for one where the cluster has any.
    own : whether the cluster is this machine alone, so that nothing can come later.

    Raises
    ------
    BatchError
        Where an actor could never begin.
    """
    total = there.get("GPU", 0.0)
    each = float(total > 0) if gpus is None else gpus
    if own and each > total:
        raise BatchError(f"--gpus {each:g}: this machine has {total:g} for Ray")
    return workers or max(1, int(total / each) if each else 1), each


def run_ray(
    spec: Spec,
    folder: Folder,
    plan: Plan,
    workers: int | None,
    shards: Mapping[int, Sequence[Item]],
    told: Told,
    address: str | None = None,
    gpus: float | None = None,
) -> None:
    """Finish these shards on a Ray cluster.

    Parameters
    ----------
    spec, folder, plan, shards, told : as in `run_local`. All nodes see the folder and the videos.
    workers, gpus : number of actors, and GPUs of each; None as in `placing`.
    address : of the cluster; None for one on this machine, unless RAY_ADDRESS names another.

    Raises
    ------
    BatchError
        Where Ray is not installed, or the run cannot go on.
    """
    try:
        ray: Any = importlib.import_module("ray")
        data: Any = importlib.import_module("ray.data")
    except ImportError:
        raise BatchError("--runner ray needs Ray: pip install 'dycoke[batch]' brings it") from None
    births: Births | None = None
    ours = not ray.is_initialized()
    own = ours and not (address or os.environ.get("RAY_ADDRESS"))
    try:
        if ours:
            local = {"include_dashboard": False} if own else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
            logging.getLogger("ray.data").setLevel(logging.WARNING)
        count, each = placing(ray.cluster_resources(), workers, gpus, own)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        given = [
            {"shard": shard, "items": json.dumps([item.to_dict() for item in items])}
            for shard, items in sorted(shards.items())
        ]
        actors = min(count, len(given))
        births = Births(folder.scratch() / f"loading-{uuid.uuid4().hex}", actors)
        rows = data.from_items(given, override_num_blocks=len(given)).map(
            Actor,
            fn_constructor_args=(spec, str(folder.path), plan, births),
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=each,
        )
        with _Watch(folder, shards, told) as watch:
            for row in rows.iter_rows():
                if row["fault"]:
                    raise BatchError(row["fault"])
                watch.finished(int(row["shard"]), int(row["done"]), int(row["failed"]))
    except ray.exceptions.RayError as error:
        raise BatchError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if ours:
            ray.shutdown()
        if births is not None:
            births.end()
