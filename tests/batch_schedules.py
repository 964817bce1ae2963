"""Drivers and workers that are killed at random points, over and over, until all is done.

Run as a script, so that forking is cheap: ``batch_schedules.py FOLDER FIRST LAST`` prints a JSON
object: ``wrong`` says what is wrong, by schedule, and ``deaths`` how many drivers and workers were
killed. Every process kills itself by SIGKILL before or after its n-th system call that changes a
file, or in the midst of one that writes; a worker also as it reads or answers a video, and a driver
as it hears from one, half of the time with all its workers. One or two drivers of the local runner,
or of none, work at once, on the same shards.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from batch_stub import Stub, items_of, told

import dycoke.batch.local
from dycoke.batch.drive import Runner, drive
from dycoke.batch.items import Item
from dycoke.batch.local import Told, run_local
from dycoke.batch.rows import Reply
from dycoke.batch.shards import Folder, cut
from dycoke.batch.worker import Loaded, Plan, Worker

CALLS = ("write", "replace", "link", "unlink", "ftruncate", "fsync")
MOST = 400  # rounds
write, truncate = os.write, os.ftruncate


def appended(file: int) -> bool:
    """Whether a file is written by `os.write`, without a buffer: the journal."""
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND)


class Fuse:
    """Kills this process at its n-th turn, and tells the script through a pipe whom it killed."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.light("driver", 0, random.Random())
        for name in CALLS:
            setattr(os, name, self._dangerous(name, getattr(os, name)))

    def light(self, who: str, turns: int, chance: random.Random) -> None:
        """Set the number of turns, 0 for a process that lives."""
        self.who, self.turns, self.chance = who, turns, chance

    def burn(self) -> None:
        if self.turn():
            self.die()

    def turn(self) -> bool:
        self.turns -= 1
        return self.turns == 0

    def die(self) -> None:
        write(self.pipe, self.who[:1].encode())
        if self.who == "driver" and self.chance.random() < 0.5:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _dangerous(self, name: str, call: Any) -> Any:
        def dangerous(*args: Any) -> Any:
            if not self.turn():
                return call(*args)
            how = self.chance.choice(("before", "within", "after"))
            if how == "within" and name == "write":
                call(args[0], args[1][: self.chance.randrange(len(args[1]))])
            if how == "within" and name == "fsync" and not appended(args[0]):
                # What Python's own buffers had not handed over yet is lost.
                truncate(args[0], self.chance.randrange(os.fstat(args[0]).st_size + 1))
            if how == "after":
                call(*args)
            return self.die()

        return dangerous


class Mortal(Stub):
    """A stub that may die over any video."""

    fuse: Fuse

    def load(self, item: Item, scratch: str) -> Loaded:
        self.fuse.burn()
        return super().load(item, scratch)

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        self.fuse.burn()
        return super().answer(items, loaded)


class Forking:
    """The local runner's processes, forked instead of spawned, each with a fuse of its own."""

    def __init__(self, fuse: Fuse, chance: random.Random) -> None:
        self.fuse, self.chance = fuse, chance
        self.real = multiprocessing.get_context("fork")
        self.ours: list[Any] = []

    def Pipe(self) -> tuple[Any, Any]:  # noqa: N802
        pair = self.real.Pipe()
        self.ours.append(pair[0])
        return pair

    def Process(self, target: Any, args: tuple[Any, ...], **named: Any) -> Any:  # noqa: N802
        turns, seed = self.chance.randint(1, 60), self.chance.randrange(1 << 30)

        def begin(*args: Any) -> None:
            self.fuse.light("worker", turns, random.Random(seed))
            for pipe in self.ours:  # the driver's, which a spawned process has not
                pipe.close()
            target(*args)

        return self.real.Process(target=begin, args=args, **named)


def bare(model: Mortal, folder: Folder, plan: Plan, order: random.Random) -> Runner:
    """A runner in the driver's own process."""

    def work(shards: Mapping[int, Sequence[Item]], told: Told) -> None:
        for shard in order.sample(sorted(shards), len(shards)):
            told(shard, *Worker(model, folder, plan).run(shard, shards[shard]))

    return work


def begin(path: Path, items: Sequence[Item], plan: Plan, size: int, retry: bool, seed: int) -> int:
    """Fork a driver; the end of a pipe that is open for as long as it or a worker of it lives."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        return ours
    os.setsid()  # what kills its group leaves the script alone
    if os.fork():
        os._exit(0)
    chance = random.Random(seed)
    fuse, folder, model = Fuse(theirs), Folder(path), Mortal()
    object.__setattr__(model, "fuse", fuse)
    if chance.random() < 0.6:
        context = Forking(fuse, chance)
        dycoke.batch.local.multiprocessing = Spawner(context)  # type: ignore[assignment]
        runner: Runner = partial(run_local, model, folder, plan, chance.randint(1, 3))
        turns = chance.randint(1, 25)
    else:
        runner, turns = bare(model, folder, plan, chance), chance.randint(1, 40)
    fuse.light("driver", turns, random.Random(seed + 1))

    def listened(shards: Mapping[int, Sequence[Item]], told: Told) -> None:
        def hear(shard: int, done: int, failed: int) -> None:
            fuse.burn()
            told(shard, done, failed)

        runner(shards, hear)

    try:
        drive(items, folder, {}, listened, size, retry_failed=retry)
    except BaseException as error:
        write(theirs, f"!{error!r}\n".encode())
    os._exit(0)


class Spawner:
    """What `dycoke.batch.local` asks of multiprocessing."""

    parent_process = staticmethod(multiprocessing.parent_process)

    def __init__(self, context: Forking) -> None:
        self.context = context

    def get_context(self, kind: str) -> Forking:
        assert kind == "spawn"
        return self.context


def ended(pipe: int) -> bytes:
    """What the fuses of a driver and its workers said, once all of them are gone."""
    said = b""
    while more := os.read(pipe, 1000):
        said += more
    os.close(pipe)
    return said


def schedule(path: Path, seed: int, deaths: Counter[str]) -> list[str]:
    """What is wrong after one schedule of deaths; all of it should be well."""
    chance = random.Random(seed)
    names = [f"{chance.choice('ab')}{place}" for place in range(chance.randint(8, 20))]
    poison = {names[0]: "exit0", names[-1]: "late"} if chance.random() < 0.5 else {}
    names = [poison.get(name, name) for name in names]
    items = items_of(*names, prompts=("?", "!")[: chance.randint(1, 2)])
    size = chance.randint(2, 5)
    shards, folder = cut(items, size), Folder(path / str(seed))
    folder.path.mkdir()
    plan = Plan(batch_size=chance.randint(1, 3), max_attempts=20)
    for round in range(MOST):
        if len(folder.parts()) == len(shards):
            for shard in range(len(shards)):
                folder.sweep(shard)
            return wrong(folder, shards, set(poison.values())) + [
                f"{left} is left" for left in os.listdir(folder.scratch()) if left[-4:] != ".run"
            ]
        count = chance.randint(1, 2)
        retry = count == 1 and chance.random() < 0.3
        pipes = [
            begin(folder.path, items, plan, size, retry, chance.randrange(1 << 30))
            for _ in range(count)
        ]
        for said in map(ended, pipes):
            os.wait()
            deaths["driver"] += said.count(b"d")
            deaths["worker"] += said.count(b"w")
            if b"!" in said:
                return [f"round {round}: {said.partition(b'!')[2].decode()}"]
    return [f"not done after {MOST} rounds"]


def wrong(folder: Folder, shards: list[list[Item]], poison: set[str]) -> list[str]:
    """Questions without a row of their own, with two, or with a wrong one."""
    asked = {(q.id, q.prompt): told(q) for shard in shards for i in shard for q in i.questions}
    rows = [row for shard in range(len(shards)) for row in folder.rows(shard)]
    times = Counter((row["id"], row["prompt"]) for row in rows)
    found = [f"{key} has {times[key]} rows" for key in asked if times[key] != 1]
    found += [f"nobody asked {key}" for key in times if key not in asked]
    for row in rows:
        dead = row["id"] in poison
        kind = None if row["error"] is None else row["error"]["type"]
        if dead != (kind == "ProcessDied") or (not dead and row["text"] != told_by(row)):
            found.append(f"{row['id']}: {row['text']}, {row['error']}")
    if [row["id"] for row in rows] != [q.id for s in shards for i in s for q in i.questions]:
        found.append("the order is another")
    return found


def told_by(row: dict[str, Any]) -> str:
    return f"{row['id']} {row['prompt']}"


if __name__ == "__main__":
    path, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    deaths: Counter[str] = Counter()
    found = {seed: said for seed in range(first, last) if (said := schedule(path, seed, deaths))}
    print(json.dumps({"wrong": found, "deaths": deaths}))
