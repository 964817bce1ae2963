"""A one-shot method before the LLM, and DyCoke's dynamic cache while decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from dycoke.compressor import Compressor, DyCoke
from dycoke.core.method import NO_CONTEXT, VideoContext, VisualTokens


@dataclass(frozen=True)
class Composed(Compressor):
    """Another method's tokens, of which each decode step attends to DyCoke's selection.

    Parameters
    ----------
    before : Compressor
        What leaves before the LLM, such as ``VisionZip(ratio=0.75)``.
    after : DyCoke
        ``prune_ratio``, ``prune_layer`` and ``refresh_threshold`` are taken from it; it merges
        nothing itself.

    Raises
    ------
    ValueError
        Where ``after`` merges, or ``before`` goes on inside the LLM or while decoding.
    """

    before: Compressor
    after: DyCoke = field(default_factory=lambda: DyCoke(merge_ratio=0))

    def __post_init__(self) -> None:
        name = type(self.before).__name__
        if self.after.merge_ratio:
            raise ValueError(
                f"{name} decides what enters the LLM, so merge_ratio={self.after.merge_ratio} "
                "would say nothing; use DyCoke(merge_ratio=0, ...)"
            )
        if self.before.prune_ratio or self.before.drop_layer(28) is not None:
            raise ValueError(
                f"{self.before} goes on inside the LLM or while decoding; compose methods that "
                "stop before it"
            )
        set_field = object.__setattr__
        set_field(self, "prune_ratio", self.after.prune_ratio)
        set_field(self, "prune_layer", self.after.prune_layer)
        set_field(self, "positions", self.before.positions)
        set_field(self, "needs_vision", self.before.needs_vision)

    @property
    def idle(self) -> bool:
        return self.before.idle and self.after.idle

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        return self.before.merge_tokens(features, context)

    def select_tokens(self, scores: Tensor, visual: VisualTokens) -> tuple[Tensor, Tensor]:
        return self.after.select_tokens(scores, visual)

    def to_dict(self) -> dict[str, Any]:
        before = {"method": type(self.before).__name__, **self.before.to_dict()}
        return {"before": before, "after": self.after.to_dict()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        before = dict(settings["before"])
        name = before.pop("method", None)
        known = {kind.__name__: kind for kind in _kinds(Compressor)}
        if name not in known:
            raise ValueError(f"unknown method {name!r}; there are {', '.join(sorted(known))}")
        return cls(known[name].from_dict(before), DyCoke.from_dict(settings["after"]))


def _kinds(base: Any) -> Iterator[type[Compressor]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)
