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


def test_echoes_and_a_late_score_equal_a_plain_sum() -> None:
    n, d, m, layers, tokens, echo, exact, frames = 600, 64, 96, 6, 5, 3, 1, 20
    echoes, seen = 400, costs.seen_share(frames, 4)
    assert seen == 5 / 20 and costs.seen_share(3, 4) == 1
    more = 0.0
    for layer in range(echo):
        more += 2 * echoes * d * d  # keys and values
        more += n * (echoes * seen) * d * 2  # scores and their product with values
        if layer < exact:
            more += 2 * echoes * d * d + 2 * echoes * d * m  # queries, outputs, an MLP
            more += echoes * (n + echoes * seen) * d * 2
    plain = costs.flops(1000, d, m, layers, 0.6, 0.3, tokens)
    ours = costs.flops(
        1000,
        d,
        m,
        layers,
        0.6,
        0.3,
        tokens,
        echo_layers=echo,
        exact_layers=exact,
        seen=seen,
        scores_late=True,
    )
    assert ours.prefill - plain.prefill == pytest.approx(more, rel=1e-12)
    assert ours.decode - plain.decode == pytest.approx(tokens * n * d, rel=1e-12)
    with pytest.raises(ValueError, match="exact_layers=4 must not be above echo_layers=3"):
        costs.flops(10, 10, 10, 10, echo_layers=3, exact_layers=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seen", 1.5),
        ("echo_layers", -1),
        ("retention", 0),
        ("retention", 1.1),
        ("prune_ratio", 1),
        ("new_tokens", -1),
    ],
)
def test_bad_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        costs.flops(10, 10, 10, 10, **{name: value})  # type: ignore[arg-type]
