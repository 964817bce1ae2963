"""All rows of a run in one file, and what they come to."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dycoke.batch.items import BatchError, pyarrow
from dycoke.batch.rows import SECONDS, TOKENS
from dycoke.batch.shards import Folder

JOINED = (".jsonl", ".parquet")
ROWS_AT_ONCE = 1000


@dataclass
class Summary:
    """Counts over rows, and the seconds that they took in all."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        if row["error"] is not None:
            self.failed[row["error"]["type"]] += 1
        for name in SECONDS:
            self.seconds[name] += row["seconds"][name] or 0.0

    @property
    def failed_share(self) -> float:
        """Share of the rows that failed."""
        return self.failed.total() / self.rows if self.rows else 0.0


def summary(folder: Folder, shards: Iterable[int]) -> Summary:
    """Of the rows of these shards, which are done."""
    whole = Summary()
    for shard in shards:
        for row in folder.rows(shard):
            whole.add(row)
    return whole


def join(folder: Folder, target: Path) -> int:
    """Write all rows into one file, in the order of the inputs; how many there are.

    Raises
    ------
    BatchError
        Where a shard is not done, or the file cannot be written.
    """
    settings = folder.settings()
    done = folder.parts()
    missing = [shard for shard in range(settings["shards"]) if shard not in done]
    if missing:
        named = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise BatchError(
            f"{folder.path}: {len(missing)} of {settings['shards']} shards are not done ({named}); "
            "run dycoke batch again as before, and it goes on from there"
        )
    if target.suffix not in JOINED:
        raise BatchError(f"{target}: rows are joined to a {' or '.join(JOINED)} file")
    rows = (row for shard in range(settings["shards"]) for row in folder.rows(shard))
    aside = target.with_name(f".{target.name}.tmp")
    try:
        write = _parquet if target.suffix == ".parquet" else _jsonl
        count = write(aside, rows)
        if count != settings["rows"]:
            raise BatchError(
                f"{folder.path} has {count} rows, and its inputs ask for {settings['rows']}"
            )
        os.replace(aside, target)
    except OSError as error:
        raise BatchError(f"cannot write {target}: {error.strerror or error}") from None
    return count


def _jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Nested columns as they are; settings, whose fields are each method's own, as JSON."""
    pa, parquet = pyarrow(path.name[1:-4])
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        {
            "id": text,
            "video": text,
            "prompt": text,
            "text": text,
            "error": pa.struct({"type": text, "message": text}),
            "finish_reason": text,
            "frames": whole,
            "duration_s": real,
            "tokens": pa.struct(dict.fromkeys(TOKENS, whole)),
            "seconds": pa.struct(dict.fromkeys(SECONDS, real)),
            "method": text,
            "settings": text,
            "model": text,
            "version": text,
            "attempt": whole,
            "host": text,
        }
    )
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            flat = [{**row, "settings": json.dumps(row["settings"])} for row in batch]
            writer.write_table(pa.Table.from_pylist(flat, schema))
            count += len(batch)
    return count
