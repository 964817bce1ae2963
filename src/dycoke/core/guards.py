"""What cannot work, refused by name with the way out. Nothing here changes anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dycoke.compat import unknown
from dycoke.core.cache import Generation, VideoLayer
from dycoke.core.cache_rules import check_cache
from dycoke.core.forward import Forward
from dycoke.core.layers import FULL, layer_types
from dycoke.core.method import Method
from dycoke.errors import UnsupportedError


def transformers_model(given: Any) -> Any:
    """The transformers model that ``given`` is, or wraps; hooks belong on that one.

    A wrapper (PEFT, DistributedDataParallel, a module of one's own) calls it, so that what is
    hooked inside is what runs.
    """
    if isinstance(given, PreTrainedModel):
        return given
    found = _outermost(given, "") if isinstance(given, nn.Module) else []
    if not found:
        raise TypeError(
            f"expected a transformers model, got {type(given).__name__}; pass the model itself "
            "(of a pipeline or an assistant, its .model)"
        )
    if len(found) > 1:
        models = ", ".join(f".{path} ({type(model).__name__})" for path, model in found)
        raise TypeError(
            f"expected a transformers model, and {type(given).__name__} wraps {len(found)}: "
            f"{models}; pass the one that generates"
        )
    return found[0][1]


def _outermost(module: nn.Module, path: str) -> list[tuple[str, Any]]:
    """The transformers models in a module that are not part of another one."""
    if isinstance(module, PreTrainedModel):
        return [(path.strip("."), module)]
    parts = (_outermost(part, f"{path}.{name}") for name, part in module.named_children())
    return [model for models in parts for model in models]


def check_settings(model: Any, method: Method, rope: str | None) -> None:
    if method.positions == "compact" and rope == "3-D":
        raise UnsupportedError(
            "positions='compact' renumbers 1-D positions, and "
            f"{model.base_model.config.model_type} has 3-D ones; use positions='original'"
        )
    if model.get_decoder().config._attn_implementation == "flex_attention":
        raise UnsupportedError(
            "FlexAttention's block masks cannot follow rows that move; load the model with "
            'attn_implementation="sdpa" (or flash_attention_2, eager)'
        )


def changed_attention(decoder: Any, before: str) -> UnsupportedError:
    """Overridden layers would go on with the old implementation, in any forward."""
    return UnsupportedError(
        f"the attention implementation changed from {before!r} to "
        f"{decoder.config._attn_implementation!r} inside the context; change it before entering"
    )


def checked_cache(
    cache: Any, use_cache: bool | None, decoder: Any, method: Method, drops: bool
) -> Any:
    """The empty cache to take over; None where one has yet to be made; False without one."""
    if cache is not None:
        check_cache(cache)
        return cache
    if decoder.config.use_cache if use_cache is None else use_cache:
        return None
    if method.prune_ratio > 0:
        raise UnsupportedError(
            f"prune_ratio={method.prune_ratio} chooses rows of the KV cache, and "
            "use_cache=False has none; drop use_cache=False, or use prune_ratio=0"
        )
    if drops:
        raise UnsupportedError(
            f"{type(method).__name__} would drop other tokens in every step, since "
            "use_cache=False reads the whole prompt again; drop use_cache=False"
        )
    return False


def checked_mask(mask: Any, given: dict[str, Any] | None) -> Tensor | None:
    """The 2-D mask of a forward, or None; else an error. ``given`` is what the model received."""
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


def check_go_on(
    generation: Generation, method: Method, mask: Tensor | None, new: int, config: Any
) -> None:
    """A cache goes on under equal settings, with a mask over prompt and answer."""
    if generation.method != method:
        raise UnsupportedError(
            f"this cache was made with {generation.method} and cannot go on with {method}"
        )
    total = generation.length + new
    if mask is not None and mask.shape[1] != total:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens where prompt and answer have {total}"
        )
    # Padding between a cached prompt and new tokens: only full attention can look past it.
    if new == 1 or mask is None or set(layer_types(config)) == {FULL}:
        return
    if not mask[:, -new:].all():
        raise UnsupportedError(
            "padding between a cached prompt and its question: layers with linear attention or "
            "a window take it for tokens; ask questions of one length together, or one by one"
        )


def not_taken(decoder: Any, forward: Forward, overridden: int) -> UnsupportedError | None:
    """The error where the decoder went another way than through cache and overridden modules."""
    who, cache, reached = type(decoder).__name__, forward.cache, forward.reached
    assert cache is not None
    layer, rows = cache.layers[cache.generation.counting], cache.generation.lower.index.shape[1]
    if layer.keys is None:
        held = 0
    elif isinstance(layer, VideoLayer):
        held = layer.keys.shape[2]  # its own count is what was planned
    else:
        held = layer.get_seq_length()  # one with a window holds fewer
    if forward.prefill and held != rows:
        return unknown(f"{who} did not fill the cache that it was handed")
    if reached != overridden:
        return unknown(
            f"{reached} of {overridden} attention modules of {who} called the attention function "
            "of their config"
        )
    return None
