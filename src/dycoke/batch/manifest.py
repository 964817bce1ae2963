"""Which videos a run is about: folders, globs, manifests, tar shards, files."""

from __future__ import annotations

import csv
import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dycoke.batch.items import BatchError, Entry, Item, Member, gather, pyarrow

_KINDS = "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
"""What is taken for a video in a folder and in a tar; a file that is named may have any other."""

COLUMNS = "video, and where needed id, prompt, frames"


def read_inputs(sources: Sequence[str], prompts: Sequence[str], frames: int) -> list[Item]:
    """The videos of these sources with their questions.

    Parameters
    ----------
    sources : folders (all videos and tars below them), globs, manifests (``.txt`` with a path a
        line; ``.jsonl``, ``.csv``, ``.parquet`` with the columns `COLUMNS`), tars in WebDataset's
        layout, or video files.
    prompts : asked about each video that brings none of its own.
    frames : frames to sample of each video that names no number of its own.

    Raises
    ------
    BatchError
        For a source that is not there, holds no video or cannot be understood, and for questions
        that are there twice. A video that is not there is no error here, but becomes a row.
    """
    items = gather((entry for source in sources for entry in _entries(source)), prompts, frames)
    if not items:
        raise BatchError(f"no videos in {', '.join(sources) or 'nothing'}")
    return items


def _entries(source: str) -> Iterator[Entry]:
    if os.path.isdir(source):
        yield from _none(source, _folder(source))
    elif os.path.exists(source):
        yield from _file(source)
    elif glob.has_magic(source):
        found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        yield from _none(source, (entry for path in found for entry in _file(path)))
    else:
        raise BatchError(f"{source}: there is no such file or folder")


def _none(source: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, of which there has to be one."""
    count = 0
    for entry in entries:
        count += 1
        yield entry
    if not count:
        raise BatchError(f"{source}: no videos there ({' '.join(sorted(SUFFIXES))}, or .tar)")


def _folder(folder: str) -> Iterator[Entry]:
    for at, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES or suffix == ".tar":
                yield from _file(os.path.join(at, name))


def _file(path: str) -> Iterator[Entry]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".tar":
        return _tar(path)
    lines = READERS.get(suffix)
    if lines is None:
        return iter([Entry(os.path.abspath(path), path, path)])
    return _none(path, (_entry(path, where, line) for where, line in lines(path)))


def _entry(manifest: str, where: str, line: object) -> Entry:
    """One line of a manifest. A relative path is relative to the manifest's folder."""
    if not isinstance(line, Mapping):
        raise BatchError(f"{where}: a line has to be an object with {COLUMNS}, got {line!r}")
    video = line.get("video")
    if not isinstance(video, str) or not video.strip():
        raise BatchError(f"{where}: video must be a path, got {video!r}")
    video = video.strip()
    return Entry(
        os.path.abspath(os.path.join(os.path.dirname(manifest), video)),
        _id(where, line.get("id"), video),
        where,
        _prompts(where, line.get("prompt")),
        _frames(where, line.get("frames")),
    )


def _id(where: str, given: object, otherwise: str) -> str:
    if given is None or given == "":
        return otherwise
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise BatchError(f"{where}: id must be a text or a number, got {given!r}")
    return str(given)


def _prompts(where: str, given: object) -> tuple[str, ...]:
    if given is None or given == "":
        return ()
    prompts = (given,) if isinstance(given, str) else given
    good = isinstance(prompts, list | tuple) and all(isinstance(p, str) and p for p in prompts)
    if not good or not prompts:
        raise BatchError(f"{where}: prompt must be a text or a list of texts, got {given!r}")
    return tuple(prompts)  # type: ignore[arg-type]


def _frames(where: str, given: object) -> int | None:
    if given is None or given == "":
        return None
    try:
        frames = int(given)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        frames = 0
    if frames < 1 or isinstance(given, bool) or (isinstance(given, float) and given != frames):
        raise BatchError(f"{where}: frames must be an integer of at least 1, got {given!r}")
    return int(frames)


def _text(path: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: cannot be read as text: {error}") from None


def _lines(path: str) -> Iterator[tuple[str, object]]:
    for where, line in _text(path):
        yield where, {"video": line}


def _jsonl(path: str) -> Iterator[tuple[str, object]]:
    for where, line in _text(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise BatchError(f"{where}: no JSON: {error}") from None


def _csv(path: str) -> Iterator[tuple[str, object]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "video" not in (reader.fieldnames or ()):
                raise BatchError(
                    f"{path}: no column video among {', '.join(reader.fieldnames or ())}; the "
                    f"first line has to name the columns: {COLUMNS}"
                )
            for line in reader:
                yield f"{path}, line {reader.line_num}", line
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BatchError(f"{path}: cannot be read as csv: {error}") from None


def _parquet(path: str) -> Iterator[tuple[str, object]]:
    arrow, parquet = pyarrow(path)
    try:
        file = parquet.ParquetFile(path)
        if "video" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise BatchError(f"{path}: no column video among {names}; needed are {COLUMNS}")
        columns = [c for c in ("video", "id", "prompt", "frames") if c in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for line in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", line
    except (OSError, arrow.ArrowException) as error:
        raise BatchError(f"{path}: cannot be read as parquet: {error}") from None


READERS: dict[str, Callable[[str], Iterator[tuple[str, object]]]] = {
    ".txt": _lines,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _tar(path: str) -> Iterator[Entry]:
    """Videos of a tar in WebDataset's layout, where files of one sample share their key.

    A sample's ``.json`` may have an id, a prompt and frames. Nothing is unpacked here.
    """
    videos: dict[str, tuple[tarfile.TarInfo, Member]] = {}
    notes: dict[str, object] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, suffix = _key(member.name)
                if suffix in SUFFIXES:
                    if key in videos:
                        raise BatchError(f"{path}: the sample {key!r} has two videos")
                    videos[key] = (
                        member,
                        Member(os.path.abspath(path), member.offset_data, member.size),
                    )
                elif suffix == ".json":
                    notes[key] = _note(f"{path}/{member.name}", tar, member)
    except (OSError, tarfile.TarError) as error:
        raise BatchError(
            f"{path}: cannot be read as a tar (a compressed one has to be unpacked first): {error}"
        ) from None
    if not videos:
        raise BatchError(f"{path}: no videos in this tar")
    for key, (info, place) in videos.items():
        where, note = f"{path}/{info.name}", notes.get(key, {})
        if not isinstance(note, Mapping):
            raise BatchError(f"{path}/{key}.json has to be an object, got {note!r}")
        yield Entry(
            f"{place.tar}/{info.name}",
            _id(where, note.get("id"), where),
            where,
            _prompts(where, note.get("prompt")),
            _frames(where, note.get("frames")),
            place,
        )


def _key(name: str) -> tuple[str, str]:
    """WebDataset's key, all up to the first dot of the file's name, and the last suffix."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".", 1)[0]), Path(file).suffix.lower()


def _note(where: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> object:
    file = tar.extractfile(member)
    try:
        return json.loads(b"" if file is None else file.read())
    except ValueError as error:
        raise BatchError(f"{where}: no JSON: {error}") from None
