"""Tokens dropped inside the LLM, against the naive oracle: there they are hidden, here gone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import (
    BACKENDS,
    answer,
    backends,
    close,
    compressed,
    exact,
    generate,
    inputs_of,
    model_of,
    untouched,
)
from test_parity import PADDED, PADDED_TEXT, QUESTION, alone, ask_oracle, check, with_margin
from torch import Tensor

from dycoke import DyCoke, UnsupportedError
from dycoke.compressor import Compressor
from dycoke.core.cache import ROOM
from dycoke.methods.controls import RandomTokens

pytestmark = exact

LAYERS = 5
FULL = [f for f in tiny.FAMILIES if tiny.FAMILIES[f].full == (0, 1, 2, 3, 4)]
OTHERS = [f for f in tiny.FAMILIES if f not in FULL]
families = pytest.mark.parametrize("family", FULL)


@dataclass(frozen=True)
class Best(Compressor):
    """Drops all but the share that the last token attends to most; may average what stays."""

    share: float = 0.4
    layer: int = 3
    mean: bool = False
    idle = False

    def drop_layer(self, layers: int) -> int:
        assert layers == LAYERS
        return self.layer

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        assert below == self.layer / LAYERS
        keep = torch.zeros_like(scores, dtype=torch.bool)
        count = max(1, int(self.share * len(scores)))
        keep[scores.argsort(descending=True)[:count]] = True
        if self.mean:
            states = torch.where(keep[:, None], (states + states[~keep].mean(0)) / 2, states)
        return states, keep


@dataclass(frozen=True)
class Both(RandomTokens):
    """Some tokens leave before the LLM, others inside it."""

    def drop_layer(self, layers: int) -> int:
        return 3

    def drop_tokens(self, scores: Tensor, states: Tensor, below: float) -> tuple[Tensor, Tensor]:
        return Best().drop_tokens(scores, states, below)


def naive(share: float, mean: bool) -> tuple[Any, Any]:
    def choose(scores: Tensor) -> set[int]:
        ranked = sorted(range(len(scores)), key=lambda v: -float(scores[v]))
        return set(ranked[: max(1, int(share * len(scores)))])

    def mix(states: Tensor, left: list[int]) -> Tensor:
        rest = [states[v] for v in range(len(states)) if v not in left]
        states = states.clone()
        for v in left:
            states[v] = (states[v] + sum(rest) / len(rest)) / 2
        return states

    return choose, mix if mean else None


def ask(model: Any, family: str, inputs: Any, method: Best, **options: Any) -> Any:
    drop = (method.layer, *naive(method.share, method.mean))
    return ask_oracle(model, family, inputs, 0, 0, drop=drop, **options)


@cache
def single(family: str, start: int, method: Best) -> tuple[int, list[oracle.Answer]]:
    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        return [ask(model_of(family, seed=seed), family, inputs, method)[0]]

    return with_margin(start, attempt)  # type: ignore[no-any-return]


@families
@backends
@pytest.mark.parametrize("method", [Best(), Best(0.1, 4, mean=True)], ids=["leave", "average"])
def test_dropping_equals_hiding(family: str, backend: str, method: Best) -> None:
    seed, (expected,) = single(family, 5, method)
    inputs, model = inputs_of(family, [[7]], [(5, 7)], seed), model_of(family, backend, seed)
    with untouched(model):
        output, run = compressed(model, method, inputs)
    check(expected, output, inputs, run.report)
    row = run.report.samples[0]
    left = max(1, int(method.share * row.visual_tokens))
    below = method.layer / LAYERS
    assert row.active_tokens == left
    assert row.retention == pytest.approx(below + (1 - below) * left / row.visual_tokens)
    assert run.report.retention == row.retention
    assert run.report.engaged and run.report.decode_steps == 7


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("layer", [1, 2])
def test_early_layers_drop_too(family: str, layer: int) -> None:
    method = Best(layer=layer)
    seed, (expected,) = single(family, 5, method)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    output, run = compressed(model_of(family, seed=seed), method, inputs)
    check(expected, output, inputs, run.report)


def test_features_for_early_layers_need_all_rows() -> None:
    """Qwen3-VL adds features behind its first layers: the door moves above them."""
    model, inputs = model_of("qwen3_vl"), inputs_of("qwen3_vl", [[7]], [(5, 7)])
    levels = len(model.config.vision_config.deepstack_visual_indexes)
    assert levels > 1

    @dataclass(frozen=True)
    class Early(Best):
        def drop_tokens(self, scores: Any, states: Any, below: float) -> Any:
            assert below == levels / LAYERS
            return Best(self.share, levels).drop_tokens(scores, states, below)

    early, run = compressed(model, Early(layer=1), inputs)
    later, _ = compressed(model, Best(layer=levels), inputs)
    assert torch.equal(torch.cat(early.logits), torch.cat(later.logits))
    row = run.report.samples[0]
    share = levels / LAYERS + (1 - levels / LAYERS) * row.active_tokens / row.visual_tokens
    assert row.retention == pytest.approx(share)


@cache
def padded(family: str, kind: str) -> tuple[int, list[oracle.Answer]]:
    videos = PADDED[kind]

    def attempt(seed: int) -> list[oracle.Answer]:
        batch, model = inputs_of(family, videos, PADDED_TEXT, seed), model_of(family, seed=seed)
        return [
            ask(
                model,
                family,
                alone(family, videos, PADDED_TEXT, i, batch),
                Best(),
                videos=counts,
            )[0]
            for i, counts in enumerate(videos)
            if counts
        ]

    return with_margin(6, attempt)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PADDED)
def test_a_padded_batch_equals_each_sample_alone(family: str, backend: str, kind: str) -> None:
    videos = PADDED[kind]
    if kind == "unequal videos" and not tiny.FAMILIES[family].unequal_videos:
        pytest.skip("the stock model takes one tensor of equally long videos")
    seed, answers = padded(family, kind)
    batch = inputs_of(family, videos, PADDED_TEXT, seed)
    source = tiny.FAMILIES[family].frame_source(videos)
    output, run = compressed(model_of(family, backend, seed), Best(), batch, frame_source=source)
    filled = [i for i, counts in enumerate(videos) if counts]
    for i, expected in zip(filled, answers, strict=True):
        check(expected, output, batch, run.report, i)


@families
@pytest.mark.parametrize("backend", ["sdpa"])
def test_a_follow_up_turn_sees_what_was_left(family: str, backend: str) -> None:
    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[7]], [(5, 7)], seed)
        first, judge = ask(model_of(family, seed=seed), family, inputs, Best())
        judge.text([judge.pending, *QUESTION])
        return [first, judge.generate(6)]

    seed, (first, second) = with_margin(7, attempt)
    inputs = inputs_of(family, [[7]], [(5, 7)], seed)
    model = model_of(family, backend, seed)
    with Best()(model) as run:
        out = generate(model, inputs)
        longer = torch.cat([out.sequences, torch.tensor([QUESTION])], dim=1)
        follow = tiny.FAMILIES[family].follow_up(longer)
        again = generate(model, follow, tokens=6, past_key_values=out.past_key_values)
    check(first, out, inputs, run.reports[0])
    check(second, again, follow, run.reports[1])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_merging_before_and_dropping_inside(family: str) -> None:
    """The same as the two one after the other, and rows are really gone."""
    model, inputs = model_of(family), inputs_of(family, [[8], [8]], [(5, 7), (2, 3)])
    output, run = compressed(model, Both(0.5, 0), inputs)
    kept = run.report.samples[0].kept_tokens
    assert kept < run.report.samples[0].visual_tokens
    text = inputs["input_ids"].shape[1] - run.report.samples[0].visual_tokens + 7
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths == [text + kept] * 3 + [text + int(0.4 * kept)] * 2
    layers = output.past_key_values.layers
    row = layers[0].keys[:, :, :1].nbytes + layers[0].values[:, :, :1].nbytes
    assert run.report.kv_bytes == sum(lengths) * row + len(layers) * row * (ROOM - 7)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_ways_of_generating(family: str) -> None:
    """Beams and several answers follow the rows; a cropped cache goes on."""
    model, inputs = model_of(family), inputs_of(family, [[7], [7]], [(5, 7), (2, 3)])
    plain, _ = compressed(model, Best(), inputs)
    once, run = compressed(model, Best(), inputs, num_beams=3, num_return_sequences=2)
    assert len(run.report.samples) == 6 and once.sequences.shape[0] == 4
    torch.manual_seed(0)
    ways: dict[str, Any] = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    several, _ = compressed(model, Best(), inputs, **ways)
    assert torch.equal(several.sequences[::2], plain.sequences)
    with Best()(model), torch.no_grad():
        cache = generate(model, inputs, tokens=4).past_key_values
        question = torch.tensor([[7, 8, 9]] * 2)
        expected = model(input_ids=question, past_key_values=cache).logits
        cache.crop(-3)
        close(model(input_ids=question, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", OTHERS)
def test_other_kinds_of_layers_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match="all layers have full attention"):
        with Best()(model_of(family)):
            pass


def test_what_cannot_work_is_refused() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[7]], [(5, 7)])
    for layer in (0, 5):
        with pytest.raises(UnsupportedError, match=f"in front of layer {layer}"):
            with Best(layer=layer)(model):
                pass
    with pytest.raises(UnsupportedError, match="one or the other"):
        with Both(0.5, 0.5)(model):
            pass
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        compressed(model, Best(), inputs, use_cache=False)
    inputs["input_ids"][0, -6:] = torch.tensor([3, 4, 3, 4, 3, 4])
    with pytest.raises(UnsupportedError, match="prompt-lookup"):
        compressed(model, Best(), inputs, prompt_lookup_num_tokens=3)


def test_a_trace_follows_the_layer_that_decides() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[7]], [(5, 7)])
    with Best()(model, trace=True) as run:
        out = generate(model, inputs)
    sample = run.trace.samples[0]
    assert len(sample.active) == len(sample.attention) == 7
    assert all(int(active.sum()) == int(0.4 * 63) for active in sample.active)
    with DyCoke(0, 0)(model):
        assert answer(generate(model, inputs), inputs) != answer(out, inputs)
