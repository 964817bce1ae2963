"""What to measure, checked before anything takes minutes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dycoke import methods, nano
from dycoke.assistant import best_device
from dycoke.bench.arch import Arch
from dycoke.compressor import Compressor
from dycoke.nano import stories
from dycoke.precision import NumberFormat, choose_format
from dycoke.video import MAX_PIXELS

# Settings in the names of lines, which must leave room for a table's columns.
SHORT = {"skip_ratio": "skip", "skip_layer": "at", "echo_exact": "exact"}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    methods : names from `dycoke.methods`, in the order of the turns.
    arch : shapes to build with random weights; None for a checkpoint.
    model : directory or hub id of a checkpoint; None for the embedded model.
    video : a file; None for a rendered story.
    frames : frames to sample from it.
    stream, max_pixels : as in `dycoke.video.read`.
    new_tokens : tokens to generate, never fewer.
    repeat : measured turns; a turn runs every method once.
    batch : copies of the prompt in one batch.
    retention : share of the visual tokens that stays, in (0, 1]; None for each method's default.
    device : such as "cuda:1"; None for the best there is.
    attention : such as "flash_attention_2"; None for transformers' choice.
    settings : of each method that has them all a second line is measured, with these settings.
    dtype : name of the number format; None for `dycoke.precision.choose_format`.

    Raises
    ------
    ValueError
        For an unknown method, device or number format, with those there are; for a count below 1;
        for settings that no method has, or that it refuses.
    """

    methods: tuple[str, ...]
    arch: Arch | None = None
    model: str | None = None
    video: str | None = None
    frames: int = 32
    new_tokens: int = 64
    repeat: int = 3
    batch: int = 1
    retention: float | None = None
    device: str | None = None
    attention: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    stream: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("frames", "new_tokens", "repeat", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.methods:
            raise ValueError(f"no method is named; there are {', '.join(methods.METHODS)}")
        if len(self.lines()) == len(set(self.methods)) and self.settings:
            given = ", ".join(self.settings)
            raise ValueError(f"{given}: none of {', '.join(self.methods)} has such settings")
        if self.device is not None and self.device not in (known := devices()):
            raise ValueError(f"unknown device {self.device!r}; there are {', '.join(known)}")
        if self.dtype is not None:
            choose_format("cpu", self.dtype)

    def lines(self) -> dict[str, Compressor | None]:
        """What is measured, by name: each method, and behind it the same with `settings`."""
        lines: dict[str, Compressor | None] = {}
        for name in self.methods:
            lines[name] = method = methods.create(name, retention=self.retention)
            if (
                method is not None
                and self.settings
                and self.settings.keys() <= method.setting_names()
            ):
                words = (f"{SHORT.get(key, key)} {value:g}" for key, value in self.settings.items())
                lines[" ".join([name, *words])] = replace(method, **self.settings)
        return lines

    @property
    def chosen_device(self) -> str:
        return self.device or best_device()

    @property
    def number_format(self) -> NumberFormat:
        embedded = self.arch is None and (self.model is None or nano.is_at(self.model))
        return choose_format(self.chosen_device, self.dtype, embedded)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        arch = plan["arch"] and Arch(**plan["arch"])
        return cls(**{**plan, "arch": arch, "methods": tuple(plan["methods"])})


def devices() -> list[str]:
    """Names of the devices of this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return names + ["mps"] * torch.backends.mps.is_available()


@contextmanager
def video_file(plan: Plan) -> Iterator[str]:
    """The plan's video as a file: its own, or a story rendered for as long as this lasts."""
    if plan.video is not None:
        yield plan.video
        return
    with tempfile.TemporaryDirectory() as folder:
        story = stories.make("seen", 0, frames=max(stories.FRAMES, plan.frames))
        yield str(stories.write(story, Path(folder) / "story.mp4"))
