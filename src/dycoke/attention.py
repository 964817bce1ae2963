"""A reversible override of one attention module, and the scores of one query.

The global attention mapping of transformers is not touched but for new keys. A module is
overridden by giving it its own shallow copy of its config that names this key: its siblings, other
models and the code that builds masks keep theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dycoke.compat import attention_function, unknown
from dycoke.patching import Patches

KEY = "dycoke"
OVERRIDE = "dycoke_override"

# (inner, module, args, kwargs) -> what the attention function returns. `inner` is the function
# that the module would have called; args are query, key, value, attention_mask.
Handler = Callable[[Callable[..., Any], nn.Module, list[Any], dict[str, Any]], Any]


class Override:
    """Routes one attention module's calls through a handler, until ``patches`` are undone.

    ``packed`` has modules that take packed sequences hand over all of them at once, whatever their
    attention function is, together with where each starts (``cu_seq_lens_q``).
    """

    def __init__(
        self, patches: Patches, module: Any, handler: Handler, packed: bool = False
    ) -> None:
        self.handler, self.config = handler, module.config
        self.inner = attention_function(module)
        # Some modules look for "flash" in the name before they pack what they hand over.
        self.flash = "flash" in str(self.config._attn_implementation)
        key = f"{KEY}_flash" if self.flash or packed else KEY
        # FlashAttention reads module.config._attn_implementation to choose its kernel.
        blind = self.config._attn_implementation in ("sdpa", "eager")
        self.call = self.inner if blind else self._as_itself
        if key not in ALL_ATTENTION_FUNCTIONS:
            eagerly: Any = torch.compiler.disable  # a compiled model calls it as it is
            AttentionInterface.register(key, eagerly(_dispatch))
        self.ours = copy.copy(self.config)
        self.ours._attn_implementation_internal = key
        if self.ours._attn_implementation != key:
            raise unknown("a config does not take its attention implementation")
        self.attributes = vars(module)  # past nn.Module's own way of setting them, which is slow
        patches.replace(module, "config", self.ours)
        patches.replace(module, OVERRIDE, self)

    def lift(self, away: bool) -> None:
        """Let the module call its own attention function for now, or the handler again."""
        self.attributes["config"] = self.config if away else self.ours

    def _as_itself(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own attention function, seeing the module's own config."""
        self.lift(True)
        try:
            return self.inner(module, *args, **kwargs)
        finally:
            self.lift(False)


def _dispatch(module: Any, *args: Any, **kwargs: Any) -> Any:
    override: Override = vars(module)[OVERRIDE]  # looked up past nn.Module, in every layer and step
    if len(args) < 3:
        raise unknown(f"{type(module).__name__} passes query, key and value by other names")
    given = list(args) if len(args) > 3 else [*args, kwargs.pop("attention_mask", None)]
    return override.handler(override.call, module, given, kwargs)


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
    grouped = query.to(dtype).reshape(batch * groups, heads // groups, width) * scaling
    logits = grouped.bmm(keys.to(dtype).flatten(0, 1).transpose(1, 2)).view(batch, heads, -1)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None], -torch.inf)
    return logits.softmax(-1).mean(1)
