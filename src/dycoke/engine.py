"""The hooks that compress under an untouched ``generate()``, in the order of events.

The base model's pre-hook finds the video tokens of a prompt. The decoder's pre-hook drops the
merged rows and grows generate's cache into ours; where a method drops rows inside, the first upper
layer's pre-hook asks it. At a decode step the attention of one layer scores the visual tokens, a
new selection exchanges rows of the cache, and the layers above attend to the active ones.

Nothing here knows a model family (`models`) or a formula (`merging`, `selection`).
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dycoke import guards
from dycoke.attention import Override, attention_of, native_mask, query_scores
from dycoke.cache import DycokeCache, adopt
from dycoke.cache_rules import Generation, prompt_of
from dycoke.drop import drop_rows, last_token_scores, shorten_layer
from dycoke.errors import UnsupportedError
from dycoke.finder import Finder, Frames
from dycoke.layers import plan_layers
from dycoke.lead import lead_of
from dycoke.method import Method
from dycoke.models import Layout, Masks, VideoSpan
from dycoke.onward import GenerateHooks, place
from dycoke.rows import RowMap
from dycoke.shorten import clips_of, shorten
from dycoke.tally import IDLE, Records, Tally
from dycoke.vision import Vision

# Models that an engine is on, by their decoder; one engine at a time. The model's hooks keep the
# engine alive, so that both go when the model goes.
_ENGAGED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_INSTALLING = threading.Lock()


def engine_of(model: Any) -> Engine | None:
    """The engine that is on this model now, if any."""
    engine = _ENGAGED.get(model.get_decoder())
    return None if engine is None else engine()


@dataclass(eq=False)
class Forward:
    """One forward of the model, from its first hook to its last.

    Attributes
    ----------
    labels : whether labels were given.
    inputs : what the base model received, by name.
    videos, reason : the video tokens of the prompt, or why there is nothing to compress.
    length : tokens that come into the decoder, before any are dropped.
    prefill : whether ``cache`` (ours, or None) is new.
    counts : whether it counts as a decode step of ``tally``.
    attention_mask : the user's, (B, logical length), or None.
    plain_mask : which keys the lower layers may see, (B, rows), or None.
    upper_masks : per device, what the upper layers hand to their attention function.
    scores, source : where a method drops rows inside: attention of each prompt's last token,
        (B, rows), and the rows that stayed, (B, rows left), once they are known.
    """

    labels: bool = False
    inputs: dict[str, Any] | None = None
    videos: list[VideoSpan] = field(default_factory=list)
    reason: str | None = None
    length: int = 0
    prefill: bool = False
    counts: bool = False
    cache: DycokeCache | None = None
    tally: Tally | None = None
    attention_mask: Tensor | None = None
    plain_mask: Tensor | None = None
    upper_masks: dict[torch.device, Any] = field(default_factory=dict)
    scores: Tensor | None = None
    source: Tensor | None = None

    @property
    def decode(self) -> bool:
        return self.length == 1 and not self.prefill


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
        guards.check_model(model)
        self.model, self.method, self.trace = model, method, trace
        self.base: Any = model.base_model
        self.decoder: Any = model.get_decoder()
        self.finder = Finder(self.base.config, layout, frames)
        self.masks: Masks | None = getattr(self.finder.family, "masks", None)
        guards.check_settings(model, method, self.finder.rope)
        vision = getattr(self.base.config, "vision_config", None)
        levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self.layers = plan_layers(self.decoder.config, method, levels, trace)
        self.implementation = self.decoder.config._attn_implementation
        self.vision: Vision | None = None
        if method.needs_vision and (trace or not method.idle):
            self.vision = Vision(model, self.finder.family, self.finder.kinds)
        self.records = Records(method, self.layers.below, trace)
        self.running: Forward | None = None  # the decoder's forward; one at a time
        self._local = threading.local()  # forward: that of this thread's model, from its first hook
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._hooks: list[Any] = []
        self._overrides: list[Override] = []
        self._generate: GenerateHooks | None = None

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
            for i, layer in enumerate(self.decoder.layers):
                if i == self.layers.scoring:
                    self._overrides.append(Override(attention_of(layer), self._score))
                elif i in self.layers.upper:
                    self._overrides.append(Override(attention_of(layer), self._attend))
                    if self.layers.drop is not None:
                        self._hook(layer, self._drop)
            if self.vision is not None:
                self.vision.install(self._hook)
            if self.model is not self.base:
                self._hook(self.model, self._on_call)
            self._hook(self.base, self._on_prompt, self._after_prompt)
            self._hook(self.decoder, self._enter, self._leave)
            self._generate = GenerateHooks(self.model, self.method.idle, bool(self.layers.upper))
        except BaseException:
            self.remove()
            raise

    def _hook(self, module: nn.Module, before: Any, after: Any = None) -> None:
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
        for patch in (*self._overrides, self._generate, self.vision):
            if patch is not None:
                patch.restore()
        self._hooks, self._overrides, self._generate = [], [], None
        if engine_of(self.model) is self:
            del _ENGAGED[self.decoder]
        self._release()

    # The model's hooks: find the video tokens

    def _on_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._local.forward = Forward(labels=named(module, args, kwargs).get("labels") is not None)

    def _on_prompt(
        self, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        forward = self._local.forward = getattr(self._local, "forward", None) or Forward()
        forward.inputs = inputs = dict(named(module, args, kwargs))
        try:
            forward.videos, forward.reason = self.finder.videos(
                module, inputs, forward.labels, self._speculative
            )
        except UnsupportedError:
            if not self.method.idle:  # plain generation may do whatever it can
                raise
        place(inputs)
        return (), inputs

    @property
    def _speculative(self) -> bool:
        return self._generate is not None and self._generate.speculative

    def _after_prompt(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.forward = None

    # The decoder's hooks: drop rows, take over the cache, count

    def _enter(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        self._acquire()
        if self._overrides:
            guards.check_attention(self.decoder, self.implementation)
        forward = getattr(self._local, "forward", None) or Forward()
        inputs = dict(named(module, args, kwargs))
        past, forward.length = inputs.get("past_key_values"), inputs["inputs_embeds"].shape[1]
        if isinstance(past, DycokeCache):
            self._go_on(forward, past, inputs)
        elif forward.videos and (self.trace or not self.method.idle):
            self._prefill(forward, inputs)
        else:  # stays untouched: only count it
            batch, reason = inputs["inputs_embeds"].shape[0], forward.reason or IDLE
            self._count(forward, past, None, None, batch, reason)
        if forward.cache is not None:
            forward.cache.generation.step = forward
        self.running = forward
        return (), inputs

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        forward = self.running
        if forward is not None and forward.cache is not None:
            forward.cache.generation.step = None
        # After an exception there is no output, and nothing is counted.
        if forward is not None and forward.tally is not None and output is not None:
            if forward.cache is not None:
                forward.cache.generation.length += forward.length
            made = getattr(output, "past_key_values", None)
            cache = made if forward.cache is None else forward.cache
            forward.tally.after_forward(cache, forward.length, forward.counts)
        self._release()

    def _count(self, forward: Forward, cache: Any, *new: Any) -> None:
        """Where this forward is counted: a generation that goes on, or a new one."""
        several = self._speculative and not forward.videos
        forward.tally = self.records.going_on(cache, forward.length, several)
        forward.counts = forward.tally is not None
        if forward.tally is None:
            forward.tally = self.records.start(forward.videos, *new)

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

    def _prefill(self, forward: Forward, inputs: dict[str, Any]) -> None:
        """Merge, shorten the prompt in ``inputs``, and take over the cache."""
        method, drops = self.method, self.layers.drop is not None
        cache = guards.checked_cache(inputs, self.decoder, method, drops)
        if cache is None:
            cache = DynamicCache(config=self.decoder.config)
        embeds, cached = inputs["inputs_embeds"], cache is not False
        mask = guards.checked_mask(inputs.get("attention_mask"), forward.inputs)
        inputs["attention_mask"] = forward.attention_mask = mask
        lead = lead_of(inputs.get("position_ids"), mask, embeds)
        seen = self.vision and self.vision.take(forward.videos, embeds.device)
        clips = clips_of(forward.videos, seen)
        rows, kept = shorten(inputs, forward.videos, method, cached, clips)
        if drops:
            # Its own map from the start: what the layers above hold is known once they are reached.
            rows.pruned = RowMap(rows.plain.index, rows.plain.padded, rows.plain.first)
            forward.plain_mask = rows.plain.key_mask(
                mask, rows.source.shape[1], rows.source.device, decode=False
            )
        reason = IDLE if method.idle else None
        self._count(forward, cache or None, kept, rows.visual, len(embeds), reason)
        if cached:
            generation = Generation(
                owner=method,
                prompt=prompt_of(forward.inputs["input_ids"], mask),  # type: ignore[index]
                prompt_length=forward.length,
                length=0,
                plain=rows.plain,
                pruned=rows.pruned,
                visual=rows.visual,
                dropped=rows.dropped[:, -1],
                lead=lead,
                tally=forward.tally,
            )
            adopt(cache, generation, self.layers.upper, len(self.decoder.layers))
            inputs["past_key_values"] = forward.cache = cache
            forward.prefill = True
        if self.masks is not None:
            made = self.masks(self.base.config, forward.inputs, inputs, rows)  # type: ignore[arg-type]
            inputs["attention_mask"] = inputs["attention_mask"] if made is None else made

    def _go_on(self, forward: Forward, cache: DycokeCache, inputs: dict[str, Any]) -> None:
        """A decode step, or the forward of a new turn, on a cache of ours."""
        generation, device = cache.generation, inputs["inputs_embeds"].device
        mask = guards.checked_mask(inputs.get("attention_mask"), forward.inputs)
        guards.check_go_on(cache, self.method, mask, forward.length, self.decoder.config)
        forward.cache, forward.attention_mask = cache, mask
        if forward.length > 1:
            generation.visual.previous = None  # what follows selects anew
        generation.newest = forward.length
        forward.counts = forward.length == 1 or self._speculative
        generation.lead.step(forward.counts)
        if not forward.counts:
            generation.tally = generation.tally.next_turn()
        forward.tally = self.records.keep(generation.tally)
        rows = cache.row_count + forward.length
        forward.plain_mask = generation.plain.key_mask(mask, rows, device, decode=False)
        inputs["attention_mask"] = forward.plain_mask
        if self.method.positions == "compact":
            position_ids = inputs.get("position_ids")
            if position_ids is None:
                total = generation.length + forward.length
                position_ids = torch.arange(generation.length, total, device=device)[None]
            dropped = generation.dropped.to(position_ids.device)
            inputs["position_ids"] = position_ids - dropped[:, None]

    # Inside the decoder's layers: scores, rows that leave, masks that follow

    def _score(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The layer below the upper ones: its attention says which tokens they attend to."""
        output, forward = inner(module, *args, **kwargs), self.running
        if forward is not None and forward.cache is not None:
            query, keys, scaling, mask = args[0], args[1], kwargs.get("scaling"), forward.plain_mask
            mask = mask if mask is None else mask.to(query.device)
            if forward.decode:
                self._select(forward.cache, query_scores(query, keys, scaling, mask))
            elif forward.prefill and self.layers.drop is not None:
                forward.scores = last_token_scores(query, keys, scaling, mask)
        return output

    def _select(self, cache: DycokeCache, attention: Tensor) -> None:
        """Let the method choose the active set of this step, and exchange rows."""
        generation, visual = cache.generation, cache.generation.visual
        scores = attention.to(visual.rows.device).gather(1, visual.rows)
        scores = scores.masked_fill(~visual.valid, 0)
        if generation.prunes:
            first = visual.previous is None
            chosen, refreshed = self.method.select_tokens(scores, visual)
            recalled = cache.select(chosen)
            if not first:
                visual.refreshes += refreshed
                visual.recalled += recalled
        visual.previous = scores
        if generation.tally.trace is not None:
            generation.tally.trace.add(visual, scores)

    def _drop(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """An upper layer at prefill: the first drops rows, all go on without them."""
        forward = self.running
        if forward is None or forward.cache is None or not forward.prefill:
            return None
        inputs, generation = dict(named(module, args, kwargs)), forward.cache.generation
        if forward.source is None:
            hidden, forward.source, rows = drop_rows(
                self.method,
                inputs["hidden_states"],
                forward.scores,  # type: ignore[arg-type]
                generation.plain,
                generation.visual,
                self.layers.below,  # type: ignore[arg-type]
            )
            generation.pruned.become(rows)
            inputs["hidden_states"] = hidden.gather(
                1, forward.source[..., None].expand(-1, -1, hidden.shape[-1])
            )
        shorten_layer(inputs, forward.source, generation.plain.index.shape[1])
        return (), inputs

    def _attend(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """The layers with rows of their own: the mask must follow these."""
        forward = self.running
        if forward is not None and forward.cache is not None:
            if not forward.prefill or forward.source is not None:
                mask = self._upper_mask(forward, forward.cache.generation, args[0])
                if len(args) > 3:
                    args[3] = mask
                else:
                    kwargs["attention_mask"] = mask
        return inner(module, *args, **kwargs)

    def _upper_mask(self, forward: Forward, generation: Generation, query: Tensor) -> Any:
        """What the attention function wants as a mask over an upper layer's rows."""
        if query.device not in forward.upper_masks:
            assert forward.cache is not None
            rows = generation.pruned
            # Rows of prompt and answer, the new ones included: the layers below have them already.
            later = forward.cache.row_count - generation.plain.index.shape[1]
            total = rows.index.shape[1] + later
            keys = rows.key_mask(forward.attention_mask, total, query.device, forward.decode)
            length = total - rows.start if forward.decode else total
            new = total if forward.prefill else forward.length
            forward.upper_masks[query.device] = native_mask(
                self.implementation, self.decoder.config, query, new, length, keys
            )
        mask = forward.upper_masks[query.device]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # Layers that share keys may be asked for the newest tokens only.
            mask = mask[:, :, -query.shape[2] :]
        return mask


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
