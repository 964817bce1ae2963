"""What a decode step asks of torch beside what the stock model asks, counted and not timed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
import transformers
from support import generate, inputs_of, model_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

from dycoke import DyCoke
from dycoke.core.engine import Engine


class Count(TorchDispatchMode):
    """Operations since the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps[-1] += 1
        return func(*args, **(kwargs or {}))


class Cut(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, count: Count) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.count.steps.append(0)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def extra(layers: int, threshold: float) -> int:
    """Operations of the sixth token's step, less those of the stock model."""
    model, inputs = tiny.FAMILIES["llava_onevision"].model(layers=layers), ONE
    counts = []
    for settings in (DyCoke(refresh_threshold=threshold), None):
        with Count() as count:
            kept = {"stopping_criteria": [Cut(count)]}
            if settings is None:
                generate(model, inputs, tokens=8, **kept)
            else:
                with settings(model) as run:
                    generate(model, inputs, tokens=8, **kept)
                assert run.report is not None and run.report.engaged
        counts.append(count.steps[5])
    return counts[0] - counts[1]


ONE = inputs_of("llava_onevision", [[7]], [(5, 7)])


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 40), (1.0, 90)])
def test_a_decode_step_costs_the_same_few_operations_at_any_depth(
    threshold: float, most: int
) -> None:
    """Kept selection (0) and a new one in every step (1): no layer adds any."""
    few, many = extra(4, threshold), extra(9, threshold)
    # The oldest supported release makes a mask in each step, which costs the library some more.
    assert 0 < few <= most + (0 if transformers.__version__ >= "5.24" else 20)
    assert many <= few


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="it hands a mask in each step")
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_upper_layers_are_left_to_themselves_where_no_mask_is_handed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them looks; with a mask all attend as told, and so does the next prompt."""
    layers, whole = 9, Engine._attend
    calls = [0]

    def attend(*args: Any) -> Any:
        calls[-1] += 1
        return whole(*args)

    class Count(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(0)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    monkeypatch.setattr(Engine, "_attend", attend)
    model = model_of("llava_onevision", backend, layers=layers)
    padded = inputs_of("llava_onevision", [[7], [7]], [(5, 7), (3, 7)])
    upper, found = layers - 3, []
    with DyCoke()(model):
        for inputs in (ONE, padded, ONE):
            calls[:] = [0]
            generate(model, inputs, tokens=4, stopping_criteria=[Count()])
            found.append(calls[:4])
            stock = copy.deepcopy(model)
            used = {m.config._attn_implementation for m in stock.modules() if hasattr(m, "config")}
            assert used == {backend}
    # The prompt, and three steps. Eager attention is handed a mask that hides nothing.
    alone = [upper, 1, 1, 1] if backend == "sdpa" else [upper] * 4
    assert found == [alone, [upper] * 4, alone]
