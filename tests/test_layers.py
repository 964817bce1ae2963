"""Which layers score and which are pruned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dycoke.layers import Plan, check_layers, layer_types, plan

from dycoke.errors import UnsupportedError

F, S, L = "full_attention", "sliding_attention", "linear_attention"


def config(types: list[str] | None = None, **kwargs: Any) -> Any:
    return SimpleNamespace(
        layer_types=types, num_hidden_layers=len(types) if types else 3, **kwargs
    )


@pytest.mark.parametrize(
    ("types", "shared", "prune_layer", "expected"),
    [
        ([F] * 5, 0, 3, Plan(2, frozenset({3, 4}), 4)),
        ([F] * 5, 0, 4, Plan(3, frozenset({4}), 4)),
        ([F] * 5, 0, 9, Plan(4, frozenset(), 4)),
        # Qwen3.5: no full layer below 3, so the first one scores.
        ([L, L, L, F] * 3, 0, 3, Plan(3, frozenset({7, 11}), 11)),
        ([L, L, L, F] * 3, 0, 6, Plan(3, frozenset({7, 11}), 11)),
        ([L, L, L, F] * 3, 0, 8, Plan(7, frozenset({11}), 11)),
        # Layers that share rows are pruned where their source is, and only there.
        ([S, F] * 4, 4, 2, Plan(1, frozenset({3, 5, 7}), 3)),
        ([S, F] * 4, 4, 4, Plan(3, frozenset(), 3)),
        ([S, F] * 4, 4, 6, Plan(5, frozenset(), 3)),
        ([S, F] * 2, 2, 1, Plan(1, frozenset(), 0)),
        ([S] * 4, 0, 1, Plan(None, frozenset(), 0)),
        ([L, F, L], 0, 1, Plan(1, frozenset(), 0)),
    ],
)
def test_plans(types: list[str], shared: int, prune_layer: int, expected: Plan) -> None:
    assert plan(config(types, num_kv_shared_layers=shared), prune_layer) == expected


def test_a_decoder_that_does_not_generate_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="in both directions"):
        check_layers(config([F] * 4, is_causal=False), 2, prunes=False)


def test_kinds_that_a_config_does_not_list() -> None:
    assert layer_types(config()) == [F] * 3
    assert layer_types(config(sliding_window=None)) == [F] * 3
    assert layer_types(config(sliding_window=8)) == [S] * 3
    assert layer_types(config(attention_chunk_size=8)) == ["chunked_attention"] * 3
