"""The embedded model: a very small LLaVA-OneVision that knows one little world of moving shapes.

It exists so that every part of the library can be run, tested and compared by accuracy with
nothing fetched. Same classes, same processor and same code path as the large models.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["is_at", "is_trained", "path"]

_TRAINED = Path(__file__).parent / "model"

# Raised whenever `build` would write something else, so that an old cache is not taken for it.
_LAYOUT = 1


def is_trained() -> bool:
    """Whether the package carries the trained weights."""
    return (_TRAINED / "model.safetensors").is_file()


def is_at(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is the embedded model."""
    return os.path.isdir(source) and os.path.samefile(source, path())


def path() -> Path:
    """Folder of the nano model, ready for ``from_pretrained``.

    Returns
    -------
    Path
        The trained model inside the package. Where there is none, a model with seeded random
        weights, built once into the user's cache folder (``XDG_CACHE_HOME`` is respected).
    """
    if is_trained():
        return _TRAINED
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dycoke"
    folder = cache / f"nano-random-{_LAYOUT}"
    if not folder.is_dir():
        from dycoke.nano.build import build

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = build(Path(scratch) / "nano")
            try:
                built.rename(folder)  # atomic: others see the whole folder or none
            except OSError:  # another process was first; its folder holds the same bytes
                if not folder.is_dir():
                    raise
    return folder
