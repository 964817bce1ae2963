"""What the supported versions of transformers call things, asked once and never guessed.

The engine stands on names that transformers may change at any release. Each is looked up here when
a block is entered: where one is gone, entering raises, so that nothing goes on half compressed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers

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
