"""DyCoke: fast video large language models without training.

>>> from dycoke import DyCoke
>>> with DyCoke(merge_ratio=0.7, prune_ratio=0.7, prune_layer=3)(model) as run:
...     out = model.generate(**inputs, max_new_tokens=64)
>>> print(run.report)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dycoke.compressor import Compressor, Run, apply, remove
    from dycoke.core.steps import Step
    from dycoke.errors import UnsupportedError
    from dycoke.methods.dycoke import DyCoke
    from dycoke.models import VideoSpan
    from dycoke.report import Report
    from dycoke.vision.chunks import encode_in_chunks

__version__ = "0.1.0"

__all__ = [
    "Compressor",
    "DyCoke",
    "Report",
    "Run",
    "Step",
    "UnsupportedError",
    "VideoSpan",
    "__version__",
    "apply",
    "encode_in_chunks",
    "remove",
]

# Loaded on first use: `dycoke --help` should not wait for torch and transformers.
_HOMES = {
    "Compressor": "compressor",
    "DyCoke": "methods.dycoke",
    "Run": "compressor",
    "Step": "core.steps",
    "apply": "compressor",
    "encode_in_chunks": "vision.chunks",
    "remove": "compressor",
    "UnsupportedError": "errors",
    "VideoSpan": "models",
    "Report": "report",
}
_ROOMS = {
    "assistant": "assistant",
    "core": "core",
    "costs": "costs",
    "encoding": "vision.chunks",
    "merging": "merging",
    "methods": "methods",
    "models": "models",
    "nano": "nano",
    "video": "video",
    "vision": "vision",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dycoke.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"dycoke.{_ROOMS[name]}")
    raise AttributeError(f"module 'dycoke' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
