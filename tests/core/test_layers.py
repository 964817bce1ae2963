"""Which layers score and which hold rows of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dycoke import DyCoke, UnsupportedError
from dycoke.core.layers import LayerPlan, layer_types, plan_layers
from dycoke.methods import FastV

F, S, L = "full_attention", "sliding_attention", "linear_attention"


def config(types: list[str] | None = None, **kwargs: Any) -> Any:
    return SimpleNamespace(
        layer_types=types, num_hidden_layers=len(types) if types else 3, **kwargs
    )


def selected(scoring: int, *upper: int) -> LayerPlan:
    return LayerPlan("select", scoring, frozenset(upper))


@pytest.mark.parametrize(
    ("types", "shared", "prune_layer", "expected"),
    [
        ([F] * 5, 0, 3, selected(2, 3, 4)),
        ([F] * 5, 0, 4, selected(3, 4)),
        ([F] * 5, 0, 9, "9 leaves no layer to prune.* 1 to 4"),
        # Qwen3.5: no full layer below 3, so the first one scores.
        ([L, L, L, F] * 3, 0, 3, selected(3, 7, 11)),
        ([L, L, L, F] * 3, 0, 6, selected(3, 7, 11)),
        ([L, L, L, F] * 3, 0, 8, selected(7, 11)),
        # Layers that share rows are pruned where their source is, and only there.
        ([S, F] * 4, 4, 2, selected(1, 3, 5, 7)),
        ([S, F] * 4, 4, 4, "4 leaves no layer to prune.* 1 to 3"),
        ([S, F] * 2, 2, 1, "2 full-attention layers among 4.*needs one that scores"),
        ([S] * 4, 0, 1, "0 full-attention layers among 4"),
        ([L, F, L], 0, 1, "1 full-attention layers among 3"),
    ],
)
def test_plans(types: list[str], shared: int, prune_layer: int, expected: Any) -> None:
    settings, decoder = DyCoke(prune_layer=prune_layer), config(types, num_kv_shared_layers=shared)
    if isinstance(expected, LayerPlan):
        assert plan_layers(decoder, settings, 0, False) == expected
    else:
        with pytest.raises(UnsupportedError, match=expected):
            plan_layers(decoder, settings, 0, False)


def test_without_pruning_a_layer_scores_for_the_trace_alone() -> None:
    merging = DyCoke(prune_ratio=0)
    assert plan_layers(config([F] * 5), merging, 0, False) == LayerPlan("none", None, frozenset())
    assert plan_layers(config([F] * 5), merging, 0, True) == LayerPlan("none", 2, frozenset())
    # Where no layer can score there is nothing to trace, and nothing to refuse.
    assert plan_layers(config([S] * 4), merging, 0, True) == LayerPlan("none", None, frozenset())


def test_layers_that_go_on_without_dropped_rows() -> None:
    method = FastV(0.75)
    expected = LayerPlan("drop", 1, frozenset(range(2, 28)), 2 / 28)
    assert plan_layers(config([F] * 28), method, 0, False) == expected
    # Features that early layers add (deepstack) need all rows.
    expected = LayerPlan("drop", 4, frozenset(range(5, 28)), 5 / 28)
    assert plan_layers(config([F] * 28), method, 5, False) == expected
    with pytest.raises(UnsupportedError, match="FastV drops tokens inside the LLM"):
        plan_layers(config([L, F] * 14), method, 0, False)
    with pytest.raises(UnsupportedError, match="needs one below and one above"):
        plan_layers(config([F] * 2), method, 2, False)


def test_decoders_that_cannot_be_merged_are_refused() -> None:
    for decoder, words in (
        (config([F] * 4, is_causal=False), "in both directions"),
        (config(attention_chunk_size=8), "chunked_attention"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            plan_layers(decoder, DyCoke(prune_layer=2), 0, False)
        idle = DyCoke(merge_ratio=0, prune_ratio=0)
        assert plan_layers(decoder, idle, 0, False).kind == "none"


def test_kinds_that_a_config_does_not_list() -> None:
    assert layer_types(config()) == [F] * 3
    assert layer_types(config(sliding_window=None)) == [F] * 3
    assert layer_types(config(sliding_window=8)) == [S] * 3
    assert layer_types(config(attention_chunk_size=8)) == ["chunked_attention"] * 3
