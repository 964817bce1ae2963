"""Workers that are killed at random points of what they write, over and over, until all is done.

Run as a script, so that forking is cheap: ``batch_schedules.py FOLDER FIRST LAST`` prints a JSON
object of what is wrong, by schedule. Every process kills itself by SIGKILL before or after its n-th
system call that changes a file, or in the midst of one that writes; or as it reads or answers a
video. Two of them work at once, on the same shards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch_stub import Stub, items_of, told

from dycoke.batch.items import Item
from dycoke.batch.rows import Reply
from dycoke.batch.shards import Folder, cut
from dycoke.batch.worker import Loaded, Plan, Worker

CALLS = ("write", "replace", "unlink", "ftruncate", "fsync")
MOST = 400  # processes


class Fuse:
    """Kills this process at its n-th turn."""

    def __init__(self, turns: int, chance: random.Random) -> None:
        self.turns, self.chance = turns, chance

    def turn(self) -> bool:
        self.turns -= 1
        return self.turns == 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def lay(self) -> None:
        """Into the system calls of this process."""
        for name in CALLS:
            setattr(os, name, self._dangerous(name, getattr(os, name)))

    def _dangerous(self, name: str, call: Any) -> Any:
        def dangerous(*args: Any) -> Any:
            if not self.turn():
                return call(*args)
            how = self.chance.choice(("before", "within", "after"))
            if how == "within" and name == "write":
                call(args[0], args[1][: self.chance.randrange(len(args[1]))])
            if how == "after":
                call(*args)
            return self.die()

        return dangerous


class Mortal(Stub):
    """A stub that may die over any video."""

    fuse: Fuse

    def load(self, item: Item, scratch: str) -> Loaded:
        if self.fuse.turn():
            self.fuse.die()
        return super().load(item, scratch)

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        if self.fuse.turn():
            self.fuse.die()
        return super().answer(items, loaded)


def work(folder: Folder, shards: list[list[Item]], plan: Plan, turns: int, seed: int) -> None:
    """What a process does."""
    chance = random.Random(seed)
    model = Mortal()
    object.__setattr__(model, "fuse", Fuse(turns, chance))
    model.fuse.lay()
    order = list(range(len(shards)))
    chance.shuffle(order)
    for shard in order:
        if not folder.part(shard).exists():
            Worker(model, folder, plan).run(shard, shards[shard])


def schedule(path: Path, seed: int) -> list[str]:
    """What is wrong after one schedule of deaths; all of it should be well."""
    chance = random.Random(seed)
    names = [f"{chance.choice('ab')}{place}" for place in range(chance.randint(5, 12))]
    poison = {names[0]: "exit0", names[-1]: "late"} if chance.random() < 0.5 else {}
    names = [poison.get(name, name) for name in names]
    items = items_of(*names, prompts=("?", "!")[: chance.randint(1, 2)])
    shards = cut(items, chance.randint(2, 5))
    folder = Folder(path / str(seed))
    folder.begin({})
    plan = Plan(batch_size=chance.randint(1, 3), max_attempts=20)
    for round in range(MOST):
        if len(folder.parts()) == len(shards):
            for shard in range(len(shards)):
                folder.sweep(shard)
            return wrong(folder, shards, set(poison.values())) + [
                f"{left} is left" for left in os.listdir(folder.scratch())
            ]
        children = []
        for _ in range(2):
            turns, own = chance.randint(1, 60), chance.randrange(1 << 30)
            child = os.fork()
            if not child:
                work(folder, shards, plan, turns, own)
                os._exit(0)
            children.append(child)
        for child in children:
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) not in (0, 7):
                return [f"round {round}: a process ended with {status}"]
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
    found = {seed: said for seed in range(first, last) if (said := schedule(path, seed))}
    print(json.dumps(found))
