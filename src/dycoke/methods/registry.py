"""The table of the methods by name, and settings that carry the name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dycoke.compressor import Compressor
from dycoke.errors import check_retention


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes
    ----------
    name : what commands call the method.
    about : what it does, in a line.
    kind : its class; None for the full model.
    settings : settings that differ from the defaults of the class.
    paper, source : addresses of the paper and of its authors' code; "" where there is none.
    """

    name: str
    about: str
    kind: type[Compressor] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    source: str = ""

    def make(self, retention: float | None = None) -> Compressor | None:
        """The method in its default setting, or where it keeps a share of the visual tokens."""
        if retention is not None:
            retention = check_retention("retention", retention)
        if self.kind is None:
            return None
        if retention is None:
            return self.kind(**self.settings)
        return self.kind.at_retention(retention, **self.settings)

    @property
    def where(self) -> list[str]:
        """Where it works: "before" the LLM (by "vision" scores), "inside" it, "decoding"."""
        method = self.make()
        if method is None:
            return []
        works = {
            "before": type(method).merge_tokens is not Compressor.merge_tokens,
            "vision": method.needs_vision,
            "inside": method.drops,
            "decoding": method.prune_ratio > 0,
        }
        return [name for name, true in works.items() if true]


METHODS: dict[str, Entry] = {}
"""The one table of the methods; `register` adds to it."""


def register(entry: Entry) -> None:
    """Make a method known by its name.

    Raises
    ------
    ValueError
        For a name that is taken, or that has a "+" inside, which composes two methods.
    """
    if entry.name in METHODS:
        raise ValueError(f"there is a method {entry.name!r} already; choose another name")
    if not entry.name or "+" in entry.name[:-1]:
        raise ValueError(f"{entry.name!r} is no name for a method: it is empty or has a '+' inside")
    METHODS[entry.name] = entry


def to_dict(method: Compressor) -> dict[str, Any]:
    """The settings of a method together with its name, ready for JSON.

    The name is that of the first entry of its class, and that of the class where there is none.
    """
    kind = type(method)
    names = (entry.name for entry in METHODS.values() if entry.kind is kind)
    return {"method": next(names, kind.__name__), **method.to_dict()}


def from_dict(settings: Mapping[str, Any]) -> Compressor:
    """The inverse of `to_dict`; settings left out are those of the entry.

    Raises
    ------
    ValueError
        For a name that is not in the table.
    """
    own = dict(settings)
    name = own.pop("method", None)
    entry = METHODS.get(name) if isinstance(name, str) else None
    if entry is None or entry.kind is None:
        known = ", ".join(entry.name for entry in METHODS.values() if entry.kind is not None)
        raise ValueError(f"unknown method {name!r}; there are {known}")
    return entry.kind.from_dict({**entry.settings, **own})
