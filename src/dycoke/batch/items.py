"""A video with its questions: what a run consists of, and what a worker is given."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


class BatchError(ValueError):
    """Something about a run that its user can mend; one line that says how."""


def pyarrow(file: object) -> tuple[Any, Any]:
    """The modules that read and write parquet.

    Raises
    ------
    BatchError
        Where they are not installed; it names ``file``.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BatchError(
            f"{file}: parquet needs pyarrow: pip install 'dycoke[batch]' brings it"
        ) from None


@dataclass(frozen=True)
class Question:
    """A question, which becomes one row.

    Attributes
    ----------
    id : the row's; the questions of one id differ in their prompts.
    prompt : text of the user's turn.
    """

    id: str
    prompt: str


@dataclass(frozen=True)
class Member:
    """Where a video lies inside a tar file, in bytes."""

    tar: str
    offset: int
    size: int


@dataclass(frozen=True)
class Item:
    """One video and all questions about it, which share its prefill.

    Attributes
    ----------
    video : an absolute path; of a tar's member ``shard.tar/name.mp4``.
    frames : frames to sample.
    questions : at least one.
    member : where it is inside a tar; None for a file of its own.
    """

    video: str
    frames: int
    questions: tuple[Question, ...]
    member: Member | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, made: Mapping[str, Any]) -> Item:
        """The inverse of `to_dict`."""
        member = made["member"]
        return cls(
            made["video"],
            made["frames"],
            tuple(Question(**question) for question in made["questions"]),
            None if member is None else Member(**member),
        )


@dataclass(frozen=True)
class Entry:
    """One line of a manifest, or one file.

    Attributes
    ----------
    video : an absolute path.
    id : of its rows.
    prompts : empty where the run's own are asked.
    frames : None for the run's number.
    where : what an error calls it.
    """

    video: str
    id: str
    where: str
    prompts: tuple[str, ...] = ()
    frames: int | None = None
    member: Member | None = None


def gather(entries: Iterable[Entry], prompts: Sequence[str], frames: int) -> list[Item]:
    """Entries of one video (in one number of frames) become one item, in the order of the first.

    Parameters
    ----------
    prompts, frames : for the entries that have none of their own.

    Raises
    ------
    BatchError
        Where a question is there twice, or one id names two videos.
    """
    groups: dict[tuple[str, int], list[Question]] = {}
    members: dict[str, Member | None] = {}
    homes: dict[str, tuple[str, str]] = {}
    seen: dict[Question, str] = {}
    for entry in entries:
        first, where = homes.setdefault(entry.id, (entry.video, entry.where))
        if first != entry.video:
            raise BatchError(
                f"the id {entry.id!r} names two videos, {first} ({where}) and {entry.video} "
                f"({entry.where}); give each its own"
            )
        group = groups.setdefault((entry.video, entry.frames or frames), [])
        members[entry.video] = entry.member
        for prompt in entry.prompts or prompts:
            question = Question(entry.id, prompt)
            if question in seen:
                raise BatchError(
                    f"the id {entry.id!r} has the prompt {prompt!r} twice, by {seen[question]} and "
                    f"by {entry.where}; drop one, or give it another id"
                )
            seen[question] = entry.where
            group.append(question)
    return [
        Item(video, count, tuple(questions), members[video])
        for (video, count), questions in groups.items()
    ]


def digest(items: Iterable[Item]) -> str:
    """What tells these inputs from others: videos, frames, ids and prompts, and their order."""
    whole = hashlib.blake2b(digest_size=16)
    for item in items:
        whole.update(json.dumps(item.to_dict(), sort_keys=True).encode() + b"\n")
    return whole.hexdigest()
