"""A reversible override of one attention module, and the scores of one query.

The global attention mapping of transformers is not touched but for new keys. A module is
overridden by giving it its own shallow copy of its config that names this key: its siblings, other
models and the code that builds masks keep theirs.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dycoke.compat import unknown
from dycoke.errors import UnsupportedError
from dycoke.patching import Patches

KEY = "dycoke"

# (inner, module, args, kwargs) -> what the attention function returns. `inner` is the function
# that the module would have called; args are query, key, value, attention_mask.
Handler = Callable[[Callable[..., Any], nn.Module, list[Any], dict[str, Any]], Any]


class Override:
    """Routes one attention module's calls through a handler, until ``patches`` are undone."""

    def __init__(self, patches: Patches, module: Any, handler: Handler) -> None:
        self.handler, self.config = handler, module.config
        self.inner = _inner_function(module)
        # Some modules look for "flash" in the name before they pack what they hand over.
        key = f"{KEY}_flash" if "flash" in str(self.config._attn_implementation) else KEY
        if key not in ALL_ATTENTION_FUNCTIONS:
            eagerly: Any = torch.compiler.disable  # a compiled model calls it as it is
            AttentionInterface.register(key, eagerly(_dispatch))
        config = copy.copy(self.config)
        config._attn_implementation_internal = key
        if config._attn_implementation != key:
            raise unknown("a config does not take its attention implementation")
        config.dycoke_override = self
        patches.replace(module, "config", config)

    def call(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own attention function, seeing the module's own config."""
        # FlashAttention reads module.config._attn_implementation to choose its kernel. Past
        # nn.Module's own way of setting attributes, which takes longer than all else here.
        attributes = vars(module)
        ours, attributes["config"] = attributes["config"], self.config
        try:
            return self.inner(module, *args, **kwargs)
        finally:
            attributes["config"] = ours


def attention_of(layer: Any) -> nn.Module:
    """The attention module of a decoder layer."""
    module = getattr(layer, "self_attn", None)
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise UnsupportedError(
            f"{type(layer).__name__} has no attention module `self_attn` with a config; DyCoke "
            "cannot prune there; use prune_ratio=0"
        )
    return module


def _dispatch(module: Any, *args: Any, **kwargs: Any) -> Any:
    override: Override = module.config.dycoke_override
    if len(args) < 3:
        raise unknown(f"{type(module).__name__} passes query, key and value by other names")
    return override.handler(override.call, module, list(args), kwargs)


def _inner_function(module: Any) -> Callable[..., Any]:
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


def query_scores(
    query: Tensor, keys: Tensor, scaling: float | None, key_mask: Tensor | None
) -> Tensor:
    """Attention of one query to all keys, averaged over heads.

    Parameters
    ----------
    query : Tensor, shape (B, H, 1, D)
    keys : Tensor, shape (B, H / G, T, D)
        Grouped heads are shared as in grouped-query attention.
    scaling : float or None
        1 / sqrt(D) where None.
    key_mask : Tensor, bool, shape (B, T), or None
        False hides a key.

    Returns
    -------
    Tensor, shape (B, T)
        Mean over heads of the softmax over keys; float32, or float64 for float64 inputs.
    """
    batch, heads, _, width = query.shape
    groups = keys.shape[1]
    # Half precision would make near-equal scores equal; one query is cheap in float32.
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = width**-0.5 if scaling is None else scaling
    grouped = query.to(dtype).view(batch, groups, heads // groups, width) * scaling
    logits = grouped @ keys.to(dtype).transpose(2, 3)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return logits.softmax(-1).mean((1, 2))


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
    known = getattr(ALL_MASK_ATTENTION_FUNCTIONS, "_global_mapping", None)
    if known is None:
        raise unknown("ALL_MASK_ATTENTION_FUNCTIONS has no _global_mapping")
    make = known.get(implementation)
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
