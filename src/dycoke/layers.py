"""Which layers of a decoder score the visual tokens, and which attend to a selection of them.

Only full-attention layers can: linear attention keeps no rows, and a sliding window forgets by
itself. Such layers stay as they are, over the shortened prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dycoke.errors import UnsupportedError

FULL = "full_attention"
KNOWN = (FULL, "sliding_attention", "linear_attention")


@dataclass(frozen=True)
class Plan:
    """What happens where while decoding.

    Attributes
    ----------
    scoring : int or None
        The layer whose attention selects: the last full-attention layer below ``prune_layer``, or
        else the first one. It attends to everything.
    pruned : frozenset of int
        The full-attention layers above it, from ``prune_layer`` on.
    last : int
        The highest ``prune_layer`` that leaves a layer to prune; 0 where none does.
    """

    scoring: int | None
    pruned: frozenset[int]
    last: int


def scaled(layer: int, layers: int) -> int:
    """A layer index stated for 28 layers, as papers on 7B models do, in a decoder of ``layers``."""
    return max(1, round(layer * layers / 28))


def layer_types(config: Any) -> list[str]:
    """The kind of each layer, as transformers names them; ``config`` is the decoder's."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    kind = FULL
    if getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    return [kind] * int(config.num_hidden_layers)


def plan(config: Any, prune_layer: int) -> Plan:
    """Choose the layers for these settings.

    The last ``num_kv_shared_layers`` keep no rows and read those of the last layer of their kind
    before them: what is pruned there is pruned for them.
    """
    types = layer_types(config)
    own = len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)
    full = [i for i, kind in enumerate(types) if kind == FULL]
    sources = [i for i in full if i < own]
    if not sources:
        return Plan(None, frozenset(), 0)
    scoring = max((i for i in full if i < prune_layer), default=full[0])
    pruned = frozenset(i for i in full if scoring < min(i, sources[-1]) and i >= prune_layer)
    return Plan(scoring, pruned, sources[-1] if len(sources) > 1 else 0)


def check_layers(config: Any, prune_layer: int, prunes: bool) -> None:
    """Refuse what cannot be merged, or, where ``prunes`` says so, pruned."""
    types = layer_types(config)
    others = sorted(set(types) - set(KNOWN))
    if others:
        raise UnsupportedError(
            f"the decoder has layers of the kind {', '.join(others)}, and DyCoke knows "
            f"{', '.join(KNOWN)}; this model cannot be compressed yet"
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedError(
            "the decoder attends in both directions, and DyCoke needs one that generates; load a "
            "checkpoint whose config has is_causal"
        )
    last = plan(config, prune_layer).last
    if prunes and last == 0:
        raise UnsupportedError(
            f"the decoder has {types.count(FULL)} full-attention layers among {len(types)}, and "
            "pruning needs one that scores and one that is pruned; use prune_ratio=0"
        )
    if prunes and prune_layer > last:
        raise UnsupportedError(
            f"prune_layer={prune_layer} leaves no layer to prune: the decoder has {len(types)} "
            f"layers; choose 1 to {last}, or prune_ratio=0"
        )
