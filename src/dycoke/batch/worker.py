"""A worker takes shards, one after the other, and turns each into a part; it knows no model.

While it answers, a thread reads the next videos. Every video is marked in the journal before
anything touches it. One whose process died once is afterwards taken with no other under way, so
that what dies again is known.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from dycoke.batch.items import Item
from dycoke.batch.journal import Journal
from dycoke.batch.rows import Clip, Reply, Stamp, fault, row
from dycoke.batch.shards import Folder

BROKEN = 70  # exit code of a process that can do no more: EX_SOFTWARE


@dataclass
class Loaded:
    """A video that is read.

    Attributes
    ----------
    clip : what its rows say of it.
    key : videos of equal keys can be answered together; None for one that goes alone.
    content : the answerer's own.
    """

    clip: Clip
    key: Hashable
    content: Any


class Answerer(Protocol):
    """A model, as far as a worker sees it."""

    @property
    def stamp(self) -> Stamp:
        """What all rows say alike."""

    def load(self, item: Item, scratch: str) -> Loaded:
        """Read a video; called in a thread of its own. What it raises becomes the item's rows.

        ``scratch`` names a folder for files of its own, which it has to make; it goes with the
        shard.
        """

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        """Replies to all questions of each item; several items have equal keys."""

    def broken(self, error: Exception) -> bool:
        """Whether after this error the process can answer nothing any more."""


class Spec(Protocol):
    """How a process makes its answerer; travels to it by pickle."""

    def build(self) -> Answerer:
        """The answerer."""

    def on(self, worker: int, workers: int) -> Spec:
        """That of one of several workers on this machine."""


@dataclass(frozen=True)
class Plan:
    """How shards are worked on; changes nothing in the rows' answers.

    Attributes
    ----------
    batch_size : most videos that are answered together.
    max_attempts : processes that may die over a video before it becomes a row that says so.
    """

    batch_size: int = 1
    max_attempts: int = 2


class Stopped(BaseException):
    """The worker is to end now; what is under way is given back."""


Tell = Callable[[int, int], None]  # items of the shard that are finished, and that failed


class Worker:
    """Works on shards of one folder.

    Parameters
    ----------
    answerer : the model.
    folder : of the run.
    plan : how.
    stopping : asked between videos; True ends the work.
    """

    def __init__(
        self,
        answerer: Answerer,
        folder: Folder,
        plan: Plan,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.answerer, self.folder, self.plan, self.stopping = answerer, folder, plan, stopping

    def run(
        self, shard: int, items: Sequence[Item], note: str = "", tell: Tell = lambda done, bad: None
    ) -> tuple[int, int]:
        """Finish a shard, unless it is finished.

        Parameters
        ----------
        shard : its number.
        items : all of it.
        note : how the process before this one ended, where that is known.
        tell : called after each item.

        Returns
        -------
        (int, int)
            Items, and those of them with a row that failed.

        Raises
        ------
        Stopped
            Where the worker is to end. Another run goes on from there.
        OSError
            Where the folder cannot be written.
        """
        with self.folder.journal(shard) as journal:
            if self.folder.part(shard).exists():
                self.folder.sweep(shard)
                done, failed = len(items), len(self.folder.failures(shard, items))
                tell(done, failed)
                return done, failed
            work = _Shard(self, journal, items, str(self.folder.files(shard)), tell)
            work.tell()
            with work.given_back():
                work.bury(note)
                work.suspects()
                work.others()
            self.folder.write_part(shard, work.rows())
            self.folder.sweep(shard)
            return work.counts()


@dataclass
class _Read:
    """A video that a thread has read, or could not."""

    place: int
    loaded: Loaded | None
    error: Exception | None = None


@dataclass
class _Shard:
    """One shard under work."""

    worker: Worker
    journal: Journal
    items: Sequence[Item]
    scratch: str
    told: Tell
    open: dict[int, bool] = field(default_factory=dict)  # place: alone

    def rows(self) -> list[dict[str, Any]]:
        return [row for place in range(len(self.items)) for row in self.journal.rows[place]]

    def counts(self) -> tuple[int, int]:
        rows = self.journal.rows.values()
        return len(rows), sum(any(row["error"] is not None for row in own) for own in rows)

    def tell(self) -> None:
        self.told(*self.counts())

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Where the work is broken off by somebody, no video is to blame."""
        try:
            yield
        except BaseException:
            self.journal.give_back(list(self.open.items()))
            raise

    def check(self) -> None:
        if self.worker.stopping():
            raise Stopped

    def begin(self, place: int, alone: bool) -> None:
        self.journal.begin(place, alone)
        self.open[place] = alone

    def left(self, suspect: bool) -> list[int]:
        tries, rows = self.journal.tries, self.journal.rows
        return [
            place
            for place in range(len(self.items))
            if place not in rows and (tries[place] > 0) == suspect
        ]

    def bury(self, note: str) -> None:
        """Rows for the videos over which too many processes died, the last of them surely."""
        for place in self.left(True):
            tries = self.journal.tries[place]
            if self.journal.alone[place] and tries >= self.worker.plan.max_attempts:
                message = f"the process died over this video, {tries} times"
                message += f" ({note})" * bool(note)
                self.failed(place, {"type": "ProcessDied", "message": message})

    def suspects(self) -> None:
        """One at a time, and nothing else under way."""
        for place in self.left(True):
            self.check()
            self.begin(place, alone=True)
            read = self.read(place)
            self.answer([read])

    def others(self) -> None:
        """Read ahead, and answer in batches of what is alike."""
        size = self.worker.plan.batch_size
        waiting: dict[Hashable, list[_Read]] = {}
        with _ahead(self, self.left(False), size + 1) as reads:
            for read in reads:
                self.check()
                key = None if read.loaded is None else read.loaded.key
                if key is None:
                    self.answer([read])
                    continue
                batch = waiting.setdefault(key, [])
                batch.append(read)
                if len(batch) == size:
                    self.answer(waiting.pop(key))
                elif sum(map(len, waiting.values())) > 2 * size:  # too many kinds to wait for
                    self.answer(waiting.pop(max(waiting, key=lambda kind: len(waiting[kind]))))
            for batch in waiting.values():
                self.check()
                self.answer(batch)

    def read(self, place: int) -> _Read:
        try:
            return _Read(place, self.worker.answerer.load(self.items[place], self.scratch))
        except Exception as error:
            self.spare(error)
            return _Read(place, None, error)

    def answer(self, batch: list[_Read]) -> None:
        """Rows of these videos; where a batch fails, of each by itself."""
        for read in batch:
            if read.loaded is None:
                assert read.error is not None
                self.failed(read.place, fault(read.error))
        good = [(read.place, read.loaded) for read in batch if read.loaded is not None]
        if not good:
            return
        try:
            replies = self.worker.answerer.answer(
                [self.items[place] for place, _ in good], [loaded for _, loaded in good]
            )
        except Exception as error:
            self.spare(error)
            if len(good) > 1:
                for read in batch:
                    if read.loaded is not None:
                        self.answer([read])
                return
            self.failed(good[0][0], fault(error), good[0][1].clip)
            return
        for (place, loaded), own in zip(good, replies, strict=True):
            self.finish(place, loaded.clip, own)

    def spare(self, error: Exception) -> None:
        """End a process that can do no more, so that the next videos are spared its errors."""
        if self.worker.answerer.broken(error):
            os._exit(BROKEN)

    def finish(self, place: int, clip: Clip, replies: Sequence[Reply]) -> None:
        item, stamp, attempt = self.items[place], self.worker.answerer.stamp, self.attempt(place)
        self.done(
            place,
            [
                row(stamp, item, question, attempt, clip, reply)
                for question, reply in zip(item.questions, replies, strict=True)
            ],
        )

    def failed(self, place: int, error: dict[str, str], clip: Clip | None = None) -> None:
        item, stamp, attempt = self.items[place], self.worker.answerer.stamp, self.attempt(place)
        rows = [
            row(stamp, item, question, attempt, clip, None, error) for question in item.questions
        ]
        self.done(place, rows)

    def attempt(self, place: int) -> int:
        return max(self.journal.tries[place], 1)

    def done(self, place: int, rows: list[dict[str, Any]]) -> None:
        self.journal.finish(place, rows)
        self.open.pop(place, None)
        self.tell()


class _Ahead:
    """A thread that reads videos before they are needed."""

    def __init__(self, shard: _Shard, places: Sequence[int], most: int) -> None:
        self._shard, self._places = shard, places
        self._queue: queue.Queue[_Read | BaseException | None] = queue.Queue()
        self._room = threading.Semaphore(most)
        self._over = False
        self._thread = threading.Thread(target=self._work, name="dycoke-read", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Read]:
        while (read := self._queue.get()) is not None:
            if isinstance(read, BaseException):
                raise read
            self._room.release()
            yield read

    def _work(self) -> None:
        try:
            for place in self._places:
                self._room.acquire()
                if self._over:
                    return
                self._shard.begin(place, alone=False)
                self._queue.put(self._shard.read(place))
            self._queue.put(None)
        except BaseException as error:  # of the journal, such as a full disk
            self._queue.put(error)

    def stop(self) -> None:
        """End once the video under way is read."""
        self._over = True
        self._room.release()
        self._thread.join()


@contextmanager
def _ahead(shard: _Shard, places: Sequence[int], most: int) -> Iterator[_Ahead]:
    ahead = _Ahead(shard, places, most)
    try:
        yield ahead
    finally:
        ahead.stop()
