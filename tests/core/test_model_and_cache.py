"""What a model, its copies and its caches go through: wrappers, saving, modes, changed names."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import tiny
import torch
from support import families, generate, inputs_of, model_of, untouched
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

import dycoke
from dycoke import DyCoke, UnsupportedError
from dycoke.compat import CACHE_NAMES, cache_name, cache_of
from dycoke.core.cache import ROOM
from dycoke.core.records import held_bytes
from dycoke.methods import HoliTom
from dycoke.vision.chunks import encode_in_chunks

ONE = ([[7]], [(5, 7)])


class Forwarding(nn.Module):
    """A wrapper that calls an inner module and answers for it, as PEFT and others do."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["name"] = name
        self._modules[name] = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self.__dict__["name"]], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self.name](*args, **kwargs)  # type: ignore[misc]


class Pair(nn.Module):
    def __init__(self, main: nn.Module, draft: nn.Module) -> None:
        super().__init__()
        self.main, self.draft = main, draft


@families
def test_a_wrapped_model_is_compressed_as_the_bare_one(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    with DyCoke()(model) as run:
        bare = generate(model, inputs)
    assert run.report is not None
    for wrapped in (
        Forwarding(model, "module"),
        Forwarding(Forwarding(model, "model"), "base_model"),
    ):
        with untouched(model), DyCoke()(wrapped) as own:
            output = generate(wrapped, inputs)
        assert torch.equal(output.sequences, bare.sequences)
        assert own.report == run.report
        assert "generate" not in vars(wrapped)


def test_what_is_no_model_or_several_is_refused() -> None:
    model = model_of("llava_onevision")
    with pytest.raises(TypeError, match="got str; pass the model itself"):
        dycoke.apply("llava", DyCoke())
    with pytest.raises(TypeError, match=r"wraps 2: \.main .*, \.draft .*the one that generates"):
        dycoke.apply(Pair(model, model_of("qwen2_vl")), DyCoke())


def test_a_block_whose_model_did_not_run_says_so() -> None:
    """The wrapper's own generate answers with another model than the one it holds."""
    model, other = model_of("llava_onevision"), model_of("llava_onevision", seed=1)
    inputs = inputs_of("llava_onevision", *ONE)

    class Elsewhere(Forwarding):
        def generate(self, **kwargs: Any) -> Any:
            return other.generate(**kwargs)

    with DyCoke()(Elsewhere(model, "model")) as run:
        wrapper = run._engine.given
        generate(wrapper, inputs)
        assert run.report is not None and not run.report.engaged
        assert "Elsewhere.generate() ran, and none of its forwards" in str(run.report.reason)
        generate(model, inputs)
        assert run.report.engaged


# Copies and pickles of a model


@pytest.mark.parametrize("settings", [DyCoke(), HoliTom(0.5)], ids=str)
def test_a_copy_of_a_compressed_model_is_a_stock_model(settings: Any) -> None:
    model, inputs = tiny.FAMILIES["llava_onevision"].model(), inputs_of("llava_onevision", *ONE)
    full = generate(copy.deepcopy(model), inputs)
    run = dycoke.apply(model, settings)
    with encode_in_chunks(model, 2):
        pickled = io.BytesIO()
        torch.save(model, pickled)
        pickled.seek(0)
        copies = [
            copy.deepcopy(model),
            copy.deepcopy(Forwarding(model, "model")).model,
            torch.load(pickled, weights_only=False),
        ]
    dycoke.remove(model)
    assert "__reduce_ex__" not in vars(model)
    for twin in copies:
        for (name, ours), theirs in zip(twin.named_modules(), model.modules(), strict=True):
            assert set(vars(ours)) == set(vars(theirs)), name
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                assert len(getattr(ours, hooks)) == len(getattr(theirs, hooks)) == 0, name
        assert torch.equal(generate(twin, inputs).logits[-1], full.logits[-1])
        assert run.reports == []
        dycoke.remove(twin)  # nothing to remove
        with settings(twin) as own:
            generate(twin, inputs)
        assert own.report is not None and own.report.engaged


def test_a_copy_keeps_the_users_own_hooks_and_methods() -> None:
    model = tiny.FAMILIES["qwen2_5_vl"].model()
    model.register_forward_pre_hook(_users_hook)
    model.model.get_video_features = functools.partial(model.model.get_video_features)
    with DyCoke()(model), encode_in_chunks(model, 2):
        twin = copy.deepcopy(model)
    assert list(twin._forward_pre_hooks.values()) == [_users_hook]
    assert isinstance(vars(twin.model)["get_video_features"], functools.partial)


def test_a_copy_of_a_compiled_model_is_a_stock_model() -> None:
    """The class of compiled models says itself what a copy is made from."""
    model, inputs = tiny.FAMILIES["llava_onevision"].model(), inputs_of("llava_onevision", *ONE)
    full = generate(model, inputs)
    compiled = torch.compile(model, backend="eager")
    with DyCoke()(compiled) as run:
        twin = copy.deepcopy(compiled)
        assert torch.equal(generate(twin, inputs).logits[-1], full.logits[-1])
        assert run.reports == []


def _users_hook(module: Any, args: Any) -> None:
    return None


# Caches


@families
def test_a_saved_cache_goes_on(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    with DyCoke()(model):
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        follow = tiny.FAMILIES[family].follow_up(ids)
        cache = cache_of(first)
        saved = io.BytesIO()
        torch.save(cache, saved)
        saved.seek(0)
        loaded = [torch.load(saved, weights_only=False), pickle.loads(pickle.dumps(cache))]
        expected = generate(model, follow, **{cache_name(model.get_decoder()): cache})
        for other in loaded:
            got = generate(model, follow, **{cache_name(model.get_decoder()): other})
            assert torch.equal(got.sequences, expected.sequences)
            for a, b in zip(got.logits, expected.logits, strict=True):
                assert torch.equal(a, b)


@families
@pytest.mark.parametrize("settings", [DyCoke(), DyCoke(prune_ratio=0)], ids=["pruned", "merged"])
def test_turns_in_any_mode_answer_alike(family: str, settings: DyCoke) -> None:
    """A cache that torch.inference_mode() filled goes on outside of it, and the other way."""
    model, inputs = model_of(family), inputs_of(family, *ONE)

    def turns(first: Any, second: Any, third: Any) -> Any:
        with first:
            output = generate(model, inputs)
        for mode, text in ((second, [5, 6, 7]), (third, [8, 9])):
            ids = torch.cat([output.sequences, torch.tensor([text])], 1)
            follow = tiny.FAMILIES[family].follow_up(ids)
            with mode:
                cache = {cache_name(model.get_decoder()): cache_of(output)}
                output = generate(model, follow, tokens=4, **cache)
        return output

    no_grad, inference = torch.no_grad, torch.inference_mode
    with settings(model):
        expected = turns(no_grad(), no_grad(), no_grad())
        for modes in ((inference, no_grad, inference), (no_grad, inference, no_grad)):
            got = turns(*(mode() for mode in modes))
            assert torch.equal(got.sequences, expected.sequences)
            assert torch.equal(got.logits[-1], expected.logits[-1])


@families
def test_a_cache_that_grew_in_inference_mode_goes_on_outside(family: str) -> None:
    """It began outside: what the mode made is the buffers of a turn longer than the room left."""
    model, inputs = model_of(family), inputs_of(family, *ONE)
    name = cache_name(model.get_decoder())
    words: dict[str, Any] = {"suppress_tokens": [tiny.VIDEO, tiny.IMAGE]}
    answers = []
    with DyCoke()(model):
        for mode in (torch.no_grad, torch.inference_mode):
            output = generate(model, inputs, **words)
            for inside, text in ((mode, [5] * (ROOM + 9)), (torch.no_grad, [8, 9])):
                ids = torch.cat([output.sequences, torch.tensor([text])], 1)
                follow = tiny.FAMILIES[family].follow_up(ids)
                with inside():
                    cache = {name: cache_of(output)}
                    output = generate(model, follow, tokens=4, **cache, **words)
            answers.append(output)
    assert torch.equal(answers[1].logits[-1], answers[0].logits[-1])


@pytest.mark.parametrize("tokens", [1, 2, 9])
@families
def test_the_full_cache_of_a_report_is_what_a_stock_one_holds(family: str, tokens: int) -> None:
    """Also right after a prompt, of which a layer with a window still holds everything."""
    model, inputs = model_of(family), inputs_of(family, *ONE)
    source = tiny.FAMILIES[family].frame_source(ONE[0])
    stock = cache_of(generate(model, inputs, tokens))
    with DyCoke()(model, frame_source=source) as run:
        ours = cache_of(generate(model, inputs, tokens))
    assert run.report is not None and run.report.engaged
    assert run.report.kv_bytes == held_bytes(ours)
    assert run.report.kv_bytes_full == held_bytes(stock)


# Generations inside generations


class Contrast(LogitsProcessor):
    """Runs the model on a second prompt between the steps, and leaves the scores alone."""

    def __init__(self, model: Any, inputs: dict[str, Any], generate: bool = False) -> None:
        self.model, self.inputs, self.cache, self.generate = model, inputs, None, generate

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.generate:
            generate(self.model, self.inputs, tokens=2)
            return scores
        if self.cache is None:
            output = self.model(**self.inputs, use_cache=True)
        else:
            name = cache_name(self.model.get_decoder())
            output = self.model(input_ids=input_ids[:, -1:], **{name: self.cache})
        self.cache = cache_of(output)
        return scores


def text_only() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("second", ["text", "video", "generate"])
def test_the_report_is_of_the_generation_that_was_asked_for(tokens: int, second: str) -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    other = text_only() if second == "text" else inputs_of("llava_onevision", [[3]], [(4, 2)])
    with DyCoke()(model, trace=True) as run:
        alone = generate(model, inputs, tokens=tokens)
        expected, trace = run.report, run.trace
        contrast = Contrast(model, other, generate=second == "generate")
        both = generate(
            model, inputs, tokens=tokens, logits_processor=LogitsProcessorList([contrast])
        )
        report, own = run.report, run.trace
    assert torch.equal(both.sequences, alone.sequences)
    assert report == expected
    assert trace is not None and own is not None
    assert len(own.samples[0].active) == len(trace.samples[0].active) == tokens - 1
    assert len(run.reports) == 2 + (tokens if second == "generate" else 1)
    assert run.reports[2].engaged == (second != "text")


def test_guidance_reports_the_video() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with DyCoke()(model, trace=True) as run:
        generate(model, inputs, guidance_scale=1.7)
    assert run.report is not None and run.report.engaged
    assert run.report.decode_steps == 7
    assert run.trace is not None and len(run.trace.samples[0].active) == 7


def test_guidance_without_a_cache_is_two_reports() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with DyCoke(prune_ratio=0)(model) as run:
        generate(
            model,
            inputs,
            tokens=5,
            guidance_scale=1.7,
            negative_prompt_ids=torch.tensor([[3, 4, 5]]),
            use_cache=False,
        )
    assert [(r.engaged, r.decode_steps) for r in run.reports] == [(True, 4), (False, 4)]
    assert run.report == run.reports[0]


def test_a_prompt_one_token_longer_is_a_generation_of_its_own() -> None:
    """Without a cache the length is all that tells a step from a prompt, but within a call."""
    model = model_of("llava_onevision")
    with DyCoke(prune_ratio=0)(model) as run:
        for after in (7, 8):
            inputs = inputs_of("llava_onevision", [[7]], [(5, after)])
            generate(model, inputs, tokens=1, use_cache=False)
    assert [r.decode_steps for r in run.reports] == [0, 0]


def test_a_loop_of_ones_own_reports_what_goes_on() -> None:
    """Without generate: the first prompt goes on after a second one began between its steps."""
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    name = cache_name(model.get_decoder())
    with DyCoke()(model) as run, torch.no_grad():
        output = model(**inputs)
        for step in range(3):
            token = output.logits[:, -1:].argmax(-1)
            if step == 1:
                model(**text_only())
            output = model(input_ids=token, **{name: cache_of(output)})
        assert run.report is not None and run.report.engaged and run.report.decode_steps == 3
        model(**text_only())
        assert not run.report.engaged


# Names of transformers


def renamed(module: Any, old: str, new: str) -> Any:
    """``module`` with an argument of its forward under a new name, as a new release would."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return inner(*args, **kwargs)

    parameters = inspect.signature(inner).parameters
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(name=new) if p.name == old else p for p in parameters.values()]
    )
    module.forward = forward
    return module


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "gemma4"])
@pytest.mark.parametrize("name", ["inputs_embeds", "attention_mask", "position_ids", *CACHE_NAMES])
def test_a_decoder_with_other_names_is_refused(family: str, name: str) -> None:
    model = tiny.FAMILIES[family].model()
    decoder = model.get_decoder()
    if name not in inspect.signature(decoder.forward).parameters:
        pytest.skip(f"this transformers does not call it {name}")
    renamed(decoder, name, "keys_and_values")
    with untouched(model):
        with pytest.raises(UnsupportedError, match=rf"no(ne of the)? arguments? .*{name}.*tested"):
            dycoke.apply(model, DyCoke())


@pytest.mark.parametrize(
    "name", ["_prepare_position_ids_for_generation", "_get_candidate_generator"]
)
def test_a_model_whose_generate_asks_otherwise_is_refused(name: str, monkeypatch: Any) -> None:
    model = tiny.FAMILIES["llava_onevision"].model()
    owner = next(c for c in type(model).__mro__ if name in vars(c))
    monkeypatch.delattr(owner, name)
    with pytest.raises(UnsupportedError, match=f"no {name}.*are tested"):
        dycoke.apply(model, DyCoke())


def test_a_decoder_that_takes_another_cache_is_an_error() -> None:
    model, inputs = tiny.FAMILIES["llava_onevision"].model(), inputs_of("llava_onevision", *ONE)
    decoder = model.get_decoder()
    inner, name = decoder.forward, cache_name(decoder)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name)  # and makes its own
        return inner(*args, **kwargs)

    decoder.forward = forward
    with DyCoke(prune_ratio=0)(model):
        with pytest.raises((UnsupportedError, AttributeError)) as caught:
            generate(model, inputs)
    assert "did not fill the cache" in str(caught.value)


def test_a_decoder_that_keeps_too_few_rows_is_an_error() -> None:
    model, inputs = tiny.FAMILIES["llava_onevision"].model(), inputs_of("llava_onevision", *ONE)
    decoder = model.get_decoder()
    inner, name = decoder.forward, cache_name(decoder)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        for layer in kwargs[name].layers:
            layer.prompt = {which: rows[:, :, 1:] for which, rows in layer.prompt.items()}
        return output

    decoder.forward = forward
    with DyCoke(prune_ratio=0)(model):
        with pytest.raises(UnsupportedError, match="did not fill the cache"):
            generate(model, inputs)


def test_attention_that_goes_another_way_is_an_error() -> None:
    model, inputs = tiny.FAMILIES["llava_onevision"].model(), inputs_of("llava_onevision", *ONE)
    with DyCoke()(model):
        attention = model.get_decoder().layers[4].self_attn
        attention.config = model.get_decoder().config  # a cast or a wrapper put it back
        with pytest.raises(UnsupportedError, match="2 of 3 attention modules"):
            generate(model, inputs)


@families
def test_the_cache_may_be_passed_by_either_name(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    names = [n for n in CACHE_NAMES if n == cache_name(model) or n == "past_key_values"]
    with DyCoke()(model) as run, torch.no_grad():
        first = model(**inputs)
        token = first.logits[:, -1:].argmax(-1)
        answers = []
        for name in names:
            cache = copy.deepcopy(cache_of(first))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                answers.append(model(input_ids=token, **{name: cache}).logits)
            assert run.reports[-1].decode_steps == 1 and run.reports[-1].engaged
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])
