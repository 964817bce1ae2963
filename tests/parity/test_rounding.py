"""What rounding makes of a tiny model: far less than `ROUNDING` in float64; and in the precisions
that users have, DyCoke adds no more than the stock model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from support import (
    BACKENDS,
    ROUNDING,
    answer,
    compressed,
    families,
    generate,
    in_float64,
    inputs_of,
    model_of,
)
from test_parity import RATIOS, ask_oracle, settings_of, with_margin

from dycoke import DyCoke

MULTIPLE = 10  # of what the stock model differs from itself
FLOOR = 1e-6  # where that is next to nothing by chance


def single(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The same weights and pixels in another precision."""
    converted = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return copy.deepcopy(model).to(dtype), converted


@families
def test_in_float64_a_stock_model_hardly_differs_from_itself(family: str) -> None:
    """Alone and in a batch, by each attention function, token by token and at once."""
    with in_float64(), torch.no_grad():
        inputs = inputs_of(family, [[6]], [(5, 7)])
        batch = inputs_of(family, [[6], [6]], [(5, 7), (5, 7)])
        model = model_of(family)
        # `whole` has no pixels for a placeholder that is generated.
        no_video: dict[str, Any] = {"suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}
        true = generate(model, inputs, **no_video)
        step_by_step = torch.cat(true.logits)
        others = [
            generate(model_of(family, backend), inputs, **no_video).logits for backend in BACKENDS
        ]
        others.append([step[:1] for step in generate(model, batch, **no_video).logits])
        whole = dict(inputs, input_ids=true.sequences[:, :-1])
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in whole:
            kinds = whole["mm_token_type_ids"]
            new = whole["input_ids"].shape[1] - kinds.shape[1]
            whole["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, new))
        others.append(model(**whole).logits[0, -8:])
        noise = max((torch.cat([*x]).view(8, -1) - step_by_step).abs().max() for x in others)
    model, inputs = single(model, inputs, torch.float32)
    rounded = torch.cat(generate(model, inputs).logits)[:1].double() - step_by_step[:1]
    assert 0 < noise < ROUNDING / 1000
    assert rounded.abs().max() > 10 * ROUNDING  # what anything left in float32 would show


@families
@pytest.mark.parametrize(("K", "P"), RATIOS)
def test_in_float32_the_same_decisions_and_the_same_noise(family: str, K: float, P: float) -> None:
    found: list[Any] = []

    def attempt(seed: int) -> Any:
        with in_float64():
            model, inputs = model_of(family, seed=seed), inputs_of(family, [[7]], [(5, 7)], seed)
            expected, _ = ask_oracle(model, family, inputs, K, P)
        model, inputs = single(model, inputs, torch.float32)
        rounded, _ = ask_oracle(model, family, inputs, K, P)
        true, other = (torch.stack(a.logits).double() for a in (expected, rounded))
        noise = float((true - other).abs().max())
        same = (rounded.ids, rounded.keep, rounded.active) == (
            expected.ids,
            expected.keep,
            expected.active,
        )
        expected.margins.values.append(0.0 if not same else expected.margins.least - noise)
        found[:] = [model, inputs, true, noise]
        return [expected]

    _, (expected,) = with_margin(2, attempt)
    model, inputs, true, noise = found
    output, run = compressed(model, settings_of(K, P), inputs)
    assert output.logits[0].dtype == torch.float32
    assert answer(output, inputs)[0] == expected.ids
    difference = (torch.cat(output.logits).double() - true).abs().max()
    assert difference < max(FLOOR, MULTIPLE * noise)
    row = run.report.samples[0]
    assert (row.refreshes, row.recalled_tokens) == (expected.refreshes, expected.recalled)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Counts are the same, and where nothing is dropped, so is the noise of the first token."""
    with in_float64():
        model, inputs = model_of(family), inputs_of(family, [[7]], [(5, 7)])
        true = generate(model, inputs, tokens=1).logits[0]
        _, run = compressed(model, DyCoke(), inputs, tokens=3)
    model, inputs = single(model, inputs, dtype)
    output, half = compressed(model, DyCoke(), inputs, tokens=3)
    assert torch.isfinite(torch.cat(output.logits)).all()
    for name in ("visual_tokens", "kept_tokens", "active_tokens"):
        assert getattr(half.report.samples[0], name) == getattr(run.report.samples[0], name)
    if len(tiny.FAMILIES[family].full) == 5:  # states of linear attention stay in float32
        assert half.report.kv_bytes == run.report.kv_bytes * dtype.itemsize // 8
    stock = generate(model, inputs, tokens=1).logits[0].double()
    nothing = DyCoke(merge_ratio=0, prune_ratio=1e-9)
    ours = compressed(model, nothing, inputs, tokens=1)[0].logits[0].double()
    noise = (stock - true).abs().max()
    assert (ours - true).abs().max() < MULTIPLE * noise
