"""A one-shot method before the LLM, and DyCoke's dynamic cache while decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from dycoke.compressor import Compressor
from dycoke.core.method import NO_CONTEXT, VideoContext, VisualTokens
from dycoke.methods.dycoke import DyCoke
from dycoke.methods.registry import from_dict, to_dict


@dataclass(frozen=True)
class Composed(Compressor):
    """Another method's tokens, of which each decode step attends to DyCoke's selection.

    Parameters
    ----------
    before : Compressor
        What leaves before the LLM, such as ``VisionZip(ratio=0.75)``.
    after : DyCoke
        ``prune_ratio``, ``prune_layer``, ``score_layer`` and ``refresh_threshold`` are taken from
        it; it merges nothing itself, so that echoes are those of ``before``.

    Raises
    ------
    TypeError
        Where ``after`` is no DyCoke.
    ValueError
        Where ``after`` merges, or ``before`` goes on inside the LLM or while decoding.
    """

    before: Compressor
    after: DyCoke = field(default_factory=lambda: DyCoke(merge_ratio=0))

    def __post_init__(self) -> None:
        if not isinstance(self.after, DyCoke):
            raise TypeError(f"after must be a DyCoke, got {self.after!r}")
        name = type(self.before).__name__
        if self.after.merge_ratio:
            raise ValueError(
                f"{name} decides what enters the LLM, so merge_ratio={self.after.merge_ratio} "
                "would say nothing; use DyCoke(merge_ratio=0, ...)"
            )
        if self.before.prune_ratio or self.before.drops:
            raise ValueError(
                f"{self.before} goes on inside the LLM or while decoding; compose methods that "
                "stop before it"
            )
        if (self.echo, self.echo_exact) not in ((0, 0), (self.before.echo, self.before.echo_exact)):
            raise ValueError(
                f"echo={self.echo:g} belongs to what merges; give it to {name}, which is `before`"
            )
        for part, names in (
            (self.before, ("positions", "needs_vision", "echo", "echo_exact")),
            (self.after, ("prune_ratio", "prune_layer", "score_layer")),
        ):
            for name in names:
                object.__setattr__(self, name, getattr(part, name))

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
        return {"before": to_dict(self.before), "after": to_dict(self.after)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        return super().from_dict({name: from_dict(part) for name, part in settings.items()})
