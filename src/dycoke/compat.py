"""What the supported versions of transformers call things, asked once and never guessed.

The engine stands on names that transformers may change at any release. Each is looked up here when
a block is entered: where one is gone, entering raises, so that nothing goes on half compressed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dycoke.errors import UnsupportedError

TESTED = "5.17 to 5.24"

# The cache's argument, newest name first: transformers 5.24 renamed it, for good in 5.40.
CACHE_NAMES = ("cache", "past_key_values")

# What generate asks of the model, and this library answers for it.
POSITIONS = "_prepare_position_ids_for_generation"
CANDIDATES = "_get_candidate_generator"
BATCHING = "init_continuous_batching"


def unknown(what: str) -> UnsupportedError:
    """The error for a name of transformers that is not where the tested versions have it."""
    return UnsupportedError(
        f"{what}, and without it DyCoke would compress a part only, or nothing; transformers "
        f"{transformers.__version__} is installed, and {TESTED} are tested: install one of these, "
        "or a newer dycoke"
    )


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def parameters(module: Any) -> tuple[str, ...]:
    """The argument names of a module's forward, in order."""
    # Asked of the class where nothing stands in its place: bound methods are new at each look-up.
    if "forward" in vars(module):
        return tuple(inspect.signature(module.forward).parameters)
    return _parameters(type(module).forward)[1:]


def named(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name, as a new dictionary."""
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}


def cache_name(module: Any) -> str:
    """What the forward of ``module`` calls its KV cache, and generate, too."""
    return _first(parameters(module), f"{type(module).__name__}.forward")


def cache_argument(function: Callable[..., Any]) -> str:
    """What a function of transformers calls the KV cache."""
    return _first(tuple(inspect.signature(function).parameters), function.__qualname__)


def _first(known: tuple[str, ...], where: str) -> str:
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise unknown(f"{where} has none of the arguments {', '.join(CACHE_NAMES)}")


def cache_of(values: Mapping[str, Any]) -> Any:
    """The KV cache among arguments or in an output; None where there is none."""
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def chat_prompt(processor: Any, said: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt, as the processor's template has it.

    Parameters
    ----------
    said : a question about one video, which comes first; or the turns of a conversation, each with
        a role and a content of parts such as {"type": "video"} and {"type": "text", "text": ...}.
    """
    turns = said
    if isinstance(said, str):
        content = [{"type": "video"}, {"type": "text", "text": said}]
        turns = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text


def require(module: Any, *names: str) -> None:
    """Raise where the forward of ``module`` has no arguments of these names."""
    missing = sorted(set(names) - set(parameters(module)))
    if missing:
        raise unknown(f"{type(module).__name__}.forward has no argument {', '.join(missing)}")


def check_names(model: Any, base: Any, decoder: Any) -> None:
    """Raise where the model lacks what the engine takes over, before anything is changed."""
    require(decoder, "inputs_embeds", "attention_mask", "position_ids")
    require(base, "input_ids", "attention_mask")
    cache_name(decoder)
    cache_name(base)
    if hasattr(type(model), "generate"):
        for name in (POSITIONS, CANDIDATES):
            if not hasattr(model, name):
                raise unknown(f"generate asks {type(model).__name__} for no {name}")
    if not hasattr(decoder.config, "_attn_implementation_internal"):
        raise unknown("configs have no _attn_implementation_internal")
    if not hasattr(ALL_MASK_ATTENTION_FUNCTIONS, "_global_mapping"):
        raise unknown("ALL_MASK_ATTENTION_FUNCTIONS has no _global_mapping")


def attention_of(layer: Any) -> nn.Module:
    """The attention module of a decoder layer."""
    module = getattr(layer, "self_attn", None)
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise UnsupportedError(
            f"{type(layer).__name__} has no attention module `self_attn` with a config; DyCoke "
            "cannot prune there; use prune_ratio=0"
        )
    return module


def attention_function(module: Any) -> Callable[..., Any]:
    """The attention function this module uses now. "eager" lives beside the module's class."""
    implementation = module.config._attn_implementation
    source = inspect.getmodule(inspect.unwrap(type(module).forward))
    source = source or sys.modules[type(module).__module__]
    eager = getattr(source, "eager_attention_forward", None)
    function: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager
    )
    if function is None:
        raise UnsupportedError(
            f"the attention implementation {implementation!r} of {type(module).__name__} was not "
            'found; load the model with attn_implementation="sdpa"'
        )
    return function


def native_mask(
    implementation: str,
    config: Any,
    query: Tensor,
    q_len: int,
    kv_len: int,
    key_mask: Tensor | None,
) -> Any:
    """A causal mask in the backend's own form (4-D, 2-D or None), made by its own function.

    Parameters
    ----------
    implementation : the backend's name.
    config : the decoder's config.
    query : Tensor, for its batch, dtype and device.
    q_len, kv_len : new tokens, and rows that they may see, themselves included.
    key_mask : Tensor, bool, shape (B, kv_len), or None; False hides a key.
    """
    if key_mask is None and q_len == 1:
        return None
    make = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(implementation)
    if make is None:
        if key_mask is None:
            return None
        raise UnsupportedError(
            f"the attention implementation {implementation!r} has no mask function, and samples "
            "of different length need a mask; register one, or use batches of 1"
        )
    return make(
        batch_size=query.shape[0],
        q_length=q_len,
        kv_length=kv_len,
        q_offset=kv_len - q_len,
        kv_offset=0,
        attention_mask=key_mask,
        allow_is_causal_skip=True,
        dtype=query.dtype,
        config=config,
        use_vmap=False,
        device=query.device,
    )
