"""The hooks that compress under an untouched ``generate()``.

A video's way: the model's pre-hook finds the video tokens in the prompt; the decoder's pre-hook
drops merged rows and grows generate's cache into ours; at each decode step the attention override
of one layer scores the visual tokens, a new selection exchanges rows, and the layers above attend
to the active ones. A method takes part through doors (`Method`).

Nothing here knows a model family (`models`) or a formula (`merging`, `selection`).
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections import deque
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dycoke.cache import DycokeCache, Generation, adopt, check_cache, prompt_of
from dycoke.errors import UnsupportedError
from dycoke.finder import Finder, Frames
from dycoke.inside import Inside, Step, Within, named
from dycoke.layers import FULL, check_layers, layer_types
from dycoke.lead import lead_of
from dycoke.models import Layout, Masks, VideoSpan
from dycoke.onward import Onward, place
from dycoke.report import Report
from dycoke.rows import RowMap
from dycoke.shorten import Merger, clips_of, shorten
from dycoke.tally import IDLE, SampleTrace, Tally, Trace, videos_by_sample
from dycoke.vision import Vision


class Method(Merger, Within, Protocol):
    """The doors of a method, and the settings that the engine itself needs."""

    needs_vision: ClassVar[bool]

    def to_dict(self) -> dict[str, Any]: ...


class _Untouched(Exception):
    """Why a forward has nothing to compress."""


# Models that an engine is on, by their decoder; one engine at a time. The model's hooks keep the
# engine alive, so that both go when the model goes.
_ENGAGED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_INSTALLING = threading.Lock()


def engine_of(model: Any) -> Engine | None:
    """The engine that is on this model now, if any."""
    engine = _ENGAGED.get(model.get_decoder())
    return None if engine is None else engine()


class Engine:
    """One method on one model, from `install` to `remove`.

    Forwards of the decoder are serialised: threads may share the model, each with its own
    generation.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        trace: bool = False,
        layout: Layout | None = None,
        frames: Frames | None = None,
    ) -> None:
        for name in ("get_decoder", "config", "base_model"):
            if not hasattr(model, name):
                raise TypeError(
                    f"expected a transformers model, got {type(model).__name__} without .{name}"
                )
        self.model, self.method, self.trace = model, method, trace
        self.base: Any = model.base_model
        self.decoder: Any = model.get_decoder()
        self.finder = Finder(self.base.config, layout, frames)
        self.masks: Masks | None = getattr(self.finder.family, "masks", None)
        # Where a model knows no logits_to_keep, nothing tells candidates from a new turn. A bare
        # base model is not what generate runs.
        known = inspect.signature(model.forward).parameters
        self.tells = model is self.base or "logits_to_keep" in known
        self.tallies: deque[Tally] = deque(maxlen=100)
        self._local = threading.local()
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._hooks: list[Any] = []
        self._onward: Onward | None = None
        self._check_settings()
        self.inside = Inside(self.decoder, method, self._levels(), trace)
        self.vision: Vision | None = None
        if method.needs_vision and (trace or not method.idle):
            self.vision = Vision(model, self.finder.family, self.finder.kinds)

    def _check_settings(self) -> None:
        method = self.method
        if method.positions == "compact" and self.finder.rope == "3-D":
            raise UnsupportedError(
                f"positions='compact' renumbers 1-D positions, and {self.base.config.model_type} "
                "has 3-D ones; use positions='original'"
            )
        if self.decoder.config._attn_implementation == "flex_attention":
            raise UnsupportedError(
                "FlexAttention's block masks cannot follow rows that move; load the model with "
                'attn_implementation="sdpa" (or flash_attention_2, eager)'
            )
        if not method.idle:  # plain generation may do whatever it can
            check_layers(self.decoder.config, method.prune_layer, method.prune_ratio > 0)

    def _levels(self) -> int:
        """Layers behind which the family adds features to visual tokens."""
        vision = getattr(self.base.config, "vision_config", None)
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    # Installing and removing

    def install(self) -> None:
        with _INSTALLING:
            if engine_of(self.model) is not None:
                raise UnsupportedError(
                    "this model is compressed already; leave the other `with` block (or call "
                    "dycoke.remove(model)) first"
                )
            _ENGAGED[self.decoder] = weakref.ref(self)
        try:
            self.inside.install(self._hook_forward)
            if self.vision is not None:
                self.vision.install(self._hook_forward)
            if self.model is not self.base:
                self._hook_forward(self.model, self._on_call, None)
            self._hook_forward(self.base, self._on_prompt, self._after_prompt)
            self._hook_forward(self.decoder, self._enter, self._leave)
            self._onward = Onward(self.model, self.method.idle)
        except BaseException:
            self.remove()
            raise

    def _hook_forward(self, module: nn.Module, before: Any, after: Any) -> None:
        # A compiled model runs hooks as they are: traced, they would be compiled again each step.
        eagerly: Any = torch.compiler.disable
        self._hooks.append(module.register_forward_pre_hook(eagerly(before), with_kwargs=True))
        if after is not None:
            self._hooks.append(
                module.register_forward_hook(eagerly(after), with_kwargs=True, always_call=True)
            )

    def remove(self) -> None:
        """Restore the model completely, between two forwards. Harmless when called twice."""
        self._acquire()
        for hook in self._hooks:
            hook.remove()
        self.inside.restore()
        if self._onward is not None:
            self._onward.restore()
        if self.vision is not None:
            self.vision.restore()
        self._hooks, self._onward = [], None
        if engine_of(self.model) is self:
            del _ENGAGED[self.decoder]
        self._release()

    # Reports

    def reports(self) -> list[Report]:
        return [tally.report() for tally in list(self.tallies)]

    def traced(self) -> Trace | None:
        return self.tallies[-1].trace if self.tallies else None

    def _open(self, tally: Tally) -> Tally:
        for other in self.tallies:
            if other.frozen is None and (other.cache is None or other.cache() is None):
                other.freeze()
        tally.method = type(self.method).__name__
        self.tallies.append(tally)
        return tally

    # The model's pre-hooks: find the video tokens

    def _on_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = named(module, args, kwargs)
        asked = inputs.get("logits_to_keep")
        self._local.labels = inputs.get("labels") is not None
        # Assisted decoding asks for the logits of several tokens at once.
        self._local.several = isinstance(asked, int) and asked > 1

    def _on_prompt(
        self, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        local = self._local
        local.spans, local.reason = [], None
        local.inputs = inputs = dict(named(module, args, kwargs))
        try:
            local.spans = self._find(module, inputs)
        except _Untouched as why:
            local.reason = str(why)
        except UnsupportedError:
            if not self.method.idle:  # plain generation may do whatever it can
                raise
        place(inputs)
        return (), inputs

    def _find(self, module: Any, inputs: dict[str, Any]) -> list[VideoSpan]:
        """Where the videos of this forward's prompt are."""
        if getattr(self._local, "labels", False) or module.training:
            raise _Untouched("labels were given or the model is in training mode")
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        past = inputs.get("past_key_values")
        filled = past is not None and past.get_seq_length() > 0
        if ids is None:
            if not filled and embeds is not None and embeds.shape[1] > 1:
                warnings.warn(
                    "DyCoke got inputs_embeds without input_ids and cannot find the video tokens; "
                    "pass input_ids and pixels instead",
                    stacklevel=2,
                )
            raise _Untouched("inputs_embeds without input_ids: video tokens cannot be found")
        if not self.finder.arrived(inputs):
            several = getattr(self._local, "several", False)
            several = several or (not self.tells and isinstance(past, DycokeCache))
            # One wait for the device, at prefill only. Candidates may repeat a placeholder.
            if ids.shape[1] > 1 and not several and self.finder.lacks_video(ids, inputs):
                raise UnsupportedError(
                    "the prompt has video placeholders and no video came with them; pass the "
                    "processor's whole output, and prefill at once, without prefill_chunk_size"
                )
            raise _Untouched(self.finder.why_untouched(inputs))
        if filled:
            raise UnsupportedError(
                "video tokens arrived for a cache that is not empty: prefill a video in one go, "
                "without prefill_chunk_size, and start a new cache for a new video"
            )
        spans = self.finder.find(module.config, inputs)
        if not spans:
            raise _Untouched(self.finder.why_untouched(inputs))
        return spans

    def _after_prompt(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        local = self._local
        local.spans, local.inputs, local.labels, local.several = [], None, False, False

    # The decoder's hooks: drop rows, take over the cache, count

    def _enter(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        self._acquire()
        self._check_attention()
        inputs = dict(named(module, args, kwargs))
        spans: list[VideoSpan] = getattr(self._local, "spans", [])
        several: bool = getattr(self._local, "several", False)
        past, length = inputs.get("past_key_values"), inputs["inputs_embeds"].shape[1]
        step = Step(length)
        if isinstance(past, DycokeCache):
            self._go_on(step, past, inputs, several)
        elif spans and (self.trace or not self.method.idle):
            self._prefill(step, spans, inputs, several)
        else:
            self._watch(step, spans, inputs, several)
        if step.cache is not None:
            step.cache.generation.step = step
        self.inside.step = step
        return (), inputs

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step = self.inside.step
        if step is not None and step.cache is not None:
            step.cache.generation.step = None
        # After an exception there is no output, and nothing is counted.
        if step is not None and output is not None:
            if step.cache is not None:
                step.cache.generation.length += step.length
            made = getattr(output, "past_key_values", None)
            cache = made if step.cache is None else step.cache
            step.tally.after_forward(cache, step.length, step.counts)
        self._release()

    def _acquire(self) -> None:
        """One decoder forward at a time. An interrupt may have left this thread's own lock."""
        if self._owner == threading.get_ident():
            self._release()
        self._turn.acquire()
        self._owner = threading.get_ident()

    def _release(self) -> None:
        if self._owner is not None:
            self._owner = None
            self.inside.step = None
            self._turn.release()

    def _watch(
        self, step: Step, spans: list[VideoSpan], inputs: dict[str, Any], several: bool
    ) -> None:
        """A forward that stays untouched: only count it."""
        if self._continues(step, inputs.get("past_key_values"), several):
            return
        reason = getattr(self._local, "reason", None) or IDLE
        counts = [span.positions.numel() for span in spans]
        videos = videos_by_sample(spans, counts, inputs["inputs_embeds"].shape[0])
        step.tally = self._open(Tally(self.method.to_dict(), videos, reason=reason))

    def _continues(self, step: Step, cache: Any, several: bool) -> bool:
        # Without a cache only the newest can be told from chance.
        known = self.tallies if cache is not None else list(self.tallies)[-1:]
        for tally in reversed(known):
            if tally.goes_on(cache, step.length, several):
                step.tally, step.counts = tally, True
                return True
        return False

    def _prefill(
        self, step: Step, spans: list[VideoSpan], inputs: dict[str, Any], several: bool
    ) -> None:
        """Merge, shorten the prompt in ``inputs``, and take over the cache."""
        method = self.method
        batch, length, _ = inputs["inputs_embeds"].shape
        cache = self._checked_cache(inputs)
        mask = self._checked_mask(inputs.get("attention_mask"))
        inputs["attention_mask"] = mask
        lead = lead_of(inputs.get("position_ids"), mask, inputs["inputs_embeds"])
        device = inputs["inputs_embeds"].device
        seen = None if self.vision is None else self.vision.take(spans, device)
        clips = clips_of(spans, seen)
        rows, masks = shorten(inputs, spans, method, cached=cache is not None, clips=clips)

        prunes = rows.pruned is not rows.plain
        if self.inside.door is not None:
            # Its own map from the start: what the layers above hold is known once they are reached.
            rows.pruned = RowMap(rows.plain.index, rows.plain.padded, rows.plain.first)
            step.plain_mask = rows.plain.key_mask(
                mask, rows.source.shape[1], rows.source.device, decode=False
            )
            step.attention_mask = mask
        chooses = prunes or self.inside.door is not None
        if not self._continues(step, cache, several=False):
            counts = torch.stack([kept.sum() for kept in masks]).tolist()
            tally = Tally(method.to_dict(), videos_by_sample(spans, counts, batch), rows.visual)
            tally.reason = IDLE if method.idle else None
            tally.below = self.inside.below
            if self.trace:
                tally.trace = Trace([SampleTrace(keep=[]) for _ in range(batch)])
                for span, kept in zip(spans, masks, strict=True):
                    tally.trace.samples[span.sample].keep.append(kept.cpu())
            step.tally = self._open(tally)
        if cache is not None:
            generation = Generation(
                owner=method,
                prompt=prompt_of(self._local.inputs["input_ids"], mask),
                prompt_length=length,
                length=0,
                plain=rows.plain,
                pruned=rows.pruned,
                visual=rows.visual,
                dropped=rows.dropped[:, -1],
                lead=lead,
                tally=step.tally,
                refuse_crop=ASSISTED if several and chooses else None,
                refuse_below=0 if self.tells or not chooses else length,
            )
            adopt(cache, generation, self.inside.upper, len(self.decoder.layers))
            inputs["past_key_values"] = cache
            step.cache, step.prefill = cache, True
        if self.masks is not None:
            made = self.masks(self.base.config, self._local.inputs, inputs, rows)
            inputs["attention_mask"] = inputs["attention_mask"] if made is None else made

    def _checked_cache(self, inputs: dict[str, Any]) -> DynamicCache | None:
        """The empty `DynamicCache` to take over; None without a cache; else an error."""
        cache = inputs.get("past_key_values")
        if cache is None:
            use_cache = inputs.get("use_cache")
            if use_cache is None:
                use_cache = self.decoder.config.use_cache
            if use_cache:
                return DynamicCache(config=self.decoder.config)
            if self.method.prune_ratio > 0:
                raise UnsupportedError(
                    f"prune_ratio={self.method.prune_ratio} chooses rows of the KV cache, and "
                    "use_cache=False has none; drop use_cache=False, or use prune_ratio=0"
                )
            if self.inside.door is not None:
                raise UnsupportedError(
                    f"{type(self.method).__name__} would drop other tokens in every step, since "
                    "use_cache=False reads the whole prompt again; drop use_cache=False"
                )
            return None
        check_cache(cache)
        return cache

    def _check_attention(self) -> None:
        """Overridden layers would go on with the old implementation, in any forward."""
        now = self.decoder.config._attn_implementation
        if now == self.inside.implementation or not self.inside.installed:
            return
        raise UnsupportedError(
            f"the attention implementation changed from {self.inside.implementation!r} to {now!r} "
            "inside the context; change it before entering"
        )

    def _checked_mask(self, mask: Any) -> Tensor | None:
        """The 2-D mask of this forward, or None; else an error."""
        given = getattr(self._local, "inputs", None)
        if isinstance(mask, dict) and given is not None:
            # One mask per kind of layer, made for the whole prompt. Given the model's 2-D mask,
            # the decoder makes them anew.
            mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(
                f"DyCoke needs the 2-D attention mask of the prompt and got {shape}; pass the "
                "processor's attention_mask, and no static or compiled cache"
            )
        return mask

    def _go_on(self, step: Step, cache: DycokeCache, inputs: dict[str, Any], several: bool) -> None:
        """A decode step, or the forward of a new turn, on a cache of ours."""
        generation, device = cache.generation, inputs["inputs_embeds"].device
        mask = self._checked_mask(inputs.get("attention_mask"))
        if generation.owner != self.method:
            raise UnsupportedError(
                f"this cache was made with {generation.owner} and cannot go on with {self.method}"
            )
        total = generation.length + step.length
        if mask is not None and mask.shape[1] != total:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens where prompt and answer have {total}"
            )
        step.cache, step.attention_mask = cache, mask
        generation.refuse_below = 0
        if step.length > 1:
            self._check_no_gap(mask, step.length)
            generation.visual.previous = None  # what follows selects anew
            generation.refuse_crop = ASSISTED if several and generation.prunes else None
            generation.refuse_below = 0 if self.tells or not generation.prunes else step.length
        step.counts = step.length == 1 or several
        generation.lead.step(step.counts)
        if not step.counts:
            generation.tally = generation.tally.next_turn()
        if generation.tally not in self.tallies:
            self._open(generation.tally)
        step.tally = generation.tally

        rows = cache.row_count + step.length
        step.plain_mask = generation.plain.key_mask(mask, rows, device, decode=False)
        inputs["attention_mask"] = step.plain_mask
        if self.method.positions == "compact":
            position_ids = inputs.get("position_ids")
            if position_ids is None:
                position_ids = torch.arange(generation.length, total, device=device)[None]
            dropped = generation.dropped.to(position_ids.device)
            inputs["position_ids"] = position_ids - dropped[:, None]

    def _check_no_gap(self, mask: Tensor | None, new: int) -> None:
        """Padding between a cached prompt and new tokens: only full attention can look past it."""
        if mask is None or set(layer_types(self.decoder.config)) == {FULL}:
            return
        if not mask[:, -new:].all():
            raise UnsupportedError(
                "padding between a cached prompt and its question: layers with linear attention or "
                "a window take it for tokens; ask questions of one length together, or one by one"
            )


ASSISTED = (
    "assisted and prompt-lookup decoding check several tokens in one forward, by which a method "
    "would prune or drop others than in plain decoding: with prune_ratio > 0, or tokens dropped "
    "inside the LLM, the answer would differ; use prune_ratio=0, or decode plainly"
)
