"""The FLOPs formula against the paper's table and a plain sum."""

from __future__ import annotations

import pytest

from dycoke import costs

TABLE = {
    "7B": [41.4, 30.8, 24.2, 17.9],
    "72B": [436.2, None, 262.4, 197.2],
    "0.5B": [3.5, 2.4, 1.8, 1.3],
}


@pytest.mark.parametrize("size", TABLE)
def test_the_papers_column(size: str) -> None:
    for setting, expected in zip(costs.PAPER_SETTINGS, TABLE[size], strict=True):
        if expected is not None:
            assert round(costs.paper_setting(size, setting).total / 1e12, 1) == expected


def test_equals_a_plain_sum() -> None:
    n, d, m, layers, tokens, r, p = 1000, 64, 96, 3, 17, 0.6, 0.3
    kept = n * r
    prefill = layers * (4 * kept * d * d + 2 * kept * kept * d + 2 * kept * d * m)
    decode = 0.0
    for i in range(tokens):
        decode += layers * (4 * d * d + 2 * d * m + 2 * (kept * (1 - p) + i) * d)
    result = costs.flops(n, d, m, layers, r, p, tokens)
    assert result.prefill == pytest.approx(prefill, rel=1e-12)
    assert result.decode == pytest.approx(decode, rel=1e-12)
    assert result.total == result.prefill + result.decode


@pytest.mark.parametrize(
    ("name", "value"),
    [("retention", 0), ("retention", 1.1), ("prune_ratio", 1), ("new_tokens", -1)],
)
def test_bad_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        costs.flops(10, 10, 10, 10, **{name: value})  # type: ignore[arg-type]
