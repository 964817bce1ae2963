"""The running counts of one generation, read from what was really held, and the trace."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dycoke.cache import DycokeCache
from dycoke.models import VideoSpan
from dycoke.report import Report, SampleReport, VideoReport, share
from dycoke.rows import Visual

IDLE = "the settings remove nothing: ratios of 0, or a token_budget of 1.0"


@dataclass(eq=False)
class SampleTrace:
    """What one sample kept and attended to, on the CPU.

    Attributes
    ----------
    keep : list of Tensor, bool, (F, N): per video, the tokens that merging left.
    active : list of Tensor, bool, (Nv,): per decode step, which of the sample's kept visual
        tokens (raster order, all videos) the pruned layers attended to.
    attention : list of Tensor, (Nv,): per decode step, the newest token's attention to them in
        the scoring layer, a mean over heads.
    """

    keep: list[Tensor]
    active: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)

    def copy(self) -> SampleTrace:
        return SampleTrace(list(self.keep), list(self.active), list(self.attention))


@dataclass(eq=False)
class Trace:
    """Everything that ``trace=True`` keeps of a generation: one entry per row of the batch."""

    samples: list[SampleTrace]

    def add(self, visual: Visual, scores: Tensor) -> None:
        rows = zip(self.samples, visual.valid, visual.active, scores, strict=True)
        for sample, valid, active, score in rows:
            sample.active.append(active[valid].cpu())
            sample.attention.append(score[valid].detach().cpu())


@dataclass(eq=False)
class Tally:
    """Counts of one generation, from which `report` is made.

    ``videos`` lists the videos of each row of the batch. ``visual`` is the state that the cache
    holds (None where nothing was touched). ``length`` is the input length of the last forward.
    ``below`` is the share of layers below the one where tokens were dropped, if any were, and
    ``method`` the name of the compressor's class.
    """

    settings: dict[str, Any]
    videos: list[list[VideoReport]]
    visual: Visual | None = None
    reason: str | None = None
    trace: Trace | None = None
    decode_steps: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    length: int = 0
    cache: weakref.ref[Any] | None = None
    below: float | None = None
    method: str = "DyCoke"
    frozen: Report | None = None

    def after_forward(self, cache: Any, length: int, decode: bool) -> None:
        self.decode_steps += decode
        self.length = length
        self.cache = None if cache is None else weakref.ref(cache)
        self.kv_bytes, self.kv_bytes_full = kv_bytes(cache), kv_bytes_full(cache)

    def goes_on(self, cache: Any, length: int, several: bool) -> bool:
        """Whether a forward that is not ours to compress belongs to this generation.

        A cache is known again; without one, generate feeds one token more each time.
        """
        if cache is None:
            return self.cache is None and length == self.length + 1
        return self.cache is not None and self.cache() is cache and (length == 1 or several)

    def next_turn(self) -> Tally:
        """The tally of a follow-up turn on the same cache; this one is closed."""
        self.freeze()
        assert self.visual is not None
        self.visual.refreshes = torch.zeros_like(self.visual.refreshes)
        self.visual.recalled = torch.zeros_like(self.visual.recalled)
        trace = self.trace and Trace([SampleTrace(s.keep) for s in self.trace.samples])
        turn = Tally(self.settings, self.videos, self.visual, self.reason, trace)
        turn.below, turn.method = self.below, self.method
        return turn

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Follow beams and copies of the cache's rows."""
        order = pick(torch.arange(len(self.videos))).tolist()
        self.videos = [self.videos[i] for i in order]
        if self.trace is not None:
            self.trace.samples = [self.trace.samples[i].copy() for i in order]

    def freeze(self) -> None:
        """Make the report now and let go of the tensors."""
        self.frozen = self.report()
        if self.cache is None or self.cache() is None:
            self.visual = self.trace = None

    def report(self) -> Report:
        if self.frozen is not None:
            return self.frozen
        columns: list[list[int]]
        if self.visual is None:
            tokens = [sum(v.visual_tokens for v in videos) for videos in self.videos]
            columns = [tokens, [0] * len(tokens), [0] * len(tokens)]
        else:
            state = self.visual
            columns = torch.stack([state.active.sum(1), state.refreshes, state.recalled]).tolist()
        samples = tuple(
            _sample(videos, active, refreshes, recalled, self.below)
            for videos, active, refreshes, recalled in zip(self.videos, *columns, strict=True)
        )
        visual = sum(s.visual_tokens for s in samples)
        kept = sum(s.kept_tokens for s in samples)
        active = sum(s.active_tokens for s in samples)
        reason = self.reason
        if reason is None and active == visual:
            reason = (
                "nothing to merge or prune: too few frames, ratios too small for one token, or a "
                "token_budget of all"
            )
        return Report(
            engaged=reason is None,
            reason=reason,
            settings=self.settings,
            kv_bytes=self.kv_bytes,
            kv_bytes_full=self.kv_bytes_full,
            decode_steps=self.decode_steps,
            retention=share(_mean_held(kept, active, self.below), visual),
            final_retention=share(active, visual),
            samples=samples,
            below=1.0 if self.below is None else self.below,
            method=self.method,
        )


def _sample(
    videos: Sequence[VideoReport], active: int, refreshes: int, recalled: int, below: float | None
) -> SampleReport:
    visual = sum(v.visual_tokens for v in videos)
    kept = sum(v.kept_tokens for v in videos)
    return SampleReport(
        videos=tuple(videos),
        frames=sum(v.frames for v in videos),
        visual_tokens=visual,
        kept_tokens=kept,
        active_tokens=active,
        retention=share(_mean_held(kept, active, below), visual),
        final_retention=share(active, visual),
        refreshes=refreshes,
        recalled_tokens=recalled,
    )


def _mean_held(kept: int, active: int, below: float | None) -> float:
    """Tokens that a layer holds; the mean over layers where tokens were dropped between them."""
    return kept if below is None else below * kept + (1 - below) * active


def videos_by_sample(
    spans: Sequence[VideoSpan], kept: Sequence[int], batch: int
) -> list[list[VideoReport]]:
    """The videos of each row of the batch; ``kept`` has one count per span."""
    rows: list[list[VideoReport]] = [[] for _ in range(batch)]
    for span, count in zip(spans, kept, strict=True):
        frames, tokens = span.positions.shape
        rows[span.sample].append(VideoReport(frames, tokens, frames * tokens, count, span.source))
    return rows


class Records:
    """The last 100 generations of one engine."""

    def __init__(self, method: Any, below: float | None, trace: bool) -> None:
        self.method, self.below, self.trace = method, below, trace
        self.tallies: deque[Tally] = deque(maxlen=100)

    def start(
        self,
        videos: Sequence[VideoSpan],
        kept: Sequence[Tensor] | None,
        visual: Visual | None,
        batch: int,
        reason: str | None,
    ) -> Tally:
        """A new generation; ``kept`` and ``visual`` are None where it stays untouched."""
        counts = [span.positions.numel() for span in videos]
        if kept is not None:
            counts = torch.stack([mask.sum() for mask in kept]).tolist()
        tally = Tally(
            self.method.to_dict(), videos_by_sample(videos, counts, batch), visual, reason
        )
        tally.below = None if kept is None else self.below
        if self.trace and kept is not None:
            tally.trace = Trace([SampleTrace(keep=[]) for _ in range(batch)])
            for span, mask in zip(videos, kept, strict=True):
                tally.trace.samples[span.sample].keep.append(mask.cpu())
        return self.keep(tally)

    def keep(self, tally: Tally) -> Tally:
        """Add a generation, unless it is known."""
        if tally in self.tallies:
            return tally
        for other in self.tallies:
            if other.frozen is None and (other.cache is None or other.cache() is None):
                other.freeze()
        tally.method = type(self.method).__name__
        self.tallies.append(tally)
        return tally

    def going_on(self, cache: Any, length: int, several: bool) -> Tally | None:
        """The generation that a forward which is not ours to compress belongs to."""
        # Without a cache only the newest can be told from chance.
        known = self.tallies if cache is not None else list(self.tallies)[-1:]
        return next((t for t in reversed(known) if t.goes_on(cache, length, several)), None)


def _held(layer: Any) -> list[Tensor]:
    """The tensors of a cache layer: keys and values, or states of linear attention."""
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        states += getattr(layer, name, {}).values()
    return [state for state in states if isinstance(state, Tensor)]


def kv_bytes(cache: Any) -> int:
    """Bytes of the unique storages that a cache holds."""
    storages = {}
    for layer in getattr(cache, "layers", ()):
        for tensor in _held(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def kv_bytes_full(cache: Any) -> int:
    """Bytes that a stock `DynamicCache` would hold now for the same tokens, uncompressed."""
    if not isinstance(cache, DycokeCache):
        return kv_bytes(cache)
    total = 0
    for layer in cache.layers:
        for tensor in _held(layer):
            rows = 1
            if isinstance(layer, DynamicLayer):
                # A layer with a window holds its last tokens and, until the next, the new one.
                window = getattr(layer, "sliding_window", None) or cache.generation.length
                rows = min(cache.generation.length, window)
                tensor = tensor[:, :, :1]
            total += rows * tensor.numel() * tensor.element_size()
    return total
