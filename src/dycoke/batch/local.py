"""The local runner: processes on this machine, and nothing but the standard library.

Workers are spawned, get shards through pipes, and are replaced when they die. One whose driver
dies ends after the video under way.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from dycoke.batch.items import BatchError, Item
from dycoke.batch.rows import fault
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Plan, Spec, Stopped, Worker

STILLBORN = 3  # processes in a row that die before they can take a shard
GRACE = 10.0  # seconds for a worker that is told to end

Told = Callable[[int, int, int], None]
"""Called with a shard, its finished items and those of them that failed."""


def run_local(
    spec: Spec,
    folder: Folder,
    plan: Plan,
    workers: int,
    shards: Mapping[int, Sequence[Item]],
    told: Told,
) -> None:
    """Finish these shards.

    Parameters
    ----------
    spec : makes each worker's model.
    folder : of the run.
    plan : how shards are worked on.
    workers : number of processes.
    shards : items by the shard's number.
    told : hears of progress.

    Raises
    ------
    BatchError
        Where workers cannot begin, or cannot write.
    """
    pool = _Pool(spec, folder, plan, shards, min(workers, len(shards)), told)
    try:
        pool.work()
    finally:
        pool.end()


@dataclass
class _Process:
    process: Any
    pipe: Connection
    number: int
    shard: int | None = None
    ready: bool = False


class _Pool:
    def __init__(
        self,
        spec: Spec,
        folder: Folder,
        plan: Plan,
        shards: Mapping[int, Sequence[Item]],
        workers: int,
        told: Told,
    ) -> None:
        self.spec, self.folder, self.plan = spec, folder, plan
        self.shards, self.workers, self.told = shards, workers, told
        self.todo = deque(sorted(shards))
        self.notes: dict[int, str] = {}
        self.running: dict[int, _Process] = {}  # by the worker's number
        self.stillborn = 0
        self.context = multiprocessing.get_context("spawn")

    def work(self) -> None:
        for number in range(self.workers):
            self.start(number)
        while self.running:
            ready = wait([process.pipe for process in self.running.values()])
            for process in [p for p in self.running.values() if p.pipe in ready]:
                try:
                    self.hear(process, process.pipe.recv())
                except (EOFError, OSError):
                    self.died(process)

    def start(self, number: int) -> None:
        ours, theirs = self.context.Pipe()
        spec = self.spec.on(number, self.workers)
        process = self.context.Process(
            target=serve,
            args=(theirs, spec, str(self.folder.path), self.plan),
            name=f"dycoke-batch-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()  # its other end is the worker's alone, so that its death is heard
        self.running[number] = _Process(process, ours, number)

    def hear(self, process: _Process, message: tuple[Any, ...]) -> None:
        kind, *said = message
        if kind == "error":
            raise BatchError(said[0])
        if kind == "at":
            self.told(*said)
            return
        if kind == "ready":
            process.ready, self.stillborn = True, 0
        process.shard = None
        self.give(process)

    def give(self, process: _Process) -> None:
        """The next shard, or the end."""
        if not self.todo:
            process.pipe.send(None)
            return
        process.shard = self.todo.popleft()
        note = self.notes.get(process.shard, "")
        process.pipe.send((process.shard, list(self.shards[process.shard]), note))

    def died(self, process: _Process) -> None:
        process.process.join()
        process.pipe.close()
        del self.running[process.number]
        how = _ending(process.process.exitcode)
        if process.shard is not None:
            self.notes[process.shard] = how
            self.todo.appendleft(process.shard)
        if not process.ready:
            self.stillborn += 1
            if self.stillborn >= STILLBORN:
                raise BatchError(
                    f"{STILLBORN} workers in a row died before they had a model, the last by {how}"
                )
        if self.todo:
            self.start(process.number)

    def end(self) -> None:
        """No process is left behind."""
        for process in self.running.values():
            process.process.terminate()
        until = time.monotonic() + GRACE
        for process in self.running.values():
            process.process.join(max(0.0, until - time.monotonic()))
            if process.process.is_alive():
                process.process.kill()
                process.process.join()
            process.pipe.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def cannot_begin(error: Exception) -> str:
    """What is said where a worker has no model."""
    said = fault(error)
    return f"a worker cannot begin: {said['type']}: {said['message']}"


def cannot_write(path: str, error: OSError) -> str:
    """What is said where a worker cannot keep its rows."""
    return f"cannot write to {path}: {error.strerror or error}"


def serve(pipe: Connection, spec: Spec, path: str, plan: Plan) -> None:
    """A worker's process: shards come through the pipe until None does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    driver = multiprocessing.parent_process()
    assert driver is not None
    with suppress(Stopped, EOFError, ConnectionError, KeyboardInterrupt):  # the driver is gone
        try:
            worker = Worker(spec.build(), Folder(path), plan, lambda: not driver.is_alive())
        except Exception as error:
            pipe.send(("error", cannot_begin(error)))
            return
        pipe.send(("ready",))
        while (given := pipe.recv()) is not None:
            shard, items, note = given

            def tell(done: int, failed: int, shard: int = shard) -> None:
                pipe.send(("at", shard, done, failed))

            try:
                worker.run(shard, items, note, tell)
            except ConnectionError:
                raise
            except OSError as error:
                pipe.send(("error", cannot_write(path, error)))
                return
            pipe.send(("done", shard))
