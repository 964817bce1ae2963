"""Which layers of a decoder score the visual tokens, and which hold rows of their own.

Only full-attention layers can: linear attention keeps no rows, and a sliding window forgets by
itself. Such layers stay as they are, over the shortened prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    echoes, exact : frozenset of int
        Layers in which the frames of a prompt see what was merged away, and those of them that
        compute it.
    """

    kind: Kind
    scoring: int | None
    upper: frozenset[int]
    below: float = 1.0
    echoes: frozenset[int] = frozenset()
    exact: frozenset[int] = frozenset()

    @property
    def late(self) -> bool:
        """Whether the scoring layer is itself an upper one."""
        return self.scoring in self.upper


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


def deepstack_levels(config: Any) -> int:
    """First layers behind which features are added to visual tokens; ``config`` is the model's."""
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


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
        plan = _dropping(config, type(method).__name__, types, max(drop, levels), prunes)
        echoes, exact = _echoes(method, types, min(plan.upper), "drops tokens")
        return replace(plan, echoes=echoes, exact=exact)
    own = len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)
    full = [i for i, kind in enumerate(types) if kind == FULL]
    sources = [i for i in full if i < own]
    scoring = max((i for i in full if i < method.prune_layer), default=full[0] if full else -1)
    last = sources[-1] if len(sources) > 1 else 0
    if prunes:
        _check_pruned(types, method.prune_layer, last)
    upper = frozenset(i for i in full if scoring < min(i, last) and i >= method.prune_layer)
    none: frozenset[int] = frozenset()
    echoes, exact = none, none
    if not method.idle:
        echoes, exact = _echoes(method, types, own, "shares keys of other layers")
    if prunes:
        scoring = _scoring(method, types, sources, scoring)
        return LayerPlan("select", scoring, upper, 1.0, echoes, exact)
    return LayerPlan("none", scoring if sources and trace else None, none, 1.0, echoes, exact)


def _scoring(method: Method, types: list[str], sources: list[int], default: int) -> int:
    """The layer whose attention selects; ``sources`` have full attention and keys of their own."""
    wanted = method.score_layer
    if wanted is None:
        return default
    if isinstance(wanted, float):
        return max((i for i in sources if i <= round(wanted * len(types))), default=sources[0])
    if wanted not in sources:
        raise UnsupportedError(
            f"score_layer={wanted} cannot score: of the decoder's {len(types)} layers "
            f"{', '.join(map(str, sources))} have full attention and keys of their own; choose "
            "one of them, or a share such as 0.6"
        )
    return wanted


def _echoes(
    method: Method, types: list[str], end: int, why: str
) -> tuple[frozenset[int], frozenset[int]]:
    """Which layers see echoes, and which compute them; none from ``end`` on."""
    if method.echo == 0:
        return frozenset(), frozenset()
    top = round(method.echo * len(types))
    layers = [i for i in range(top) if types[i] == FULL]
    if top > end:
        raise UnsupportedError(
            f"echo={method.echo:g} reaches into layer {top - 1} of {len(types)}, and layer {end} "
            f"{why}, where echoes end; use echo={end / len(types):.3g} or less"
        )
    if not layers or method.echo_exact > len(layers):
        raise UnsupportedError(
            f"echo={method.echo:g} is {len(layers)} full-attention layers of this decoder's "
            f"{len(types)}, and echo_exact={method.echo_exact} of them are asked for; use a "
            "larger echo, or echo=0"
        )
    return frozenset(layers), frozenset(layers[: method.echo_exact])


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
