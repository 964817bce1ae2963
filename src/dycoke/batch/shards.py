"""The folder of a run: its settings, its shards, and what of it is done.

A shard is a run of consecutive items. Its rows appear at once, as ``part-000123.jsonl``; until
then ``work/000123.journal`` holds what is known of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dycoke.batch.items import BatchError, Item
from dycoke.batch.journal import Journal, Row, rows_so_far

PART = re.compile(r"part-(\d{6,})\.jsonl")
MOST_SAID = 4  # settings that an error names
JOURNAL = re.compile(r"(\d{6,})\.journal")


@dataclass(frozen=True)
class Slice:
    """The shards of one of several jobs: ``index``, ``index + count``, and so on.

    Attributes
    ----------
    index : from 0.
    count : number of jobs.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read ``i/n``, with i from 0 to n - 1."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None or int(found[1]) >= int(found[2]):
            raise BatchError(f"--shard must be i/n with i from 0 to n - 1, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __contains__(self, shard: int) -> bool:
        return shard % self.count == self.index


def cut(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The shards, ``size`` items each but for the last."""
    return [list(items[at : at + size]) for at in range(0, len(items), size)]


class Folder:
    """Where a run writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    def part(self, shard: int) -> Path:
        return self.path / f"part-{shard:06d}.jsonl"

    def scratch(self) -> Path:
        """Where journals are."""
        return self.path / "work"

    def files(self, shard: int) -> Path:
        """A folder for what a worker unpacks; there only where one needs it."""
        return self.scratch() / f"{shard:06d}.files"

    def journal(self, shard: int) -> Journal:
        """The journal of a shard, which nobody else has until it is closed; waits for that."""
        return Journal(self._journal(shard))

    def _journal(self, shard: int) -> Path:
        return self.scratch() / f"{shard:06d}.journal"

    def parts(self) -> set[int]:
        """The shards that are done."""
        found = (PART.fullmatch(name) for name in os.listdir(self.path))
        return {int(match[1]) for match in found if match}

    def journals(self) -> set[int]:
        """The shards that were begun and are not done."""
        found = (JOURNAL.fullmatch(name) for name in os.listdir(self.scratch()))
        return {int(match[1]) for match in found if match}

    def so_far(self, shard: int) -> tuple[int, int]:
        """Items of a shard that have rows in its journal, and those of them that failed.

        Whoever works on the shard goes on meanwhile.
        """
        rows = rows_so_far(self._journal(shard))
        return len(rows), sum(any(row["error"] for row in own) for own in rows.values())

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin a run in these settings, or go on with one; several jobs may do so at once.

        Raises
        ------
        BatchError
            Where one was begun here in other settings, where nobody knows in which settings, or
            where the folder cannot be written.
        """
        try:
            self.scratch().mkdir(parents=True, exist_ok=True)
            # In this order: a job that is quicker has written its run.json before its first row.
            if (self.parts() or self.journals()) and not self.run_file.exists():
                raise BatchError(
                    f"{self.path} has rows, and no run.json that says in which settings they were "
                    "made; give another --out"
                )
            with tempfile.NamedTemporaryFile("w", dir=self.scratch(), suffix=".run") as aside:
                json.dump(settings, aside, indent=1)
                aside.flush()
                os.fsync(aside.fileno())
                try:
                    os.link(aside.name, self.run_file)  # of several jobs one is first
                except FileExistsError:
                    self._check(settings)
        except OSError as error:
            raise BatchError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def _check(self, settings: Mapping[str, Any]) -> None:
        begun, wanted = _flat(self.settings()), _flat(json.loads(json.dumps(settings)))
        names = [n for n in {**begun, **wanted} if begun.get(n) != wanted.get(n)]
        if names:
            # The digest of the inputs says nothing to anybody.
            said = [
                f"{n} are others"
                if n == "inputs"
                else f"{n} was {begun.get(n)!r}, now {wanted.get(n)!r}"
                for n in names
            ]
            if len(said) > MOST_SAID:
                said[MOST_SAID:] = [f"and {len(said) - MOST_SAID} more"]
            raise BatchError(
                f"{self.path} was begun in other settings ({'; '.join(said)}); go on with those, "
                "or give another --out"
            )

    def settings(self) -> dict[str, Any]:
        """What `begin` wrote."""
        try:
            made: dict[str, Any] = json.loads(self.run_file.read_text())
        except FileNotFoundError:
            raise BatchError(f"{self.path}: no run was begun here (no run.json)") from None
        except (OSError, ValueError) as error:
            raise BatchError(f"{self.run_file} cannot be read: {error}") from None
        return made

    def write_part(self, shard: int, rows: Sequence[Row]) -> None:
        """All rows of a shard, there whole or not at all. Only the journal's holder may call it."""
        aside = self.path / f".part-{shard:06d}.tmp"
        with open(aside, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.part(shard))

    def sweep(self, shard: int) -> None:
        """Remove what a finished shard has left over where its process died at the very end."""
        shutil.rmtree(self.files(shard), ignore_errors=True)
        self._journal(shard).unlink(missing_ok=True)

    def rows(self, shard: int) -> Iterator[Row]:
        """The rows of a shard that is done.

        Raises
        ------
        BatchError
            Where somebody has changed them.
        """
        with open(self.part(shard), encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise BatchError(
                        f"{self.part(shard)}, line {number}: no row; remove this file, and its "
                        "videos are asked again"
                    ) from None

    def failures(self, shard: int, items: Sequence[Item]) -> list[int]:
        """Places of the items of a finished shard that have a row that failed."""
        bad = [any(row["error"] is not None for row in own) for own in self.by_item(shard, items)]
        return [place for place, failed in enumerate(bad) if failed]

    def by_item(self, shard: int, items: Sequence[Item]) -> Iterator[list[Row]]:
        """The rows of a finished shard, those of each item together."""
        rows = list(self.rows(shard))
        wanted = [(question.id, question.prompt) for item in items for question in item.questions]
        if [(row["id"], row["prompt"]) for row in rows] != wanted:
            raise BatchError(
                f"{self.part(shard)} has not the {len(wanted)} rows that its videos ask for; "
                "remove this file, and they are asked again"
            )
        left = iter(rows)
        for item in items:
            yield list(islice(left, len(item.questions)))

    def reopen(self, shard: int, items: Sequence[Item]) -> int:
        """Put the videos of a finished shard that failed back to work; how many there were.

        The part goes only after its journal has all other rows. Where a process dies in between,
        the part is still there and counts.
        """
        with self.journal(shard) as journal:
            if not self.part(shard).exists():
                return 0
            rows = list(self.by_item(shard, items))
            failed = set(self.failures(shard, items))
            journal.clear()
            if not failed:
                self.sweep(shard)
                return 0
            for place, own in enumerate(rows):
                if place not in failed:
                    journal.finish(place, own)
            journal.sync()
            self.part(shard).unlink()
            return len(failed)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of settings by a name of their own."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": own for inner, own in value.items()})
        else:
            flat[name] = value
    return flat
