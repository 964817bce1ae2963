"""DyCoke: fast video large language models without training.

>>> from dycoke import DyCoke
>>> with DyCoke(merge_ratio=0.7, prune_ratio=0.7, prune_layer=3)(model) as run:
...     out = model.generate(**inputs, max_new_tokens=64)
>>> print(run.report)
"""

from dycoke.compressor import Compressor, DyCoke, Run, apply, remove
from dycoke.errors import UnsupportedError
from dycoke.models import VideoSpan
from dycoke.report import Report

__version__ = "0.1.0"

__all__ = [
    "Compressor",
    "DyCoke",
    "Report",
    "Run",
    "UnsupportedError",
    "VideoSpan",
    "__version__",
    "apply",
    "remove",
]
