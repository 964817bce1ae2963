"""The ``dycoke`` command: a file per command, and what several of them share."""

from dycoke.cli.main import main

__all__ = ["main"]
