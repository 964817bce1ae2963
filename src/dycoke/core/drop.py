"""Drop visual tokens inside the LLM, once, at prefill.

The lower layers hold every row of the shortened prompt, the upper ones only what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dycoke.attention import query_scores
from dycoke.compat import unknown
from dycoke.core.cache_rules import DycokeCache
from dycoke.core.forward import Forward
from dycoke.core.method import Method
from dycoke.core.prefill import row_map
from dycoke.errors import UnsupportedError


def last_token_scores(
    query: Tensor, keys: Tensor, scaling: float | None, key_mask: Tensor | None
) -> Tensor:
    """Attention of each prompt's last real token, (B, H, R, D) queries -> (B, R)."""
    if key_mask is None:
        newest = query[:, :, -1:]
    else:
        last = (key_mask.long() * torch.arange(key_mask.shape[1], device=key_mask.device)).argmax(1)
        newest = query[torch.arange(len(last), device=query.device), :, last.to(query.device)]
        newest = newest[:, :, None]
    return query_scores(newest, keys, scaling, key_mask)


def drop_inside(
    method: Method, forward: Forward | None, named: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """An upper layer's inputs without the rows that leave at prefill; None where none leave.

    ``named`` tells the inputs by name, and is not asked in a decode step: there it would cost.
    """
    if forward is None or forward.cache is None or not forward.prefill:
        return None
    inputs = dict(named())
    if forward.source is None:
        forward.source = drop_rows(method, inputs, forward.scores, forward.cache)
    shorten_layer(inputs, forward.source, forward.cache.generation.lower.index.shape[1])
    return inputs


def drop_rows(
    method: Method, inputs: dict[str, Any], scores: Tensor | None, cache: DycokeCache
) -> Tensor:
    """Ask the method what leaves, sample by sample, and tell the cache.

    Parameters
    ----------
    inputs : of the first upper layer; its hidden_states (B, R, D) become those that go on,
        (B, R', D), with what the method averaged.
    scores : Tensor, (B, R): attention of the last token in the layer below.

    Returns
    -------
    Tensor, long, (B, R'): the rows that stay, right-aligned.
    """
    if scores is None:
        raise unknown("the scoring layer was not reached before the first upper one")
    hidden, below = inputs["hidden_states"], cache.generation.record.below
    generation, device = cache.generation, hidden.device
    visual, index = generation.visual, generation.lower.index
    scores, states = scores.to(device), hidden
    stays = index.to(device) >= 0
    active = torch.zeros_like(visual.valid)
    for b, valid in enumerate(visual.valid):
        rows = generation.lower_rows[b][valid].to(device)
        if not len(rows):
            continue
        own = hidden[b, rows]
        merged, keep = method.drop_tokens(scores[b, rows], own, below)
        if merged is not own:
            states = states.clone() if states is hidden else states
            states[b, rows] = merged
        stays[b, rows] = keep
        active[b, valid] = keep.to(active.device)
    lengths = stays.sum(1).tolist()  # the one wait for the device
    longest = max(lengths)
    source = stays.byte().sort(dim=1, stable=True).indices[:, -longest:]
    real = stays.gather(1, source).to(index.device)
    index = torch.where(real, index.gather(1, source.to(index.device)), -1)
    first = [longest - n for n in lengths]
    cache.drop(row_map(index, first, any(first)), active)
    inputs["hidden_states"] = states.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))
    return source


def shorten_layer(inputs: dict[str, Any], source: Tensor, rows: int) -> None:
    """Cut what a decoder layer is handed beside its hidden states, in place.

    ``rows`` is what there was a row for before. Masks are the attention override's business.
    """
    for name, value in inputs.items():
        if name in ("hidden_states", "attention_mask"):
            continue
        if name == "position_embeddings":  # cosine and sine, (..., B or 1, R, D)
            inputs[name] = tuple(_gathered(x, source, x.ndim - 2) for x in value)
        elif name == "position_ids" and isinstance(value, Tensor):  # (..., B or 1, R)
            inputs[name] = _gathered(value, source, value.ndim - 1)
        elif isinstance(value, Tensor) and rows in value.shape[:2]:
            raise UnsupportedError(
                f"decoder layers are handed {name!r}, with a row per token, which DyCoke does not "
                "know how to shorten; use a method that works before the LLM"
            )


def _gathered(values: Tensor, source: Tensor, dim: int) -> Tensor:
    """The rows ``source`` (B, R') of ``values``, whose dimension ``dim`` counts rows.

    The dimension before it is the batch, or 1.
    """
    source, batch = source.to(values.device), len(source)
    shape = list(values.shape)
    shape[dim - 1] = batch
    values = values.expand(shape)
    index = source.view([1] * (dim - 1) + [batch, -1] + [1] * (values.ndim - dim - 1))
    shape[dim] = source.shape[1]
    return values.gather(dim, index.expand(shape))
