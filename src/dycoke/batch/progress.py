"""How far a run is: a bar on a terminal, a line a minute elsewhere, and a file for others."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rich.console import Console

EVERY_LINE = 60.0
EVERY_FILE = 1.0
EVERY_LOOK = 15.0  # seconds; for the times when nobody tells anything


class Progress:
    """Counts items of shards, and shows them, also while nothing comes. Any thread may tell it.

    Parameters
    ----------
    total : items of this job.
    console : where it is shown; None for nowhere.
    file : where it is written, at most once a second and at the end.
    clock : seconds.
    """

    def __init__(
        self,
        total: int,
        console: Console | None,
        file: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.console, self.file, self.clock = total, console, file, clock
        self._shards: dict[int, tuple[int, int]] = {}
        self._done = self._failed = 0
        self._before = 0
        self._began = self._lined = clock()
        self._filed = -EVERY_FILE + self._began
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._looks = threading.Thread(target=self._look, name="dycoke-progress", daemon=True)
        self._bar: Any = None
        self._task: Any = None

    def known(self, shard: int, done: int, failed: int) -> None:
        """What is done in a shard, counted from its beginning."""
        old = self._shards.get(shard, (0, 0))
        self._shards[shard] = done, failed
        self._done += done - old[0]
        self._failed += failed - old[1]

    def told(self, shard: int, done: int, failed: int) -> None:
        """As `known`, of what this run does."""
        with self._lock:
            self.known(shard, done, failed)
            self.show()

    def state(self) -> dict[str, Any]:
        """What `file` holds."""
        seconds = self.clock() - self._began
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        left = self.total - self._done
        return {
            "done": self._done,
            "total": self.total,
            "failed": self._failed,
            "per_second": round(rate, 3),
            "seconds": round(seconds, 1),
            "left_s": 0.0 if not left else round(left / rate, 1) if rate else None,
        }

    def line(self) -> str:
        """One line of it."""
        state = self.state()
        left = "?" if state["left_s"] is None else _time(state["left_s"])
        return (
            f"{state['done']} of {state['total']} videos, {state['per_second']:.2f} a second, "
            f"{state['failed']} failed, {left} left"
        )

    def show(self, last: bool = False) -> None:
        """Where it is time to."""
        with self._lock:
            self._show(self.clock(), last)

    def _look(self) -> None:
        while not self._over.wait(EVERY_LOOK):
            self.show()

    def _show(self, now: float, last: bool) -> None:
        if last or now - self._filed >= EVERY_FILE:
            self._filed = now
            self._write()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done, description=self.line())
        if self.console is None or self._bar is not None:
            return
        if last or now - self._lined >= EVERY_LINE:
            self._lined = now
            self.console.print(self.line(), soft_wrap=True, markup=False)

    def _write(self) -> None:
        aside = self.file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk, of which the rows themselves will tell
            aside.write_text(json.dumps(self.state()) + "\n")
            os.replace(aside, self.file)

    def __enter__(self) -> Self:
        self._before, self._began = self._done, self.clock()
        if self.console is not None and self.console.is_terminal:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=self.console)
            self._task = self._bar.add_task(self.line(), total=self.total, completed=self._done)
            self._bar.start()
        self._looks.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._looks.join()
        self.show(last=True)
        if self._bar is not None:
            self._bar.stop()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
