"""The base of all methods, and DyCoke itself.

A compressor is settings and formulas only. It holds no state: the same object serves any number of
models and videos, in turn or at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dycoke.core.engine import Engine, engine_of
from dycoke.core.method import NO_CONTEXT, Method, VideoContext, VisualTokens
from dycoke.core.records import Trace
from dycoke.core.selection import needs_refresh, top_mask
from dycoke.errors import check_budget, check_count, check_number, check_one_of, check_ratio
from dycoke.merging import budget_mask, merge_mask, merge_mean, video_budget
from dycoke.models import Layout
from dycoke.models.locate import Frames
from dycoke.report import Report
from dycoke.vision.scores import Vision


class Run:
    """A model under compression, and what happened so far."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def reports(self) -> list[Report]:
        """Reports of the last 100 generations, in the order in which they began."""
        return [record.report() for record in list(self._engine.records.listed)]

    @property
    def report(self) -> Report | None:
        """The report of the last generation; None before the first.

        A generation that runs inside another one, as contrastive decoding and ``guidance_scale``
        run a second prompt between the steps, is in `reports` alone.
        """
        record = self._engine.records.last
        return None if record is None else record.report()

    @property
    def vision(self) -> Vision | None:
        """What reads the vision encoder's attention; None where the method does without."""
        return self._engine.vision

    @property
    def trace(self) -> Trace | None:
        """What the last generation kept and attended to; None unless ``trace=True``."""
        record = self._engine.records.last
        return None if record is None else record.trace


class Compressor(Method):
    """Settings of a method: ``with Method(...)(model) as run: model.generate(...)``.

    What it may do, and when, is `Method`'s.
    """

    def __call__(
        self,
        model: Any,
        trace: bool = False,
        layout: Layout | None = None,
        frame_source: Frames | None = None,
    ) -> AbstractContextManager[Run]:
        """Compress what ``model`` generates inside a ``with`` block.

        Parameters
        ----------
        model : a transformers model of a known family.
        trace : keep masks, active sets and attention of the last generation in ``run.trace``.
        layout : finds the videos of a prompt, for a family that is not known here.
        frame_source : where the frames of a video are. None or "videos": in the processor's videos;
            images are never merged. "images": all images of a prompt are frames of one video, too.
            A list such as [8, 8]: a prompt's images are videos of so many images each, in order.

        Raises
        ------
        UnsupportedError
            Where this cannot work on this model, with the way out.
        ValueError
            For a ``frame_source`` that is none of these, or together with ``layout``.
        """
        return _applied(model, self, trace, layout, frame_source)

    def to_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; settings left out take their defaults."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(sorted(known))}"
            )
        return cls(**settings)


@contextmanager
def _applied(
    model: Any,
    compressor: Compressor,
    trace: bool,
    layout: Layout | None,
    frame_source: Frames | None,
) -> Iterator[Run]:
    run = apply(model, compressor, trace, layout, frame_source)
    try:
        yield run
    finally:
        run._engine.remove()


def apply(
    model: Any,
    compressor: Compressor,
    trace: bool = False,
    layout: Layout | None = None,
    frame_source: Frames | None = None,
) -> Run:
    """Compress what ``model`` generates from now on, until `remove`. See `Compressor.__call__`.

    Raises
    ------
    UnsupportedError
        Where this cannot work on this model, or it is compressed already.
    """
    engine = Engine(model, compressor, trace, layout, frame_source)
    engine.install()
    return Run(engine)


def remove(model: Any) -> None:
    """Restore a model that `apply` changed; does nothing to another one."""
    engine = engine_of(model)
    if engine is not None:
        engine.remove()


def check_positions(value: object) -> None:
    """Refuse anything but the two ways to number kept tokens."""
    check_one_of("positions", value, ("original", "compact"))


@dataclass(frozen=True)
class DyCoke(Compressor):
    """Dynamic compression of video tokens (https://arxiv.org/abs/2411.15024).

    Parameters
    ----------
    merge_ratio : float in [0, 1)
        Share of a non-anchor frame's tokens that is merged away before the LLM (K).
    prune_ratio : float in [0, 1)
        Share of the remaining visual tokens that a decode step does not attend to (P).
    prune_layer : int, at least 1
        Decoder layers with this index and above attend to the active set (L).
    window : int, at least 1
        Frames that share one anchor.
    refresh_threshold : float in [0, 1]
        The active set is chosen anew where the attention's cosine similarity to the step before
        is below this. 0 chooses once.
    merge : "keep" or "mean"
        What stands for a merged token: its counterpart as it is, or the mean of both.
    positions : "original" or "compact"
        Kept tokens keep their positions, or are numbered through (1-D RoPE only).
    token_budget : int, float or None
        How many visual tokens enter the LLM, instead of ``merge_ratio``: an int is tokens per
        sample, shared over its videos; a float in (0, 1] is the share that each video keeps, so
        that 1 is one token and 1.0 is all. May be below one frame in each window, see
        `dycoke.merging.budget_mask`.

    Notes
    -----
    Ratio 0 for both is the identity: generate runs untouched. So is a budget of 1.0 with
    ``prune_ratio=0``.
    """

    merge_ratio: float = 0.7
    prune_ratio: float = 0.7
    prune_layer: int = 3
    window: int = 4
    refresh_threshold: float = 0.9
    merge: Literal["keep", "mean"] = "keep"
    positions: Literal["original", "compact"] = "original"
    token_budget: int | float | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the only way to normalise a frozen dataclass
        set_field(self, "merge_ratio", check_ratio("merge_ratio", self.merge_ratio))
        set_field(self, "prune_ratio", check_ratio("prune_ratio", self.prune_ratio))
        set_field(self, "prune_layer", check_count("prune_layer", self.prune_layer))
        set_field(self, "window", check_count("window", self.window))
        threshold = check_number("refresh_threshold", self.refresh_threshold, "[0, 1]")
        if not 0 <= threshold <= 1:
            raise ValueError(f"refresh_threshold must be in [0, 1], got {threshold!r}")
        set_field(self, "refresh_threshold", threshold)
        check_one_of("merge", self.merge, ("keep", "mean"))
        check_positions(self.positions)
        if self.token_budget is not None:
            set_field(self, "token_budget", check_budget("token_budget", self.token_budget))
            if self.merge_ratio != type(self).merge_ratio:
                raise ValueError(
                    f"merge_ratio={self.merge_ratio} and token_budget={self.token_budget} both say "
                    "how many tokens stay; give one of them"
                )

    @property
    def idle(self) -> bool:
        budget = self.token_budget
        whole = (
            self.merge_ratio == 0 if budget is None else isinstance(budget, float) and budget == 1
        )
        return whole and self.prune_ratio == 0

    def keep_mask(self, features: Tensor, context: VideoContext = NO_CONTEXT) -> Tensor:
        """Which visual tokens of a video stay: (F, N, D) -> bool (F, N)."""
        if self.token_budget is None:
            return merge_mask(features, self.merge_ratio, self.window)
        tokens = features.shape[:2].numel()
        count = video_budget(self.token_budget, tokens, context.tokens, context.index)
        return budget_mask(features, count, self.window)

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep_mask(features, context)
        if self.merge == "mean":
            features = merge_mean(features, keep, self.window)
        return features, keep

    def select_tokens(self, scores: Tensor, visual: VisualTokens) -> tuple[Tensor, Tensor]:
        refreshed = needs_refresh(scores, visual.previous, self.refresh_threshold)
        refreshed = refreshed & visual.valid.any(1)
        chosen = top_mask(scores.masked_fill(~visual.valid, -torch.inf), visual.counts)
        return torch.where(refreshed[:, None], chosen, visual.active), refreshed
