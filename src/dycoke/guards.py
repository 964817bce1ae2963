"""What cannot work, refused by name with the way out. Nothing here changes anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dycoke.cache_rules import check_cache
from dycoke.errors import UnsupportedError
from dycoke.layers import FULL, layer_types
from dycoke.method import Method


def check_model(model: Any) -> None:
    for name in ("get_decoder", "config", "base_model"):
        if not hasattr(model, name):
            raise TypeError(
                f"expected a transformers model, got {type(model).__name__} without .{name}"
            )


def check_settings(model: Any, method: Method, rope: str | None) -> None:
    if method.positions == "compact" and rope == "3-D":
        raise UnsupportedError(
            f"positions='compact' renumbers 1-D positions, and {model.base_model.config.model_type} "
            "has 3-D ones; use positions='original'"
        )
    if model.get_decoder().config._attn_implementation == "flex_attention":
        raise UnsupportedError(
            "FlexAttention's block masks cannot follow rows that move; load the model with "
            'attn_implementation="sdpa" (or flash_attention_2, eager)'
        )


def check_attention(decoder: Any, before: str) -> None:
    """Overridden layers would go on with the old implementation, in any forward."""
    now = decoder.config._attn_implementation
    if now != before:
        raise UnsupportedError(
            f"the attention implementation changed from {before!r} to {now!r} "
            "inside the context; change it before entering"
        )


def checked_cache(inputs: dict[str, Any], decoder: Any, method: Method, drops: bool) -> Any:
    """The empty cache to take over; None where one has yet to be made; False without one."""
    cache = inputs.get("past_key_values")
    if cache is not None:
        check_cache(cache)
        return cache
    use_cache = inputs.get("use_cache")
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


def check_go_on(cache: Any, method: Method, mask: Tensor | None, new: int, config: Any) -> None:
    """A cache goes on under equal settings, with a mask over prompt and answer."""
    generation = cache.generation
    if generation.owner != method:
        raise UnsupportedError(
            f"this cache was made with {generation.owner} and cannot go on with {method}"
        )
    total = generation.length + new
    if mask is not None and mask.shape[1] != total:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens where prompt and answer have {total}"
        )
    # Padding between a cached prompt and new tokens: only full attention can look past it.
    if new > 1 and mask is not None and set(layer_types(config)) != {FULL}:
        if not mask[:, -new:].all():
            raise UnsupportedError(
                "padding between a cached prompt and its question: layers with linear attention or "
                "a window take it for tokens; ask questions of one length together, or one by one"
            )
