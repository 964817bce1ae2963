"""The running counts of generations, read from what was really held."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dycoke.compat import cache_of
from dycoke.core.layers import LayerPlan
from dycoke.core.method import Method, VideoContext
from dycoke.core.steps import Trace, VideoMasks
from dycoke.models import VideoSpan
from dycoke.report import Report, SampleReport, VideoReport, share

IDLE = "the settings remove nothing: ratios of 0, or a token_budget of 1.0"


@dataclass(eq=False)
class Record:
    """Counts of one generation, from which `report` is made.

    Attributes
    ----------
    method, settings : the compressor's class name and settings.
    videos : the videos of each row of the batch.
    reason : why nothing was compressed, where nothing was.
    masks : of each row's videos, what merging left; empty where nothing was touched.
    trace : what `Step`s said, where that is kept.
    plan : what its layers do; None where nothing was touched.
    echo_layers, exact_layers : layers that saw echoes while the prompt was read, counted as they
        did, and those of them that were exact.
    attended : Tensor, long, (B,): visual tokens that a decode step attends to; None where nothing
        was touched.
    refreshes, recalled : Tensor, long, (B,), without the first selection; 0 before that.
    length : logical tokens in the cache; without one, the input length of the last forward.
    newest : tokens of the last forward, those of a whole prompt included.
    kv_bytes : bytes of the storages that the cache held after the last forward.
    rows : bytes of one row, and the window, or None, of each cache layer that has rows.
    states : bytes that the other layers hold, however long the text.
    number : how many generations of its engine began before it.
    call : the call of generate in which it began, 0 outside of any.
    secondary : whether it ran inside another generation, as contrastive decoding does.
    """

    method: str
    settings: dict[str, Any]
    videos: list[list[VideoReport]]
    reason: str | None = None
    masks: list[list[VideoMasks]] = field(default_factory=list)
    trace: Trace | None = None
    plan: LayerPlan | None = None
    echo_layers: int = 0
    exact_layers: int = 0
    attended: Tensor | None = None
    refreshes: Tensor | int = 0
    recalled: Tensor | int = 0
    decode_steps: int = 0
    length: int = 0
    newest: int = 0
    kv_bytes: int = 0
    rows: list[tuple[int, int | None]] = field(default_factory=list)
    states: int = 0
    number: int = 0
    call: int = 0
    secondary: bool = False

    @property
    def below(self) -> float:
        """Share of the layers that hold all rows."""
        return 1.0 if self.plan is None else self.plan.below

    def measure(self, cache: Any) -> None:
        """Read from the cache what its layers hold."""
        self.kv_bytes, self.rows, self.states = held_bytes(cache), [], 0
        for layer in getattr(cache, "layers", ()):
            held = _tensors(layer)
            if isinstance(layer, DynamicLayer):
                row = sum(t[:, :, :1].numel() * t.element_size() for t in held)
                self.rows.append((row, getattr(layer, "sliding_window", None)))
            else:
                self.states += sum(t.numel() * t.element_size() for t in held)

    def next_turn(self, trace: bool) -> Record:
        """The record of a follow-up turn on the same cache; ``trace`` where one is wanted."""
        kept = Trace() if trace else None
        return replace(self, trace=kept, refreshes=0, recalled=0, decode_steps=0, secondary=False)

    def map_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Follow beams and copies of the cache's rows."""
        order = pick(torch.arange(len(self.videos))).tolist()
        self.videos = [self.videos[i] for i in order]
        self.masks = [self.masks[i] for i in order]
        for name in ("attended", "refreshes", "recalled"):
            if isinstance(counts := getattr(self, name), Tensor):
                setattr(self, name, pick(counts))
        if self.trace is not None and self.trace.samples:
            self.trace.samples = [self.trace.samples[i].copy() for i in order]

    def report(self) -> Report:
        counts = (self.attended, self.refreshes, self.recalled)
        columns = [c.tolist() if isinstance(c, Tensor) else [0] * len(self.videos) for c in counts]
        if self.attended is None:
            columns[0] = [sum(v.visual_tokens for v in videos) for videos in self.videos]
        samples = tuple(
            _sample(videos, attended, refreshes, recalled, self.below)
            for videos, attended, refreshes, recalled in zip(self.videos, *columns, strict=True)
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
        full = self.kv_bytes
        if self.attended is not None:
            # A layer with a window keeps its last tokens, the window less one, and until the next
            # forward all that came with the last one.
            length, older = self.length, self.length - self.newest
            full = self.states + sum(
                row * (length if w is None else min(older, w - 1) + self.newest)
                for row, w in self.rows
            )
        plan = self.plan if self.plan is not None and self.plan.kind == "select" else None
        return Report(
            engaged=reason is None,
            reason=reason,
            settings=self.settings,
            kv_bytes=self.kv_bytes,
            kv_bytes_full=full,
            decode_steps=self.decode_steps,
            retention=share(_mean_held(kept, active, self.below), visual),
            final_retention=share(active, visual),
            samples=samples,
            below=self.below,
            method=self.method,
            echo_layers=self.echo_layers,
            exact_layers=self.exact_layers,
            score_layer=None if plan is None else plan.scoring,
            scores_late=plan is not None and plan.late,
        )


def _sample(
    videos: Sequence[VideoReport], active: int, refreshes: int, recalled: int, below: float
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


def _mean_held(kept: int, active: int, below: float) -> float:
    """Tokens that a layer holds; the mean over layers where tokens were dropped between them."""
    return kept if below == 1 else below * kept + (1 - below) * active


def videos_by_sample(
    spans: Sequence[VideoSpan], kept: Sequence[int], batch: int, encoded: Sequence[int] = ()
) -> list[list[VideoReport]]:
    """The videos of each row of the batch; ``kept`` and ``encoded`` have one count per span."""
    rows: list[list[VideoReport]] = [[] for _ in range(batch)]
    computed = encoded or [span.positions.numel() for span in spans]
    for span, count, made in zip(spans, kept, computed, strict=True):
        frames, tokens = span.positions.shape
        report = VideoReport(frames, tokens, frames * tokens, count, made, span.source)
        rows[span.sample].append(report)
    return rows


class _Local(threading.local):
    """A thread's own: the calls of generate in progress, and its newest generation."""

    depth: int = 0
    call: int = 0
    first: Record | None = None
    newest: Record | None = None


class Records:
    """The last 100 generations of one engine.

    A generation that starts inside a call of generate after its first one, or between the steps of
    another one, is secondary: contrastive decoding runs the model on a second prompt so. It is
    listed, but it is not what `last` means.
    """

    def __init__(self, method: Method, plan: LayerPlan, trace: bool) -> None:
        self.method, self.plan, self.trace = method, plan, trace
        self.listed: deque[Record] = deque(maxlen=100)
        self._by_cache: weakref.WeakKeyDictionary[Any, Record] = weakref.WeakKeyDictionary()
        self._local, self._numbers = _Local(), itertools.count()
        self._calls = itertools.count(1)
        self.forwards = 0  # of the decoder that is hooked
        self.current: Record | None = None  # where the last of them was counted

    @property
    def last(self) -> Record | None:
        """The newest generation that is not part of another one."""
        return next((r for r in reversed(self.listed) if not r.secondary), None)

    def start(
        self,
        cache: Any,
        videos: Sequence[VideoSpan],
        kept: Sequence[Tensor] | None,
        batch: int,
        reason: str | None,
        contexts: Sequence[VideoContext] = (),
    ) -> Record:
        """A new generation on ``cache``; ``kept`` is None where it stays untouched.

        ``contexts`` know what the vision encoder computed of each video.
        """
        counts = [span.positions.numel() for span in videos]
        if kept is not None:
            counts = torch.stack([mask.sum() for mask in kept]).tolist()
        encoded = [context.encoded for context in contexts] or [None] * len(videos)
        made = [mask for mask in encoded if mask is not None]
        computed = torch.stack([mask.sum() for mask in made]).tolist() if made else ()
        by_sample = videos_by_sample(videos, counts, batch, computed)
        record = Record(type(self.method).__name__, self.method.to_dict(), by_sample, reason)
        if kept is not None:
            record.plan, record.masks = self.plan, [[] for _ in range(batch)]
            record.trace = Trace() if self.trace else None
            for span, keep, mask in zip(videos, kept, encoded, strict=True):
                record.masks[span.sample].append(VideoMasks(keep, mask, span.grid))
        return self.add(record, cache)

    def add(self, record: Record, cache: Any) -> Record:
        """List a new record. Traces stay only with generations that can go on."""
        local = self._local
        if local.depth:
            record.secondary = local.first is not None
            local.first = local.first or record
        if not record.secondary:
            alive = set(map(id, self._by_cache.values()))
            for other in self.listed:
                if id(other) not in alive:
                    other.trace = None
            local.newest = record
        if cache is not None:
            self._by_cache[cache] = record
        record.number, record.call = next(self._numbers), local.call
        self.listed.append(record)
        return record

    def go_on(self, record: Record, cache: Any) -> Record:
        """A forward that belongs to ``record``, and to a cache that may be a copy."""
        if self._by_cache.get(cache) is not record:
            return self.add(record, cache)
        local = self._local
        if local.depth:
            local.first = local.first or record
        elif local.newest is not None and local.newest.number > record.number:
            local.newest.secondary = True  # it ran between two steps of this one
            local.newest = record
        return record

    def known(self, cache: Any, length: int, several: bool) -> Record | None:
        """The record that a forward belongs to which has no cache of ours, if it goes on.

        A cache is known again. Without one, generate feeds one token more each time: of the
        generations that began in this call of generate, or of bare forwards the newest.
        """
        if cache is not None:
            record = self._by_cache.get(cache)
            return record if length == 1 or several else None
        call = self._local.call
        listed = list(self.listed)
        for record in reversed(listed if call else listed[-1:]):
            if record.call == call and not record.rows and length == record.length + 1:
                return record
        return None

    def measure(self, record: Record, output: Any, length: int) -> None:
        """After an untouched forward of ``length`` tokens: what its cache holds, if it has one."""
        record.length = record.newest = length
        cache = cache_of(output) if isinstance(output, Mapping) else None
        if cache is not None:
            self._by_cache[cache] = record
            record.measure(cache)

    # Calls of generate

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of generate: the first generation inside is what it is about."""
        local = self._local
        if not local.depth:
            local.first = None
        before, local.call = local.call, next(self._calls)
        local.depth += 1
        try:
            yield
        finally:
            local.depth -= 1
            local.call = before


def _tensors(layer: Any) -> Iterable[Tensor]:
    """The tensors of a cache layer: keys and values, or states of linear attention."""
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        states += getattr(layer, name, {}).values()
    return [state for state in states if isinstance(state, Tensor)]


def held_bytes(cache: Any) -> int:
    """Bytes of the unique storages that a cache holds."""
    storages = {}
    for layer in getattr(cache, "layers", ()):
        for tensor in _tensors(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
