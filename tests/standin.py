"""A stand-in for FlashAttention: takes the 2-D mask, returns no weights, aligns bottom-right.

What works through it does not lean on 4-D masks or attention weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "standin"
CALLS: list[tuple[int, int]] = []  # (layer index, keys seen), where a test asks for them


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    # The implementation's own name, not ours: FlashAttention chooses its kernel by it.
    assert module.config._attn_implementation == NAME
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2])
    CALLS.append((getattr(module, "layer_idx", -1), key.shape[2]))
    heads = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
    scaling = kw.get("scaling") or query.shape[-1] ** -0.5
    weights = (query * scaling) @ key.transpose(2, 3)
    queries, keys = weights.shape[-2:]
    if module.is_causal and queries > 1:
        future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        weights = weights.masked_fill(future, -torch.inf)
    if kw.get("sliding_window") is not None:
        passed = torch.ones(queries, keys, dtype=torch.bool)
        passed = passed.tril(keys - queries - kw["sliding_window"])
        weights = weights.masked_fill(passed, -torch.inf)
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask[:, None, None].bool(), -torch.inf)
    weights = weights.softmax(-1).nan_to_num()  # a padding row sees nothing
    return (weights @ value).transpose(1, 2).contiguous(), None


def mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Any = None, **kw: Any
) -> Tensor | None:
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
