"""What all one-shot methods share: what leaves, leaves for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dycoke.compressor import Compressor, check_positions
from dycoke.errors import check_ratio


@dataclass(frozen=True)
class OneShot(Compressor):
    """A method that removes visual tokens once, at prefill.

    Parameters
    ----------
    ratio : float in [0, 1)
        Share of the visual tokens that is removed; 0 is the identity.
    positions : "original" or "compact"
        Kept tokens keep their positions, or are numbered through (1-D RoPE only).
    """

    ratio: float = 0.75
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("ratio", self.ratio))
        check_positions(self.positions)

    @property
    def idle(self) -> bool:
        return self.ratio == 0
