"""The hooks that compress under an untouched ``generate()``, in the order of events.

Prefill: `_on_prompt` finds the video tokens of the prompt; `_enter` and `_prefill` drop the merged
rows and grow generate's cache into ours; where a method drops rows inside, `_drop` asks it.

A decode step: `_enter` and `_go_on` make masks and positions fit the rows; `_score` and `_select`
see how much the newest token looks at each visual token, and exchange rows; the upper layers
attend to the active rows (`_attend`); `_leave` counts. Nothing here knows a model family
(`models`) or a formula (`merging`, `selection`).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dycoke import compat
from dycoke.attention import Handler, Override, query_scores
from dycoke.core import guards
from dycoke.core.cache_rules import DycokeCache, adopt, prompt_of
from dycoke.core.drop import drop_inside, last_token_scores
from dycoke.core.echo import echoes_of
from dycoke.core.echo_hooks import EchoHooks
from dycoke.core.forward import Forward
from dycoke.core.generate import GenerateHooks, state_positions
from dycoke.core.late import late_scores
from dycoke.core.layers import deepstack_levels, plan_layers
from dycoke.core.method import Method
from dycoke.core.positions import compacted, offset_after
from dycoke.core.prefill import shorten, start
from dycoke.core.records import IDLE, Records
from dycoke.core.steps import OnStep
from dycoke.errors import UnsupportedError
from dycoke.models import Layout, Masks
from dycoke.models.locate import Finder, FrameSource
from dycoke.patching import Patches
from dycoke.vision.encoder import contexts_of, encoder_notes
from dycoke.vision.wrap import ENCODED, carry_notes, note_encoded

# Models that an engine is on, by their decoder. Their hooks keep the engine alive, until they go.
_ENGAGED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_INSTALLING = threading.Lock()


def engine_of(model: Any) -> Engine | None:
    """The engine that is on this model now, if any."""
    engine = _ENGAGED.get(guards.transformers_model(model).get_decoder())
    return None if engine is None else engine()


class _Local(threading.local):
    """A thread's own: the forward of the model that it is in, from the first hook on."""

    forward: Forward | None = None


class Engine:
    """One method on one model, from `install` to `remove`.

    Forwards of the decoder take turns: threads may share the model, each with its own generation.
    """

    def __init__(
        self,
        given: Any,
        method: Method,
        trace: bool = False,
        layout: Layout | None = None,
        frame_source: FrameSource | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.given, self.method, self.on_step = given, method, on_step
        self.watched = trace or on_step is not None
        self.model: Any = guards.transformers_model(given)
        self.base: Any = self.model.base_model
        self.decoder: Any = self.model.get_decoder()
        self.finder = Finder(self.base.config, layout, frame_source)
        family = self.finder.family
        self.masks: Masks | None = None if family is None else family.masks
        guards.check_settings(self.model, method, None if family is None else family.rope)
        compat.check_names(self.model, self.base, self.decoder)
        self._cache_in, self._cache_inside = map(compat.cache_name, (self.base, self.decoder))
        levels = deepstack_levels(self.base.config)
        self.layers = plan_layers(self.decoder.config, method, levels, self.watched)
        self.implementation = self.decoder.config._attn_implementation
        self.vision, self.skips = encoder_notes(self.model, self.finder, method, self.watched)
        self.records = Records(method, self.layers, trace)
        self.running: Forward | None = None  # the decoder's forward; one at a time
        self._local, self._turn = _Local(), threading.Lock()
        self._owner: int | None = None
        self._patches = Patches()
        self._generate: GenerateHooks | None = None
        self._overrides: list[Override] = []
        self._liftable, self._lifted = self._overrides[:], False

    def install(self) -> None:
        with _INSTALLING:
            if engine_of(self.model) is not None:
                raise UnsupportedError(
                    "this model is compressed already; leave the other `with` block (or call "
                    "dycoke.remove(model)) first"
                )
            _ENGAGED[self.decoder] = weakref.ref(self)
        patches, plan = self._patches, self.layers
        try:
            echoes = None
            if plan.echoes:
                echoes = EchoHooks(patches, self.decoder, plan, lambda: self.running)
            for i, layer in enumerate(self.decoder.layers):
                handler: Handler | None = None
                if i == plan.scoring:
                    handler = self._score_late if plan.late else self._score
                elif i in plan.upper:
                    handler = self._attend
                if echoes is not None and i in plan.echoes:
                    handler = echoes.over(handler)
                if handler is not None:
                    self._overrides.append(Override(patches, compat.attention_of(layer), handler))
                if plan.kind == "drop" and i in plan.upper:
                    patches.hook(layer, self._drop)
            # The first of them goes on looking at what they are handed.
            self._liftable = [x for x in self._overrides if x.handler == self._attend][1:]
            note_encoded(patches, self.base)
            for notes in filter(None, (self.vision, self.skips)):
                notes.install(patches)
            if self.model is not self.base:
                patches.hook(self.model, self._on_call)
            patches.hook(self.base, self._on_prompt, self._after_prompt)
            patches.hook(self.decoder, self._enter, self._leave)
            self._generate = GenerateHooks(
                patches, self.model, self.given, self.records, self.method.idle, plan.kind
            )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model completely, between two forwards. Harmless when called twice."""
        self._acquire()
        self._patches.undo()
        if engine_of(self.model) is self:
            del _ENGAGED[self.decoder]
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
            self.running = None
            self._turn.release()

    def _on_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = self._named(module, args, kwargs)
        self._local.forward = Forward(inputs.get("labels") is not None, inputs.get(ENCODED))

    def _on_prompt(
        self, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        forward = self._local.forward = self._local.forward or Forward()
        forward.inputs = inputs = dict(self._named(module, args, kwargs))
        cache, ids = inputs.get(self._cache_in), inputs.get("input_ids")
        ours = isinstance(cache, DycokeCache)
        if not ours or ids is None or ids.shape[1] > 1:  # else it brings nothing to find
            self._find(module, forward, cache)
        if ours and inputs.get("position_ids") is None:
            state_positions(cache, inputs)
        return (), inputs

    def _find(self, module: nn.Module, forward: Forward, cache: Any) -> None:
        """Where the videos of a prompt are."""
        carry_notes(forward.encoded, forward.inputs.get(ENCODED))
        try:
            forward.videos, forward.reason = self.finder.videos(
                module, forward.inputs, cache, forward.labels, self._speculative
            )
        except UnsupportedError:
            if not self.method.idle:  # plain generation may do whatever it can
                raise

    @property
    def _speculative(self) -> bool:
        return self._generate is not None and self._generate.speculative

    def _named(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a forward by name; of the cache, which may come by its old one, too."""
        if args:
            kwargs = compat.named(module, args, kwargs)
        if self._cache_in == "cache" and "past_key_values" in kwargs:
            old = kwargs.pop("past_key_values")
            kwargs["cache"] = old if kwargs.get("cache") is None else kwargs["cache"]
        return kwargs

    def _after_prompt(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.forward = None

    # The decoder's hooks: drop rows, take over the cache, count

    def _enter(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        self._acquire()
        forward = self._local.forward or Forward()
        if self._overrides and self.decoder.config._attn_implementation != self.implementation:
            raise guards.changed_attention(self.decoder, self.implementation)
        inputs = dict(self._named(module, args, kwargs))
        if inputs.get("inputs_embeds") is None:
            raise compat.unknown(f"{type(module).__name__} was called without inputs_embeds")
        cache, forward.length = inputs.get(self._cache_inside), inputs["inputs_embeds"].shape[1]
        self.records.forwards += 1
        if isinstance(cache, DycokeCache):
            self._go_on(forward, cache, inputs)
        elif forward.videos and (self.watched or not self.method.idle):
            self._prefill(forward, cache, inputs)
        else:
            self._watch(forward, cache, len(inputs["inputs_embeds"]))
        if forward.cache is not None:
            forward.cache.generation.open = True
        self.running, self.records.current = forward, forward.record
        return (), inputs

    def _prefill(self, forward: Forward, cache: Any, inputs: dict[str, Any]) -> None:
        """Merge, shorten the prompt in ``inputs``, and take over the cache."""
        method, plan, embeds = self.method, self.layers, inputs["inputs_embeds"]
        self._lift(False)
        cache = guards.checked_cache(
            cache, inputs.get("use_cache"), self.decoder, method, plan.kind == "drop"
        )
        if cache is None:
            cache = DynamicCache(config=self.decoder.config)
        mask = guards.checked_mask(inputs.get("attention_mask"), forward.inputs)
        inputs["attention_mask"] = forward.attention_mask = mask
        positions = inputs.get("position_ids")
        offset = offset_after(positions, mask, embeds)
        contexts = contexts_of(forward.videos, embeds.device, self.vision, self.skips)
        rows, kept = shorten(inputs, forward.videos, method, cache is not False, contexts)
        if plan.echoes:
            forward.echoes = echoes_of(
                embeds, positions, forward.videos, kept, rows.lower.index, inputs["inputs_embeds"]
            )
        if plan.kind == "drop":
            forward.lower_mask = rows.lower.key_mask(
                mask, rows.source.shape[1], rows.source.device, decode=False
            )
        reason = IDLE if method.idle else None
        record = None if cache else self.records.known(None, forward.length, False)
        forward.decode_step = record is not None
        if record is None:
            record = self.records.start(
                cache or None, forward.videos, kept, len(embeds), reason, contexts
            )
        record.attended, forward.record = rows.visual.active.sum(1), record
        forward.visual = rows.visual
        if cache is not False:
            prompt = prompt_of(forward.inputs["input_ids"], mask)
            generation = start(rows, method, plan.kind, prompt, offset, record)
            cache = adopt(cache, generation, plan.upper, len(self.decoder.layers))
            inputs[self._cache_inside] = forward.cache = cache
            forward.prefill = True
        if self.masks is not None:
            made = self.masks(self.base.config, forward.inputs, inputs, rows.source)
            inputs["attention_mask"] = inputs["attention_mask"] if made is None else made

    def _go_on(self, forward: Forward, cache: DycokeCache, inputs: dict[str, Any]) -> None:
        """A decode step, or the forward of a new turn, on a cache of ours."""
        generation, device = cache.generation, inputs["inputs_embeds"].device
        mask = inputs.get("attention_mask")
        if forward.length > 1 or generation.method != self.method or mask is not None:
            mask = guards.checked_mask(mask, forward.inputs)
            guards.check_go_on(generation, self.method, mask, forward.length, self.decoder.config)
        if generation.inferred and not torch.is_inference_mode_enabled():
            cache.map_batch(torch.clone)
            generation.inferred = False
        forward.cache, forward.attention_mask, forward.visual = cache, mask, generation.visual
        forward.decodes = forward.length == 1
        forward.decode_step = forward.length == 1 or self._speculative
        cache.begin(forward.length, forward.decode_step)
        if not forward.decode_step:
            generation.record = generation.record.next_turn(self.records.trace)
        forward.record = generation.record
        if forward.record is not self.records.current:
            self.records.go_on(forward.record, cache)
        rows = cache.row_count + forward.length
        forward.lower_mask = generation.lower.key_mask(mask, rows, device, decode=False)
        inputs["attention_mask"] = forward.lower_mask
        if self.method.positions == "compact":
            begin, dropped = generation.length, generation.dropped
            inputs["position_ids"] = compacted(inputs, begin, forward.length, dropped)

    def _watch(self, forward: Forward, cache: Any, batch: int) -> None:
        """A forward that stays untouched: only count it."""
        several = self._speculative and not forward.videos
        record = self.records.known(cache, forward.length, several)
        forward.decode_step = record is not None
        if record is None:
            record = self.records.start(cache, forward.videos, None, batch, forward.reason or IDLE)
        forward.record = record

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        forward = self.running
        if forward is not None and forward.cache is not None:
            forward.cache.generation.open = False
        # After an exception there is no output, and nothing is counted.
        if forward is not None and forward.record is not None and output is not None:
            record, cache = forward.record, forward.cache
            record.decode_steps += forward.decode_step
            if cache is None:
                self.records.measure(record, output, forward.length)
            else:
                wanted = len(self._overrides) - self._lifted * len(self._liftable)
                clear = not forward.prefill and forward.reached == wanted
                fault = None if clear else guards.not_taken(self.decoder, forward, wanted)
                if fault is not None:
                    self._release()
                    raise fault
                if forward.prefill:
                    cache.settle()
                if forward.prefill and self.layers.late and forward.scores is not None:
                    self._select(cache, forward.scores)
                cache.generation.length += forward.length
                record.length, record.newest = cache.generation.length, forward.length
                if cache.generation.grown or cache.generation.stock_layers:
                    record.measure(cache)
                    cache.generation.grown = False
        self._release()
        if self.watched and forward is not None and output is not None:
            forward.tell(self.on_step)

    def _score(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The layer below the upper ones: its attention says which tokens they attend to."""
        output, forward = inner(module, *args, **kwargs), self.running
        if forward is not None and forward.cache is not None:
            forward.reached += 1
            query, keys, scaling, mask = args[0], args[1], kwargs.get("scaling"), forward.lower_mask
            mask = mask if mask is None else mask.to(query.device)
            if forward.decodes:
                rows = forward.cache.generation.lower_rows
                scores = query_scores(query, keys, scaling, mask).to(rows.device).gather(1, rows)
                self._select(forward.cache, scores)
            elif forward.prefill and self.layers.kind == "drop":
                forward.scores = last_token_scores(query, keys, scaling, mask)
        return output

    def _score_late(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """An upper layer that scores: those above it follow now, it and those below next time."""
        output, forward = self._attend(inner, module, args, kwargs), self.running
        if forward is not None and forward.cache is not None:
            scores = late_scores(forward, module, args[0], args[1], kwargs.get("scaling"))
            if forward.prefill:
                forward.scores = scores  # rows move once all layers have theirs
            else:
                self._select(forward.cache, scores)
        return output

    def _select(self, cache: DycokeCache, scores: Tensor) -> None:
        """Let the method choose the active set by scores (B, V), and exchange rows."""
        generation = cache.generation
        visual, record = generation.visual, generation.record
        if visual.padded:
            scores = scores.masked_fill(~visual.valid, 0)
        if generation.kind == "select":
            chosen, refreshed = self.method.select_tokens(scores, visual)
            if chosen is not visual.active:
                recalled = cache.select(chosen)
                if visual.previous is not None:
                    record.refreshes = record.refreshes + refreshed
                    record.recalled = record.recalled + recalled
        cache.note(scores)

    def _drop(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], Any] | None:
        """An upper layer at prefill: the first drops rows, all go on without them."""
        inputs = drop_inside(self.method, self.running, lambda: self._named(module, args, kwargs))
        return None if inputs is None else ((), inputs)

    def _attend(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The upper layers: the mask must follow their rows."""
        forward = self.running
        if forward is not None and forward.cache is not None:
            forward.reached += 1
            if not forward.prefill or forward.source is not None:
                masks, query = forward.upper_masks, args[0]
                if query.device not in masks:
                    masks[query.device] = self._upper_mask(forward, forward.cache, query)
                mask = masks[query.device]
                self._lift(mask is None and args[3] is None)
                if isinstance(mask, Tensor) and mask.ndim == 4:
                    # Layers that share keys may be asked for the newest tokens only.
                    mask = mask[:, :, -query.shape[2] :]
                args[3] = mask
        return inner(module, *args, **kwargs)

    def _lift(self, away: bool) -> None:
        """Whether upper layers are left to themselves: they are handed no mask, and need none."""
        if away != self._lifted:
            self._lifted = away
            for override in self._liftable:
                override.lift(away)

    def _upper_mask(self, forward: Forward, cache: DycokeCache, query: Tensor) -> Any:
        """What the attention function wants as a mask over an upper layer's rows."""
        upper, new = cache.generation.upper, forward.length
        # Rows of prompt and answer, the new ones included.
        total = cache.generation.rows(upper=True) + new
        if forward.prefill:
            total = new = upper.index.shape[1]
        keys = upper.key_mask(forward.attention_mask, total, query.device, forward.decodes)
        length = total - upper.start if forward.decodes else total
        if keys is None and new == 1:
            return None
        how, config = self.implementation, self.decoder.config
        return compat.native_mask(how, config, query, new, length, keys)
