"""What of DyCoke one decode step runs: functions, files and lines, docstrings included.

    python benchmarks/decode_walk.py

One step of the embedded model, with a new selection, is traced. Also counts the lines of the
core's modules. `docs/design.md` quotes both.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import dycoke
from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.nano import stories
from dycoke.video import Video

SOURCE = Path(dycoke.__file__).parent
CORE = ("core/engine.py", "core/cache.py", "core/selection.py", "attention.py")


class Trace(StoppingCriteria):  # type: ignore[misc]
    """Traces the library's functions in the step after the third token."""

    def __init__(self) -> None:
        self.seen: dict[str, CodeType] = {}
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        sys.setprofile(self._note if self.steps == 3 else None)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)):
            self.seen[f"{code.co_filename}:{code.co_firstlineno}"] = code


def walk() -> dict[str, list[tuple[str, int]]]:
    """Per file, the functions that one decode step runs, and their lines."""
    assistant = Assistant.load()
    story = stories.make("seen", 3)
    frames = stories.render(story)
    times = tuple(float(i) for i in range(len(frames)))
    clip = Video(frames, tuple(range(len(frames))), times, len(frames), 1.0, "a story")
    inputs = assistant.prepare(clip, stories.DESCRIBE[0])
    trace = Trace()
    with DyCoke(refresh_threshold=1.0)(assistant.model):
        assistant.model.generate(
            **inputs, max_new_tokens=6, stopping_criteria=StoppingCriteriaList([trace])
        )
    files: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for code in trace.seen.values():
        file = Path(code.co_filename).relative_to(SOURCE)
        files[str(file)].append((code.co_qualname, len(inspect.getsourcelines(code)[0])))
    return files


def main() -> None:
    files = walk()
    for file, functions in files.items():
        lines = sum(count for _, count in functions)
        print(f"{file:24} {lines:4} lines  {', '.join(name for name, _ in functions)}")
    counts = [count for functions in files.values() for _, count in functions]
    print(f"one decode step: {len(counts)} functions, {len(files)} files, {sum(counts)} lines")
    lengths = {name: len((SOURCE / name).read_text().splitlines()) for name in CORE}
    print(", ".join(f"{name} {length}" for name, length in lengths.items()), end="")
    print(f": {sum(lengths.values())} lines")


if __name__ == "__main__":
    main()
