"""Rows that move: exchanges lose nothing, and the cache refuses what it cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, families, generate, inputs_of, model_of
from transformers import DynamicCache

from dycoke import DyCoke, UnsupportedError
from dycoke.core.cache import ROOM, Generation
from dycoke.core.cache_rules import adopt
from dycoke.core.positions import offset_after
from dycoke.core.prefill import arrange
from dycoke.core.records import Record
from dycoke.core.selection import top_mask

pytestmark = exact


def cache_of(batch: int = 2, tokens: int = 20, prune: float = 0.6, seed: int = 0):
    """A cache of 4 layers, pruned from layer 2 on, filled with one prompt; and its rows."""
    g = torch.Generator().manual_seed(seed)
    pads = torch.tensor([0, 4, 2][:batch])
    mask = torch.arange(tokens) >= pads[:, None]
    video = mask.clone()
    video[:, :6] = video[:, -3:] = False
    rows = arrange(torch.ones_like(mask), video, mask, prune)
    generation = Generation(
        method=DyCoke(),
        kind="select",
        prompt=torch.arange(tokens).expand(batch, -1),
        prompt_length=tokens,
        length=tokens,
        lower=rows.lower,
        upper=rows.upper,
        visual=rows.visual,
        lower_rows=rows.lower_rows,
        upper_rows=rows.upper_rows,
        dropped=rows.dropped[:, -1],
        offset=offset_after(None, mask, torch.empty(batch, tokens, 0)),
        record=Record("DyCoke", {}, [[] for _ in range(batch)]),
        open=True,
    )
    cache = DynamicCache()
    adopt(cache, generation, {2, 3}, 4)
    prompt = [torch.randn(2, batch, 3, tokens, 5, generator=g) for _ in range(4)]
    for i, (k, v) in enumerate(prompt):
        cache.update(k, v, i)
    cache.settle()
    return cache, prompt


def append(cache: Any, new: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A forward that adds these rows (B, heads, T, D) to every layer; what each attends to."""
    cache.begin(new.shape[2], decode=True)
    views = [cache.update(new, -new, i) for i in range(4)]
    cache.generation.length += new.shape[2]
    return views


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_rows_survive_any_number_of_exchanges_bit_for_bit(batch: int, seed: int) -> None:
    cache, prompt = cache_of(batch, seed=seed)
    g = torch.Generator().manual_seed(seed)
    generation = cache.generation
    left = came = 0
    for _ in range(25):
        visual = generation.visual
        before = visual.active
        scores = torch.rand(visual.valid.shape, generator=g).masked_fill(~visual.valid, -torch.inf)
        chosen = top_mask(scores, visual.counts)
        recalled = cache.select(chosen)
        assert torch.equal(recalled, (chosen & ~before).sum(1))
        left, came = left + int((before & ~chosen).sum()), came + int(recalled.sum())
        for i, (keys, values) in enumerate(prompt):
            layer = cache.layers[i]
            for b in range(batch):
                index = (generation.upper if i >= 2 else generation.lower).index[b]
                assert sorted(index.tolist()) == generation.lower.index[b].tolist()
                real = index >= 0
                assert torch.equal(layer.keys[b][:, real], keys[b][:, index[real]])
                assert torch.equal(layer.values[b][:, real], values[b][:, index[real]])
                # The active tokens, and no others, stand from `first` on among the visual rows.
                count = int(visual.counts[b])
                view = index[generation.upper.first[b] : generation.upper.first[b] + count].tolist()
                tokens = [
                    int(generation.lower.index[b, generation.lower_rows[b, v]])
                    for v in chosen[b].nonzero()[:, 0]
                ]
                if i >= 2:
                    assert sorted(view) == sorted(tokens)
    assert left == came > 0


def test_a_decode_step_takes_one_contiguous_view() -> None:
    cache, _ = cache_of(batch=1)
    new = torch.randn(1, 3, 1, 5)
    for i, (keys, values) in enumerate(append(cache, new)):
        start = cache.generation.upper.start if i >= 2 else 0
        assert (start > 0) == (i >= 2)
        assert keys.data_ptr() == cache.layers[i].keys[:, :, start:].data_ptr()
        assert keys.shape[2] == 21 - start
        assert torch.equal(keys[:, :, -1], new[:, :, 0])
        assert torch.equal(values[:, :, -1], -new[:, :, 0])
    # Several tokens see everything.
    assert [keys.shape[2] for keys, _ in append(cache, torch.randn(1, 3, 2, 5))] == [23] * 4


def test_a_forward_that_failed_leaves_no_row() -> None:
    """An exception came between two layers; the next forward writes where that one did."""
    cache, prompt = cache_of(batch=1)
    first, second = torch.randn(2, 1, 3, 1, 5)
    cache.begin(1, decode=True)
    cache.update(first, first, 0)
    append(cache, second)
    for layer, (keys, _) in zip(cache.layers, prompt, strict=True):
        assert layer.keys.shape[2] == cache.row_count == keys.shape[2] + 1
        assert torch.equal(layer.keys[:, :, -1:], second)


@pytest.mark.parametrize("size", [1, 3 * 20 * 5 * 8 * 3, 2**26])
def test_layers_share_tables_of_a_bounded_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, three, or all of the layers' keys and values in a table: the same rows."""
    monkeypatch.setattr("dycoke.core.cache_rules.TABLE", size)
    cache, prompt = cache_of(batch=1)
    assert len(cache.tables) == {1: 8, 2**26: 2}.get(size, 4)
    new = torch.randn(1, 3, ROOM + 5, 5)
    append(cache, new)
    for i, (keys, values) in enumerate(prompt):
        rows = cache.generation.upper if i >= 2 else cache.generation.lower
        expected = keys[:, :, rows.index[0]], values[:, :, rows.index[0]]
        assert torch.equal(cache.layers[i].keys, torch.cat([expected[0], new], 2))
        assert torch.equal(cache.layers[i].values, torch.cat([expected[1], -new], 2))


def test_logical_and_physical_length() -> None:
    cache, _ = cache_of(batch=1)
    cache.generation.length = cache.generation.prompt_length = 1000
    assert cache.get_seq_length() == 1000
    assert cache.get_query_offset(0) == 20
    assert cache.get_mask_sizes(3, 0) == (23, 0)


def test_crop_forgets_text_only() -> None:
    cache, _ = cache_of(batch=2)
    for _ in range(2):
        append(cache, torch.randn(2, 3, 1, 5))
    cache.crop(0)
    cache.crop(torch.tensor(-2))  # transformers 5.17 hands a tensor
    assert cache.get_seq_length() == 20
    assert cache.layers[3].keys.shape[2] == 20
    cache.crop(-3)  # the prompt's own text after the video
    assert cache.get_seq_length() == 17
    assert cache.layers[0].keys.shape[2] == cache.layers[3].keys.shape[2] == 17
    with pytest.raises(UnsupportedError, match="reaches into the video"):
        cache.crop(-1)
    with pytest.raises(UnsupportedError, match="as a negative number"):
        cache.crop(5)


@families
def test_a_copied_cache_goes_on_by_itself(family: str) -> None:
    """Two questions on copies of one cache answer as each alone."""
    model, inputs = model_of(family), inputs_of(family, [[7]], [(5, 7)])

    def ask(cache: object, first: torch.Tensor, question: list[int]) -> torch.Tensor:
        longer = torch.cat([first, torch.tensor([question])], 1)
        follow = tiny.FAMILIES[family].follow_up(longer)
        return generate(model, follow, past_key_values=cache).sequences

    with DyCoke()(model) as run:
        start = generate(model, inputs, tokens=2)
        copies = [copy.deepcopy(start.past_key_values) for _ in range(3)]
        a = ask(copies[0], start.sequences, [3, 4, 5])
        b = ask(copies[1], start.sequences, [40, 41])
        again = ask(copies[2], start.sequences, [3, 4, 5])
        assert torch.equal(a, again)
        alone = ask(start.past_key_values, start.sequences, [40, 41])
    assert torch.equal(b, alone)
    assert len(run.reports) == 5
    assert len({id(r) for r in run.reports}) == 5
    assert [r.decode_steps for r in run.reports] == [1, 7, 7, 7, 7]


@families
def test_what_a_cache_refuses(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[4]], [(5, 7)])
    output, _ = compressed(model, DyCoke(), inputs, tokens=2)
    cache = output.past_key_values
    layer = cache.layers[tiny.FAMILIES[family].full[0]]
    for call in (cache.reset, layer.reset, layer.offload):
        with pytest.raises(UnsupportedError, match="DyCoke cache cannot"):
            call()


def test_linear_layers_cannot_forget() -> None:
    model, inputs = model_of("qwen3_5"), inputs_of("qwen3_5", [[4]], [(5, 7)])
    output, _ = compressed(model, DyCoke(prune_ratio=0), inputs, tokens=2)
    cache = output.past_key_values
    assert not cache.is_croppable
    length = cache.get_seq_length()
    cache.crop(0)
    with pytest.raises(UnsupportedError, match="linear attention layers cannot forget"):
        cache.crop(-1)
    assert cache.get_seq_length() == length


def test_a_window_cannot_give_back_what_it_forgot() -> None:
    model, inputs = model_of("gemma4"), inputs_of("gemma4", [[4]], [(5, 7)])
    output, _ = compressed(model, DyCoke(prune_ratio=0), inputs, tokens=2)
    cache = output.past_key_values
    rows, length = cache.row_count, cache.get_seq_length()
    cache.crop(0)
    with pytest.raises(UnsupportedError, match="a sliding window of 16 have forgotten"):
        cache.crop(-1)
    assert (cache.row_count, cache.get_seq_length()) == (rows, length)


@families
def test_copied_and_chosen_rows_of_the_batch_go_on_alike(family: str) -> None:
    """In every layer, those with states instead of rows, too."""
    model = model_of(family)
    inputs = inputs_of(family, [[5], [5]], [(5, 7), (2, 3)])
    with DyCoke()(model), torch.no_grad():
        first = generate(model, inputs, tokens=2)
        new = torch.tensor([[3], [4]])
        copied, chosen = (copy.deepcopy(first.past_key_values) for _ in range(2))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2).long()], 1)
        places = mask.sum(1, keepdim=True) - 1
        step = {"input_ids": new, "attention_mask": mask, "position_ids": places}
        plain = model(**step, past_key_values=first.past_key_values).logits
        copied.batch_repeat_interleave(2)
        repeated = {k: v.repeat_interleave(2, 0) for k, v in step.items()}
        twice = model(**repeated, past_key_values=copied).logits
        chosen.batch_select_indices(torch.tensor([1]))
        picked = {k: v[1:] for k, v in step.items()}
        one = model(**picked, past_key_values=chosen).logits
    close(twice, plain.repeat_interleave(2, 0))
    close(one, plain[1:])


@families
def test_a_refused_use_changes_nothing(family: str) -> None:
    """Outside the context: linear layers would take the new tokens into their states."""
    model, inputs = model_of(family), inputs_of(family, [[5]], [(5, 7)])
    places = inputs["attention_mask"].sum(1, keepdim=True)
    step = {"input_ids": torch.tensor([[3]]), "position_ids": places}
    with DyCoke()(model), torch.no_grad():
        caches = [generate(model, inputs, tokens=1).past_key_values for _ in range(2)]
        expected = model(**step, past_key_values=caches[0]).logits
    with torch.no_grad(), pytest.raises(UnsupportedError, match="inside the `with` block"):
        model(**step, past_key_values=caches[1])
    with DyCoke()(model), torch.no_grad():
        assert torch.equal(model(**step, past_key_values=caches[1]).logits, expected)
