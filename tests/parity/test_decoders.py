"""Decoders whose layers differ, beyond the one that each family's tiny config has."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracle
import pytest
import standin
import tiny
import torch
from support import compressed, exact, generate, inputs_of
from test_parity import alone, ask_oracle, check, settings_of, with_margin

pytestmark = exact

FULL, WINDOW = "full_attention", "sliding_attention"
SHARED = {"layers": 8, "layer_types": [WINDOW, FULL] * 4, "num_kv_shared_layers": 4}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 with windows": (
        "llava_onevision",
        {
            "layer_types": [WINDOW, FULL, WINDOW, FULL, FULL],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "qwen2, windows on top": (
        "llava_onevision",
        {
            "layer_types": [FULL, FULL, FULL, FULL, WINDOW],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "gemma4 with shared keys": ("gemma4", SHARED),
    "gemma4, frames see themselves": ("gemma4", {"use_bidirectional_attention": "vision"}),
    "gemma4, both": ("gemma4", {**SHARED, "use_bidirectional_attention": "vision"}),
    "gemma4, keys are values": ("gemma4", {"attention_k_eq_v": True, "num_kv_shared_layers": 0}),
}
decoders = pytest.mark.parametrize("decoder", DECODERS)
backends = pytest.mark.parametrize("backend", ["sdpa", "eager", standin.NAME])
ratios = pytest.mark.parametrize(("K", "P"), [(0.7, 0.0), (0.7, 0.7)])


@cache
def model_of(decoder: str, backend: str, seed: int) -> Any:
    family, settings = DECODERS[decoder]
    return getattr(tiny, family)(backend, seed=seed, **settings)


def skip_what_stock_cannot(decoder: str, backend: str) -> None:
    if backend == standin.NAME and "gemma4" in decoder:
        if "themselves" in decoder or "both" in decoder:
            pytest.skip("FlashAttention has no mask in which frames see themselves")
        if "shared" in decoder:
            pytest.skip("the stock decoder slices 4-D masks only")


@cache
def single(decoder: str, K: float, P: float, L: int) -> tuple[int, list[oracle.Answer]]:
    family = DECODERS[decoder][0]

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        return [ask_oracle(model_of(decoder, "sdpa", seed), family, inputs, K, P, L)[0]]

    return with_margin(3, attempt)  # type: ignore[no-any-return]


@decoders
@backends
@ratios
@pytest.mark.parametrize("L", [1, 2, 3])
def test_equals_the_oracle(decoder: str, backend: str, K: float, P: float, L: int) -> None:
    skip_what_stock_cannot(decoder, backend)
    family = DECODERS[decoder][0]
    seed, (expected,) = single(decoder, K, P, L)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    output, run = compressed(model_of(decoder, backend, seed), settings_of(K, P, L), inputs)
    check(expected, output, inputs, run.report)


PADDED = [[5, 5], [5], []], [(5, 7), (2, 3), (11, 1)]


@cache
def padded(decoder: str) -> tuple[int, list[oracle.Answer]]:
    family = DECODERS[decoder][0]

    def attempt(seed: int) -> list[oracle.Answer]:
        batch, model = inputs_of(family, *PADDED, seed), model_of(decoder, "sdpa", seed)
        singles = [alone(family, *PADDED, i, batch) for i in (0, 1)]
        return [ask_oracle(model, family, inputs, 0.7, 0.7)[0] for inputs in singles]

    return with_margin(6, attempt)  # type: ignore[no-any-return]


@decoders
@backends
def test_a_left_padded_batch_equals_each_sample_alone(decoder: str, backend: str) -> None:
    skip_what_stock_cannot(decoder, backend)
    seed, answers = padded(decoder)
    batch = inputs_of(DECODERS[decoder][0], *PADDED, seed)
    output, run = compressed(model_of(decoder, backend, seed), settings_of(0.7, 0.7), batch)
    for i, expected in enumerate(answers):
        check(expected, output, batch, run.report, i)


QUESTION = [7, 8, 9, 10]


@cache
def two_turns(decoder: str, K: float, P: float) -> tuple[int, list[oracle.Answer]]:
    family = DECODERS[decoder][0]

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        model = model_of(decoder, "sdpa", seed)
        first, judge = ask_oracle(model, family, inputs, K, P)
        judge.text([judge.pending, *QUESTION])
        return [first, judge.generate(8)]

    return with_margin(7, attempt)  # type: ignore[no-any-return]


@decoders
@backends
@ratios
def test_a_follow_up_turn_equals_the_oracle(decoder: str, backend: str, K: float, P: float) -> None:
    skip_what_stock_cannot(decoder, backend)
    family = DECODERS[decoder][0]
    seed, (first, second) = two_turns(decoder, K, P)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    model = model_of(decoder, backend, seed)
    with settings_of(K, P)(model) as run:
        out = generate(model, inputs)
        longer = torch.cat([out.sequences, torch.tensor([QUESTION])], dim=1)
        follow = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        again = generate(model, follow, past_key_values=out.past_key_values)
    check(first, out, inputs, run.reports[0])
    check(second, again, follow, run.reports[1])
