"""The hooks through which a decoder's lower layers see echoes (`echo`), while a prompt is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dycoke import compat
from dycoke.attention import Handler
from dycoke.core.echo import Echoes, Visible
from dycoke.core.forward import Forward
from dycoke.core.layers import LayerPlan, layer_types
from dycoke.errors import UnsupportedError
from dycoke.patching import Patches


class _Taken(Exception):
    """The echoes' keys and values are known; what their module does next is for queries."""


class EchoHooks:
    """Shows the layers of ``plan.echoes`` what was merged away.

    Each layer's own attention module makes the echoes' keys and values, so that biases, norms of
    heads and positions are its own. Attention over rows and echoes is PyTorch's, whatever backend
    the model has: what is seen is neither causal nor a window.

    Parameters
    ----------
    patches : where the hooks go.
    decoder : the language model.
    plan : its layers.
    running : the forward of the decoder that runs now.
    """

    def __init__(
        self,
        patches: Patches,
        decoder: Any,
        plan: LayerPlan,
        running: Callable[[], Forward | None],
    ) -> None:
        self._running = running
        self._asking = self._computing = False
        kinds = layer_types(decoder.config)
        rotary, top = _part(decoder, "rotary_emb"), max(plan.echoes)
        patches.hook(rotary, self._place, self._placed)
        for i in sorted(plan.echoes):
            layer, exact = decoder.layers[i], i in plan.exact
            _part(layer, "input_layernorm")
            if exact:
                _check_exact(layer)
            after = partial(self._leave, kinds[i], exact, i == top)
            patches.hook(layer, self._enter, after)
            patches.hook(compat.attention_of(layer), partial(self._ask, kinds[i], layer))

    def over(self, handler: Handler | None) -> Handler:
        """What an overridden attention module of these layers does; ``handler`` is the engine's."""

        def attend(inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
            forward = self._running()
            echoes = None if forward is None else forward.echoes
            if forward is not None and handler is None and not (self._asking or self._computing):
                forward.reached += forward.cache is not None
            if forward is None or echoes is None:
                return (handler or _plainly)(inner, module, args, kwargs)
            _check_plain(kwargs)
            if self._asking:
                echoes.keys_and_values = args[1], args[2]
                raise _Taken
            if self._computing:
                return _attend(echoes, echoes.own, module, *args[:3], **kwargs)
            echoes.of_rows = args[1], args[2]
            forward.echo_layers += 1
            seen = partial(_attend, echoes, echoes.seen)
            return (handler or _plainly)(seen, module, args, kwargs)

        return attend

    @property
    def _echoes(self) -> Echoes | None:
        """The echoes that the rows of a layer see now; None where a module runs for the echoes."""
        forward = self._running()
        idle = forward is None or self._asking or self._computing
        return None if idle else forward.echoes  # type: ignore[union-attr]

    def _place(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Rotary embeddings are made for rows and echoes together."""
        echoes = self._echoes
        if echoes is None:
            return None
        inputs = compat.named(module, args, kwargs)
        rows, own = inputs["position_ids"], echoes.position_ids
        # Some decoders number text beside time, height and width, and pass on the last three.
        own = own[-len(rows) :] if own.ndim == rows.ndim == 3 else own
        own = own.to(rows.device).expand(*rows.shape[:-2], *own.shape[-2:])
        rows = rows.expand(*own.shape[:-1], -1)
        inputs["position_ids"] = torch.cat([rows, own], -1)
        return (), inputs

    def _placed(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        echoes = self._echoes
        if echoes is None or output is None:
            return None
        kind = compat.named(module, args, kwargs).get("layer_type")
        count = echoes.states.shape[1]
        echoes.rotary[kind] = tuple(x[..., -count:, :] for x in output)
        return tuple(x[..., :-count, :] for x in output)

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A layer with echoes: they come up to it."""
        if (echoes := self._echoes) is not None:
            echoes.rise(compat.named(layer, args, kwargs)["hidden_states"])

    def _ask(self, kind: str, layer: Any, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Its attention module: first for the echoes' keys and values."""
        echoes = self._echoes
        if echoes is None:
            return
        inputs = _for_echoes(echoes, kind, compat.named(module, args, kwargs))
        inputs["hidden_states"] = layer.input_layernorm(echoes.states)
        self._asking = True
        try:
            with _no_queries(module):
                module.forward(**inputs)
        except _Taken:
            return
        finally:
            self._asking = False
        raise compat.unknown(f"{type(module).__name__} did not call its attention function")

    def _leave(
        self,
        kind: str,
        exact: bool,
        top: bool,
        layer: Any,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Behind a layer: where it is exact, it computes the echoes, too; nothing is cached."""
        echoes, forward = self._echoes, self._running()
        if echoes is None or forward is None or output is None:
            return
        forward.exact_layers += exact
        if top:
            assert forward.record is not None
            forward.record.echo_layers = forward.echo_layers
            forward.record.exact_layers = forward.exact_layers
            forward.echoes = None
            return
        if exact:
            inputs = _for_echoes(echoes, kind, compat.named(layer, args, kwargs))
            inputs["hidden_states"] = echoes.states
            self._computing = True
            try:
                made = layer.forward(**inputs)
            finally:
                self._computing = False
            echoes.states, echoes.entered = _hidden(made), _hidden(output)


def _attend(
    echoes: Echoes,
    visible: Visible,
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *_: Any,
    scaling: float | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """An attention function over rows and echoes, of the rows or of the echoes themselves."""
    own = visible is echoes.own
    rows, others = (echoes.of_rows, (keys, values)) if own else ((keys, values), None)
    others = echoes.keys_and_values if others is None else others
    if rows is None or others is None:
        raise compat.unknown(f"{type(module).__name__} attends before its keys are known")
    return visible.attend(query, rows, others, scaling), None


def _plainly(inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
    return inner(module, *args, **kwargs)


def _for_echoes(echoes: Echoes, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a module was called with for the rows, as it is for echoes: without mask and cache."""
    rotary = echoes.rotary.get(kind, echoes.rotary.get(None))
    if rotary is None:
        raise compat.unknown("the decoder made no rotary embeddings in this forward")
    # What layers share, such as keys, must not become that of echoes.
    inputs = {name: dict(x) if isinstance(x, dict) else x for name, x in inputs.items()}
    for name in ("attention_mask", "position_ids", *compat.CACHE_NAMES):
        if name in inputs:
            inputs[name] = None
    if "use_cache" in inputs:
        inputs["use_cache"] = False
    device = echoes.states.device
    inputs["position_embeddings"] = tuple(x.to(device) for x in rotary)
    return inputs


@contextmanager
def _no_queries(module: Any) -> Iterator[None]:
    """Echoes ask nothing: the projection to queries gives zeros, and costs nothing."""
    projection = getattr(module, "q_proj", None)
    width = getattr(projection, "out_features", None)
    if not isinstance(projection, nn.Module) or width is None:
        yield
        return
    with _replaced(projection, lambda x: x.new_zeros(()).expand(*x.shape[:-1], width)):
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a moment, also where the module has one of its own already."""
    values = vars(module)
    before = {name: values[name] for name in ("forward",) if name in values}
    values["forward"] = forward
    try:
        yield
    finally:
        del values["forward"]
        values.update(before)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _part(module: Any, name: str) -> nn.Module:
    part = getattr(module, name, None)
    if not isinstance(part, nn.Module):
        raise UnsupportedError(
            f"{type(module).__name__} has no {name}, by which echoes are placed; use echo=0"
        )
    return part


def _check_exact(layer: nn.Module) -> None:
    """Refuse to compute echoes in layers that are told of each token, beside its state."""
    told = set(inspect.signature(type(layer).forward).parameters) & {"per_layer_input"}
    if told:
        raise UnsupportedError(
            f"{type(layer).__name__} is handed {', '.join(told)}, which merged tokens have not; "
            "use echo_exact=0"
        )


def _check_plain(kwargs: dict[str, Any]) -> None:
    """Refuse attention that is more than a softmax."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"the attention of this decoder has a {name}, which echoes do not know; use echo=0"
            )
