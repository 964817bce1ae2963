"""From inputs to rows: begin or go on with a run, and let a runner finish what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from dycoke.batch.items import BatchError, Item, digest
from dycoke.batch.join import Summary, summary
from dycoke.batch.local import Told
from dycoke.batch.progress import Progress
from dycoke.batch.shards import Folder, Slice, cut

FORMAT = 1  # of the folder; another one is refused

Runner = Callable[[Mapping[int, Sequence[Item]], Told], None]
"""Finishes the shards that it is given."""


def drive(
    items: Sequence[Item],
    folder: Folder,
    settings: Mapping[str, Any],
    runner: Runner,
    shard_size: int = 64,
    slice: Slice | None = None,
    retry_failed: bool = False,
    console: Console | None = None,
) -> Summary:
    """Finish a run, or one job's slice of it.

    Parameters
    ----------
    items : of the whole run, the same in all jobs.
    folder : where it writes.
    settings : what answers depend on; to go on in others is refused.
    runner : does the work.
    shard_size : videos in a shard.
    slice : the shards of this job; None for all.
    retry_failed : take up the videos again that failed before.
    console : where progress is shown; None for nowhere.

    Returns
    -------
    Summary
        Of all rows of the slice, those of earlier runs included.

    Raises
    ------
    BatchError
        As `Folder.begin`, and where the runner cannot go on.
    """
    shards, own = cut(items, shard_size), slice or Slice()
    folder.begin(
        {
            "format": FORMAT,
            **settings,
            "shard_size": shard_size,
            "inputs": digest(items),
            "videos": len(items),
            "rows": sum(len(item.questions) for item in items),
            "shards": len(shards),
        }
    )
    ours = {number: shard for number, shard in enumerate(shards) if number in own}
    name = "progress" if slice is None else f"progress-{own.index}-of-{own.count}"
    done = folder.parts() & ours.keys()
    if retry_failed:
        for number in sorted(done):
            folder.reopen(number, ours[number])
        done = folder.parts() & ours.keys()
    progress = Progress(sum(map(len, ours.values())), console, folder.path / f"{name}.json")
    for number in done:
        folder.sweep(number)
        failed = len(folder.failures(number, ours[number]))
        progress.known(number, len(ours[number]), failed)
    todo = {number: shard for number, shard in ours.items() if number not in done}
    for number in todo:
        progress.known(number, *folder.so_far(number))
    with progress:
        if todo:
            runner(todo, progress.told)
    left = ours.keys() - folder.parts()
    if left:
        raise BatchError(f"{folder.path}: {len(left)} shards were not finished; run it once more")
    return summary(folder, sorted(ours))
