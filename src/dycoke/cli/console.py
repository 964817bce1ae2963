"""Where commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class BadInput(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


def say(message: str, code: int) -> int:
    """One line on stderr, whatever a library's message looks like; returns ``code``."""
    err.print(f"dycoke: {' '.join(message.split())}", soft_wrap=True, markup=False)
    return code


def progress_bars() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, Left(), console=err)
