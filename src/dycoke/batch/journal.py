"""What is known of a shard that is not done: rows so far, and attempts that have no rows yet.

A line is written in one piece and never changed, so a process that dies at any point leaves whole
lines and at most one broken one, which is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

Row = dict[str, Any]


class Journal:
    """Opened, it is locked against everybody else, and waits until nobody else has it.

    The lock goes with the process, however that ends.

    Attributes
    ----------
    rows : of the items that are finished, by their place in the shard.
    tries : attempts of each item; one that was given back does not count.
    alone : how many of them were made with no other item under way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[int, list[Row]] = {}
        self.tries: Counter[int] = Counter()
        self.alone: Counter[int] = Counter()
        self._writing = threading.Lock()
        self._file = self._locked()
        self._replay()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _locked(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who had it before may have removed it, and then this one is nobody's.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == os.fstat(file).st_ino:
                    return file
            os.close(file)

    def _replay(self) -> None:
        whole = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not self._take(line):
                    break
                whole += len(line)
        os.ftruncate(self._file, whole)

    def _take(self, line: bytes) -> bool:
        """Learn from a line; whether it is whole."""
        try:
            said = json.loads(line)
        except ValueError:
            return False
        if "end" in said:
            self.rows[said["end"]] = said["rows"]
        elif "begin" in said:
            self.tries[said["begin"]] += 1
            self.alone[said["begin"]] += said["alone"]
        else:
            for place, alone in said["back"]:
                self.tries[place] -= 1
                self.alone[place] -= alone
        return True

    def _write(self, said: dict[str, Any]) -> None:
        line = json.dumps(said).encode() + b"\n"
        with self._writing:
            while line:
                line = line[os.write(self._file, line) :]

    def begin(self, place: int, alone: bool) -> None:
        """An attempt of an item, before anything touches its video.

        Where the process dies, this is left, without rows.
        """
        self._write({"begin": place, "alone": alone})
        self.tries[place] += 1
        self.alone[place] += alone

    def finish(self, place: int, rows: Sequence[Row]) -> None:
        """All rows of an item."""
        self._write({"end": place, "rows": rows})
        self.rows[place] = list(rows)

    def give_back(self, places: Iterable[tuple[int, bool]]) -> None:
        """Attempts (place, alone) that were broken off for no fault of the videos."""
        if back := list(places):
            self._write({"back": back})

    def clear(self) -> None:
        """Forget everything."""
        os.ftruncate(self._file, 0)
        self.rows.clear()
        self.tries.clear()
        self.alone.clear()

    def sync(self) -> None:
        """Return when the disk has all of it."""
        os.fsync(self._file)


def rows_so_far(path: Path) -> dict[int, list[Row]]:
    """The rows of a journal that somebody else may be writing; none where there is no such file."""
    rows: dict[int, list[Row]] = {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                said = json.loads(line)
            except ValueError:  # the last line, of which a part is still to come
                break
            if "end" in said:
                rows[said["end"]] = said["rows"]
    return rows
