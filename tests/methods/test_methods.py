"""Every method over every family: identity at ratio 0, true counts, restored on exit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    answer,
    close,
    compressed,
    exact,
    families,
    generate,
    inputs_of,
    model_of,
    untouched,
)

from dycoke import DyCoke, UnsupportedError, methods
from dycoke.compressor import Compressor
from dycoke.methods import METHODS
from dycoke.methods.composed import Composed
from dycoke.models import family_of

pytestmark = exact

NAMES = [name for name in METHODS if name != "full"]
FRAMES = 8
names = pytest.mark.parametrize("name", NAMES)
EXACT = ("dycoke", "random", "merging", "once", "always")


def plain(name: str, ratio: float) -> Compressor:
    """A method that prunes nothing while decoding."""
    method = methods.create(name, retention=1 - ratio)
    assert method is not None
    if isinstance(method, DyCoke):
        method = type(method).from_dict({**method.to_dict(), "prune_ratio": 0})
    return method


def drops(method: Compressor) -> bool:
    return method.drop_layer(5) is not None


def applies(name: str, family: str, model: Any) -> bool:
    method = plain(name, 0.5)
    if drops(method) and tiny.FAMILIES[family].full != (0, 1, 2, 3, 4):
        return False
    if method.echo_exact and family == "gemma4":  # its layers are handed more than states
        return False
    if name == "downsampled" and family in ("video_llama_3", "gemma4"):
        return False  # whose layouts do not know the grid of frames that are no squares
    return not method.needs_vision or bool(family_of(model.config).vision_attention)


@cache
def stock(family: str) -> Any:
    return generate(model_of(family), inputs_of(family, [[FRAMES]], [(5, 7)]), tokens=4)


@families
@names
def test_ratio_zero_is_the_identity(family: str, name: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[FRAMES]], [(5, 7)])
    output, run = compressed(model, plain(name, 0), inputs, tokens=4)
    assert not run.report.engaged
    assert answer(output, inputs) == answer(stock(family), inputs)
    assert torch.equal(torch.cat(output.logits), torch.cat(stock(family).logits))


@families
@names
@pytest.mark.parametrize("ratio", [0.5, 0.85])
def test_counts_are_true_and_near_the_budget(family: str, name: str, ratio: float) -> None:
    model, inputs = model_of(family), inputs_of(family, [[FRAMES]], [(5, 7)])
    method = plain(name, ratio)
    with untouched(model):
        if not applies(name, family, model):
            with pytest.raises(UnsupportedError):
                compressed(model, method, inputs, tokens=3)
            return
        output, run = compressed(model, method, inputs, tokens=3)
    report = run.report
    (row,) = report.samples
    assert str(report).startswith(f"{type(method).__name__}: {FRAMES} frames")
    assert report.engaged and row.visual_tokens == FRAMES * tiny.FAMILIES[family].tokens_per_frame
    # What was really held: the rows of every layer that keeps some.
    text = inputs["input_ids"].shape[1] - row.visual_tokens + 2
    cache = output.past_key_values
    held = [cache.layers[i].keys.shape[2] - text for i in tiny.FAMILIES[family].full]
    held = [count for count in held if count >= 0]
    assert row.kept_tokens == held[0] and row.active_tokens == held[-1]
    if drops(method):
        assert row.retention == pytest.approx(sum(held) / len(held) / row.visual_tokens)
    else:
        assert set(held) == {row.kept_tokens}
        assert row.retention == row.kept_tokens / row.visual_tokens

    asked = (1 - ratio) * row.visual_tokens
    mean = row.retention * row.visual_tokens
    if name in EXACT:
        assert mean == int(asked + 1e-6)
    elif name == "fewer-frames":
        tokens = row.visual_tokens // FRAMES
        assert mean % tokens == 0 and max(asked - tokens, tokens) <= mean <= max(asked, tokens)
    elif drops(method) and name == "fastv" and ratio > 0.8:
        assert row.active_tokens == 1  # the layers below alone hold more than that
    elif name == "holitom":  # what stands still merges, be the budget larger or not
        assert 0 < mean <= asked + FRAMES
    else:
        assert abs(mean - asked) <= FRAMES


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
@names
def test_a_batch_equals_its_samples(family: str, name: str) -> None:
    """Nothing of one video reaches another one."""
    videos = [[5], [5]] if not tiny.FAMILIES[family].unequal_videos else [[5], [3]]
    if family == "internvl":
        videos = [[5], [5]]
    text = [(5, 7), (2, 3)]
    from test_parity import alone

    model, batch = model_of(family), inputs_of(family, videos, text, seed=4)
    method = plain(name, 0.5)
    together, run = compressed(model, method, batch, tokens=3)
    for i in range(2):
        single = alone(family, videos, text, i, batch)
        one, other = compressed(model, method, single, tokens=3)
        assert other.report.samples[0].kept_tokens == run.report.samples[i].kept_tokens
        for a, b in zip(one.logits, together.logits, strict=True):
            close(a[0], b[i])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@names
def test_a_one_shot_method_with_a_dynamic_cache(family: str, name: str) -> None:
    """Its tokens, and DyCoke's selection among them at each step."""
    before = plain(name, 0.5)
    if drops(before):
        with pytest.raises(ValueError, match="inside the LLM"):
            Composed(before)
        return
    model, inputs = model_of(family), inputs_of(family, [[FRAMES]], [(5, 7)])
    after = DyCoke(merge_ratio=0, prune_ratio=0.6, prune_layer=2, refresh_threshold=1)
    composed = Composed(before, after)
    alone, _ = compressed(model, before, inputs, tokens=6)
    output, run = compressed(model, composed, inputs, tokens=6)
    (row,) = run.report.samples
    assert row.active_tokens == int(0.4 * row.kept_tokens + 1e-6)
    assert row.refreshes == 4
    # The first token comes from the same prefill.
    assert torch.equal(output.logits[0], alone.logits[0])
    assert not torch.equal(output.logits[3], alone.logits[3])
    there = dict(run.report.settings["before"])
    assert METHODS[there.pop("method")].kind is type(before) and there == before.to_dict()
    assert Composed.from_dict(composed.to_dict()) == composed
    unpruned, _ = compressed(model, Composed(before, DyCoke(0, 0)), inputs, tokens=6)
    assert torch.equal(torch.cat(unpruned.logits), torch.cat(alone.logits))


def test_what_cannot_be_composed() -> None:
    with pytest.raises(ValueError, match=r"merge_ratio=0\.7 would say nothing"):
        Composed(plain("random", 0.5), DyCoke())
    with pytest.raises(ValueError, match="while decoding"):
        Composed(DyCoke())
    with pytest.raises(ValueError, match="unknown method 'Nothing'"):
        Composed.from_dict({"before": {"method": "Nothing"}, "after": {}})


def test_settings_by_name_come_to_a_method() -> None:
    """As a command, a request and the page give them."""
    default = methods.create("dycoke+")
    choose, plus = methods.choose, DyCoke.plus
    assert choose({"merge_ratio": 0.5}, default) == plus(merge_ratio=0.5)
    assert choose({"method": "dycoke", "echo": 0.5}, default) == DyCoke(echo=0.5)
    assert choose({"method": "dycoke+", "retention": 0.5}) == plus(token_budget=0.5)
    assert choose({"retention": 0.5, "prune_ratio": 0}) == DyCoke(token_budget=0.5, prune_ratio=0)
    assert choose({}) == choose({"off": False, "echo": None}) == DyCoke()
    assert choose({}, default) == default
    assert choose({"method": "full"}, default) is None
    assert choose({"off": True}, default) is None
    composed = choose({"method": "visionzip+dycoke", "retention": 0.5})
    assert composed == methods.create("visionzip+dycoke", retention=0.5)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"method": "full", "echo": 0.5}, "the full model .* has no settings; drop echo"),
        ({"method": "full", "retention": 0.5}, "drop retention"),
        ({"method": ["dycoke"]}, "method must be a name, got"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"off": True, "echo": 1}, "off must be true, alone"),
        ({"off": 1}, "off must be true, alone"),
        ({"retention": 0.5, "merge_ratio": 0.5}, "retention and merge_ratio both say"),
        ({"method": "visionzip", "retention": 0.5, "ratio": 0.5}, "retention and ratio both say"),
        ({"method": "visionzip", "prune_ratio": 0}, "VisionZip has no setting 'prune_ratio'"),
        ({"retention": "much"}, "retention"),
    ],
)
def test_settings_that_no_method_takes(named: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        methods.choose(named, DyCoke.plus())


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["keep", "mean", "compact", 10**400, -1, 0.5]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # Of a busy machine.
@given(st.data())
def test_whatever_is_given_is_a_method_or_a_refusal(data: st.DataObject) -> None:
    """Nothing else comes out of it, and what comes out can be a key."""
    name = data.draw(st.sampled_from([*methods.METHODS, "visionzip+", "visionzip+dycoke", "a+b"]))
    method = None if name == "a+b" else methods.create(name)
    known = ["retention", *(() if method is None else sorted(method.setting_names()))]
    settings = data.draw(st.dictionaries(st.sampled_from(known), ODD, max_size=3))
    try:
        made = methods.choose({"method": name, **settings})
    except (TypeError, ValueError):
        return
    assert hash(made) == hash(methods.choose({"method": name, **settings}))
