"""Every row is held once, and there are really fewer of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import standin
import tiny
import torch
from support import backends, compressed, families, generate, inputs_of, model_of

from dycoke import DyCoke
from dycoke.core.cache import ROOM

CASES = {
    "one": ([[8]], [(5, 7)]),
    "padded": ([[8], [8], [8]], [(5, 7), (30, 3), (11, 1)]),
}


@families
@backends
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("merge", "prune"), [(0.7, 0.0), (0.0, 0.7), (0.7, 0.7)])
def test_rows_after_prefill_and_bytes(
    family: str, backend: str, case: str, merge: float, prune: float
) -> None:
    inputs = inputs_of(family, *CASES[case])
    model = model_of(family, backend)
    output, run = compressed(model, DyCoke(merge_ratio=merge, prune_ratio=prune), inputs, tokens=1)
    cache, report = output.past_key_values, run.report
    assert report is not None
    batch = len(inputs["input_ids"])
    real = inputs["attention_mask"].sum(1).tolist()
    longest = max(
        n - s.visual_tokens + s.kept_tokens for n, s in zip(real, report.samples, strict=True)
    )
    storages, rows = {}, 0
    full = [cache.layers[i] for i in tiny.FAMILIES[family].full]
    for layer in full:
        for tensor in (layer.keys, layer.values):
            assert tensor.shape[:3:2] == (batch, longest)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            rows += tensor.nbytes
    # The rows, with room for 64 more of each, and nothing beside them.
    assert sum(storages.values()) == rows // longest * (longest + 64)
    # Other layers are those of transformers: states of a fixed size, or a window.
    others = [layer for layer in cache.layers if layer not in full]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(others)
    }
    assert report.kv_bytes == sum(storages.values()) + sum(held.values())
    per_row = sum(2 * t.keys.shape[1] * t.keys.shape[3] * 4 for t in full)
    stock = batch * inputs["input_ids"].shape[1] * per_row
    for layer in others:
        for tensor in tensors_of([layer]):
            # After the prompt a layer with a window still holds all of it, here the shortened one.
            size, window = tensor.untyped_storage().nbytes(), hasattr(layer, "sliding_window")
            stock += size * inputs["input_ids"].shape[1] // longest if window else size
    assert report.kv_bytes_full == stock


def tensors_of(layers: list[Any]) -> list[torch.Tensor]:
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        found += [state for layer in layers for state in getattr(layer, name, {}).values()]
    return [tensor for tensor in found if tensor is not None]


def tensors_in(value: object, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor reachable from an object."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    inner: list[object] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    elif hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    return [t for item in inner for t in tensors_in(item, seen)]


@families
def test_no_second_copy_hides_anywhere(family: str) -> None:
    """All floating storage reachable from cache, run and model hooks is the KV rows themselves."""
    inputs = inputs_of(family, *CASES["one"])
    with DyCoke()(model_of(family)) as run:
        output = generate(model_of(family), inputs)
        assert run.report is not None
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors_in(output.past_key_values, set())
            if t.is_floating_point() and t.ndim > 2
        }
    assert sum(held.values()) == run.report.kv_bytes


@cache
def longest_answer() -> Any:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *CASES["one"])
    return compressed(model, DyCoke(), inputs, tokens=2 * ROOM + 5)[0]


@pytest.mark.parametrize("tokens", [1, 3, ROOM, ROOM + 2, 2 * ROOM + 4])
def test_growth_keeps_the_answer(tokens: int) -> None:
    """Longer answers than the room: the same tokens as with room for everything."""
    model = model_of("llava_onevision")
    inputs = inputs_of("llava_onevision", *CASES["one"])
    output, run = compressed(model, DyCoke(), inputs, tokens=tokens)
    longest = longest_answer()
    total = inputs["input_ids"].shape[1] + tokens
    assert torch.equal(output.sequences, longest.sequences[:, :total])
    assert run.report is not None and run.report.decode_steps == tokens - 1
    rows = sum(x.nbytes for y in output.past_key_values.layers for x in (y.keys, y.values))
    length = output.past_key_values.row_count
    assert rows <= run.report.kv_bytes <= rows // length * (length + ROOM)


@families
@pytest.mark.parametrize("case", CASES)
def test_pruned_layers_see_fewer_keys(family: str, case: str) -> None:
    """The attention function itself is handed only the active rows."""
    inputs = inputs_of(family, *CASES[case])
    standin.CALLS.clear()
    output, run = compressed(model_of(family, standin.NAME), DyCoke(), inputs, tokens=3)
    assert run.report is not None
    keys = {layer: seen for layer, seen in standin.CALLS if layer >= 0}  # of the last step
    cache = output.past_key_values
    full = tiny.FAMILIES[family].full
    rows = cache.row_count
    banks = [s.kept_tokens - s.active_tokens for s in run.report.samples]
    pads = (cache.generation.lower.index < 0).sum(1).tolist()
    hidden = min(b + p for b, p in zip(banks, pads, strict=True))
    assert hidden > 0
    assert [keys[i] for i in full] == [rows] * (len(full) - 2) + [rows - hidden] * 2
