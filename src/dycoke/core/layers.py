"""Which layers of a decoder score the visual tokens, and which hold rows of their own.

Only full-attention layers can: linear attention keeps no rows, and a sliding window forgets by
itself. Such layers stay as they are, over the shortened prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dycoke.core.method import Method
from dycoke.errors import UnsupportedError

FULL = "full_attention"
Kind = Literal["none", "select", "drop"]
KNOWN = (FULL, "sliding_attention", "linear_attention")


@dataclass(frozen=True)
class LayerPlan:
    """What each decoder layer does.

    Attributes
    ----------
    kind : "none", "select" or "drop"
        Whether the layers of ``upper`` have no rows of their own, attend to a selection of the
        visual rows while decoding, or lost rows at prefill.
    scoring : int or None
        The layer whose attention decides; it attends to everything. None where none has to.
    upper : frozenset of int
        Layers above it whose rows are not those of the layers below, the lower ones.
    below : float
        Share of the layers that hold every visual row which entered the LLM.
    """

    kind: Kind
    scoring: int | None
    upper: frozenset[int]
    below: float = 1.0


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


def plan_layers(config: Any, method: Method, levels: int, trace: bool) -> LayerPlan:
    """Choose the layers for these settings, or say why they do not fit this decoder.

    Parameters
    ----------
    config : the decoder's.
    levels : first layers behind which features are added to visual tokens (deepstack): these need
        all rows.
    trace : whether scores are wanted even where nothing is pruned.

    Notes
    -----
    The last ``num_kv_shared_layers`` keep no rows and read those of the last layer of their kind
    before them: what is pruned there is pruned for them.
    """
    types, prunes = layer_types(config), method.prune_ratio > 0
    drop = None
    if not method.idle:
        _check(config, types)
        drop = method.drop_layer(len(types))
    if drop is not None:
        return _dropping(config, type(method).__name__, types, max(drop, levels), prunes)
    own = len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)
    full = [i for i, kind in enumerate(types) if kind == FULL]
    sources = [i for i in full if i < own]
    scoring = max((i for i in full if i < method.prune_layer), default=full[0] if full else -1)
    last = sources[-1] if len(sources) > 1 else 0
    if prunes:
        _check_pruned(types, method.prune_layer, last)
    upper = frozenset(i for i in full if scoring < min(i, last) and i >= method.prune_layer)
    scores = sources and trace
    if prunes:
        return LayerPlan("select", scoring, upper)
    return LayerPlan("none", scoring if scores else None, frozenset())


def _dropping(config: Any, name: str, types: list[str], drop: int, prunes: bool) -> LayerPlan:
    if prunes:
        raise UnsupportedError(
            f"{name} drops tokens inside the LLM and selects while decoding: a method does one or "
            "the other; use prune_ratio=0"
        )
    if set(types) != {FULL} or getattr(config, "num_kv_shared_layers", None):
        raise UnsupportedError(
            f"{name} drops tokens inside the LLM, which works where all layers have full attention "
            f"and keys of their own; this decoder has {', '.join(sorted(set(types)))}: use a "
            "method that works before the LLM (`dycoke methods`)"
        )
    if not 1 <= drop < len(types):
        raise UnsupportedError(
            f"{name} drops tokens in front of layer {drop}, and the decoder has {len(types)} "
            "layers: it needs one below and one above"
        )
    return LayerPlan("drop", drop - 1, frozenset(range(drop, len(types))), drop / len(types))


def _check(config: Any, types: list[str]) -> None:
    """Refuse what cannot be merged."""
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


def _check_pruned(types: list[str], prune_layer: int, last: int) -> None:
    """Refuse what cannot be pruned; ``last`` is the highest layer that can be, or 0."""
    if last == 0:
        raise UnsupportedError(
            f"the decoder has {types.count(FULL)} full-attention layers among {len(types)}, and "
            "pruning needs one that scores and one that is pruned; use prune_ratio=0"
        )
    if prune_layer > last:
        raise UnsupportedError(
            f"prune_layer={prune_layer} leaves no layer to prune: the decoder has {len(types)} "
            f"layers; choose 1 to {last}, or prune_ratio=0"
        )
