"""Scores of a layer that is pruned itself: what it would attend to if it saw everything."""

from __future__ import annotations

from torch import Tensor, nn

from dycoke.attention import query_scores
from dycoke.core.drop import last_token_scores
from dycoke.core.forward import Forward


def late_scores(
    forward: Forward, module: nn.Module, query: Tensor, keys: Tensor, scaling: float | None
) -> Tensor:
    """Attention of each sample's newest token to all its visual tokens, (B, V); 0 for padding.

    The attention module was called with ``keys``: those of the whole prompt, in its order, at
    prefill; later the view of a decode step, in place of which all rows of the cache are scored.

    Parameters
    ----------
    query : Tensor, (B, H, Q, D)
    keys : Tensor, (B, G, T, D)
    """
    cache = forward.cache
    assert cache is not None
    generation = cache.generation
    if forward.prefill:
        rows, places = generation.lower, generation.lower_rows
        mask = rows.key_mask(forward.attention_mask, keys.shape[2], query.device, decode=False)
        scores = last_token_scores(query, keys, scaling, mask)
    else:
        rows, places = generation.upper, generation.upper_rows
        keys = cache.layers[module.layer_idx].keys
        mask = rows.key_mask(forward.attention_mask, keys.shape[2], query.device, decode=False)
        # Padding between a cached prompt and a question stands in front of it: the last is real.
        scores = query_scores(query[:, :, -1:], keys, scaling, mask)
    return scores.to(places.device).gather(1, places).masked_fill(~generation.visual.valid, 0)
