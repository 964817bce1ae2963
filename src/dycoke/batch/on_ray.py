"""The Ray runner: Ray places workers and gives them shards; what survives what is ours."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dycoke.batch.items import BatchError, Item
from dycoke.batch.local import Told
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Plan, Spec, Worker


class Actor:
    """A worker as Ray sees it: made once in its process, and called with a shard at a time.

    A process that dies is replaced by Ray, which repeats its shard without end; the journal counts,
    and so it ends.
    """

    def __init__(self, spec: Spec, path: str, plan: Plan) -> None:
        self.worker = Worker(spec.build(), Folder(path), plan)

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        items = [Item.from_dict(made) for made in json.loads(given["items"])]
        done, failed = self.worker.run(int(given["shard"]), items)
        return {"shard": given["shard"], "done": done, "failed": failed}


def run_ray(
    spec: Spec,
    folder: Folder,
    plan: Plan,
    workers: int,
    shards: Mapping[int, Sequence[Item]],
    told: Told,
    address: str | None = None,
    gpus: float = 0.0,
) -> None:
    """Finish these shards on a Ray cluster.

    Parameters
    ----------
    spec, folder, plan, shards, told : as in `run_local`. All nodes see the folder and the videos.
    workers : number of actors.
    address : of the cluster; None for one on this machine, unless RAY_ADDRESS names another.
    gpus : GPUs of each actor.

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
    ours = not ray.is_initialized()
    if ours:
        own = {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **own)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        given = [
            {"shard": shard, "items": json.dumps([item.to_dict() for item in items])}
            for shard, items in sorted(shards.items())
        ]
        rows = data.from_items(given, override_num_blocks=len(given)).map(
            Actor,
            fn_constructor_args=(spec, str(folder.path), plan),
            compute=data.ActorPoolStrategy(size=min(workers, len(given))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in rows.iter_rows():
            told(int(row["shard"]), int(row["done"]), int(row["failed"]))
    except ray.exceptions.RayError as error:
        raise BatchError(f"Ray: {error}") from error
    finally:
        if ours:
            ray.shutdown()
