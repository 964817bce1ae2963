"""A model whose answers come at once, and videos that kill; for processes of their own, too."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dycoke.batch.items import Item, Member, Question
from dycoke.batch.rows import Clip, Reply, Stamp
from dycoke.batch.worker import Loaded


@dataclass(frozen=True)
class Stub:
    """Its own spec, and its own answerer.

    A video is named by what happens: ``exit`` and ``kill`` end the process while it is read,
    ``late`` while it is answered, ``bad`` cannot be read, ``dull`` cannot be answered, ``lost``
    breaks the model. Those of one first letter can be answered together.
    """

    pause: float = 0.0
    born: bool = True

    @property
    def stamp(self) -> Stamp:
        return Stamp("stub", {"pause": self.pause}, "stub")

    def build(self) -> Stub:
        if not self.born:
            os._exit(3)
        if told_where := os.environ.get("DYCOKE_TEST_PIDS"):
            Path(told_where, str(os.getpid())).touch()
        return self

    def on(self, worker: int, workers: int) -> Stub:
        return self

    def load(self, item: Item, scratch: str) -> Loaded:
        name = Path(item.video).name
        if name.startswith("exit"):
            os._exit(7)
        if name.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("bad"):
            raise ValueError(f"{name}: not\na video")
        key = None if len(item.questions) > 1 else name[0]
        return Loaded(Clip(item.frames, 1.5), key, name)

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        time.sleep(self.pause)
        for one in loaded:
            if one.content.startswith("late"):
                os.kill(os.getpid(), signal.SIGKILL)
            if one.content.startswith("dull"):
                raise RuntimeError("too dull")
            if one.content.startswith("lost"):
                raise ZeroDivisionError
        return [
            [Reply(told(question), "stop", {"new": len(loaded)}) for question in item.questions]
            for item in items
        ]

    def broken(self, error: Exception) -> bool:
        return isinstance(error, ZeroDivisionError)


def told(question: Question) -> str:
    """What the stub answers."""
    return f"{question.id} {question.prompt}"


def items_of(*names: str, prompts: Sequence[str] = ("?",)) -> list[Item]:
    """Items of videos that are nowhere."""
    return [
        Item(f"/nowhere/{name}", 8, tuple(Question(name, prompt) for prompt in prompts))
        for name in names
    ]


__all__ = ["Member", "Stub", "items_of", "told"]

if __name__ == "__main__":  # a driver of its own, to be killed
    from functools import partial

    from dycoke.batch.drive import Runner, drive
    from dycoke.batch.local import run_local
    from dycoke.batch.on_ray import run_ray
    from dycoke.batch.shards import Folder
    from dycoke.batch.worker import Plan

    how, path, pause, *names = sys.argv[1:]
    folder, runners = Folder(path), {"local": run_local, "ray": run_ray}
    runner: Runner = partial(runners[how], Stub(float(pause)), folder, Plan(2, 50), 2)
    drive(items_of(*names), folder, {}, runner, shard_size=4)
