"""What methods share that remove tokens twice: before the LLM, and once more inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dycoke.core.layers import scaled
from dycoke.methods.base import OneShot


@dataclass(frozen=True)
class TwoStage(OneShot):
    """A method whose ``ratio`` holds for the mean over the layers.

    Before the LLM it keeps `outer`; what it keeps inside follows from the depth, so that layers
    hold a share of ``1 - ratio`` on average. At the published depth of 28 layers that is the
    published share, `INNER`, wherever `outer` is below 1.

    Parameters
    ----------
    ratio, positions : see `OneShot`.
    inner : bool
        Whether tokens leave inside the LLM, too. Without, the first stage removes all of ``ratio``.
    """

    LAYER: ClassVar[int]  # the first one, of 28, that goes on with fewer tokens
    INNER: ClassVar[float]  # the share of the tokens that it goes on with

    inner: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, bool):
            raise TypeError(f"inner must be True or False, got {self.inner!r}")

    @property
    def outer(self) -> float:
        """Share of the visual tokens that enters the LLM."""
        if not self.inner:
            return 1 - self.ratio
        below = self.LAYER / 28
        return min(1.0, (1 - self.ratio) / (below + (1 - below) * self.INNER))

    def drop_layer(self, layers: int) -> int | None:
        layer = scaled(self.LAYER, layers)
        return layer if self.inner and layer < layers else None

    def inner_count(self, tokens: int, below: float) -> int:
        """How many of ``tokens`` go on where a share ``below`` of the layers holds them all."""
        share = ((1 - self.ratio) / self.outer - below) / (1 - below)
        return min(tokens, max(1, round(share * tokens)))
