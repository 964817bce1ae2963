"""Traps of transformers 5 and refusals by name: each test fails without its remedy."""

from __future__ import annotations

import gc
import inspect
import threading
import warnings
import weakref
from typing import Any

import pytest
import standin
import tiny
import torch
import transformers
from support import (
    BACKENDS,
    backends,
    close,
    compressed,
    exact,
    families,
    generate,
    inputs_of,
    model_of,
    untouched,
)
from transformers import DynamicCache, LogitsProcessor, StaticCache

import dycoke
from dycoke import DyCoke, UnsupportedError
from dycoke.models import families as families_known

pytestmark = exact

ONE = ([[7]], [(5, 7)])
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def question(family: str, sequence: torch.Tensor, tokens: list[int]) -> dict[str, Any]:
    longer = torch.cat([sequence, torch.tensor([tokens]).expand(len(sequence), -1)], 1)
    return tiny.FAMILIES[family].follow_up(longer)


# What is done right quietly


@families
@backends
@pytest.mark.parametrize("prune", [0.0, 0.7])
def test_a_follow_up_turn_does_not_see_the_future(family: str, backend: str, prune: float) -> None:
    """Changing a question's last token changes no earlier logits."""
    model, inputs = model_of(family, backend), inputs_of(family, *ONE)
    seen = []
    for last in (3, 60):
        with DyCoke(prune_ratio=prune)(model), torch.no_grad():
            out = generate(model, inputs, tokens=3)
            new = torch.tensor([[11, 12, 13, last]])
            step = model(input_ids=new, past_key_values=out.past_key_values)
            seen.append(step.logits[0])
    assert seen[0].shape[0] == 4
    close(seen[0][:3], seen[1][:3])
    assert (seen[0][3] - seen[1][3]).abs().max() > 1e-2


@families
@pytest.mark.parametrize("backend", BACKENDS)
def test_gapped_positions_are_not_read_as_packed_sequences(family: str, backend: str) -> None:
    """Without a cache and without a mask, as with one."""
    model = model_of(family, backend)
    inputs = inputs_of(family, *ONE)
    with DyCoke(prune_ratio=0)(model), torch.no_grad():
        cached = model(**inputs).logits
        del inputs["attention_mask"]
        bare = model(**inputs, use_cache=False).logits
        # A generated placeholder would be one too many for the stock model, too.
        only_text: dict[str, Any] = {"suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}
        answers = [
            generate(model, inputs, use_cache=use, **only_text).sequences for use in (True, False)
        ]
    close(bare, cached)
    assert torch.equal(*answers)


def test_generation_without_a_cache_is_one_report() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    for settings in (DyCoke(prune_ratio=0), DyCoke(merge_ratio=0, prune_ratio=0)):
        _, run = compressed(model, settings, inputs, tokens=5, use_cache=False)
        assert [r.decode_steps for r in run.reports] == [4]
        assert run.reports[0].kv_bytes == run.reports[0].kv_bytes_full == 0


@families
def test_a_bare_forward_gives_kept_length(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    with DyCoke()(model) as run, torch.no_grad():
        logits = model(**inputs).logits
    assert run.report is not None
    sample = run.report.samples[0]
    dropped = sample.visual_tokens - sample.kept_tokens
    assert logits.shape[1] == inputs["input_ids"].shape[1] - dropped


@families
@backends
def test_no_leak_from_one_video_to_the_next(family: str, backend: str) -> None:
    model = model_of(family, backend)
    clips = [inputs_of(family, [[n]], [(5, 7)], seed=n) for n in (8, 3)]
    alone = [compressed(model, DyCoke(), clip)[0].sequences for clip in clips]
    for order in ((0, 1), (1, 0)):
        with DyCoke()(model) as run:
            for i in order:
                assert torch.equal(generate(model, clips[i]).sequences, alone[i])
        assert [r.samples[0].frames for r in run.reports] == [(8, 3)[i] for i in order]


@families
def test_labels_and_training_pass_untouched(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    labels = inputs["input_ids"].clone()
    plain = model(**inputs, labels=labels)
    with DyCoke()(model) as run:
        ours = model(**inputs, labels=labels)
        assert torch.equal(ours.logits, plain.logits)
        assert torch.equal(ours.loss, plain.loss)
        model.train()
        try:
            assert model(**inputs).logits.shape == plain.logits.shape
        finally:
            model.eval()
        assert model(**inputs).logits.shape[1] < plain.logits.shape[1]
    assert [r.engaged for r in run.reports] == [False, False, True]
    assert "labels" in str(run.reports[0].reason)


@families
def test_embeddings_without_ids_warn_and_pass(family: str) -> None:
    model = model_of(family)
    # Known embeddings: Gemma 4 looks up which tokens they are.
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8, 9, 10]])).detach()
    plain = model(inputs_embeds=embeds).logits
    with DyCoke()(model) as run:
        with pytest.warns(UserWarning, match="cannot find the video tokens"):
            ours = model(inputs_embeds=embeds).logits
    assert torch.equal(ours, plain)
    assert run.report is not None and "inputs_embeds" in str(run.report.reason)


@families
def test_other_models_and_modules_stay_as_they_are(family: str) -> None:
    model, other = model_of(family), model_of(family, seed=9)
    inputs = inputs_of(family, *ONE)
    plain = generate(other, inputs).sequences
    with DyCoke()(model), untouched(other):
        assert torch.equal(generate(other, inputs).sequences, plain)
        configs = [m.config for m in model.get_decoder().modules() if hasattr(m, "config")]
        ours = [c for c in configs if c._attn_implementation == "dycoke"]
        assert len(ours) == 3  # the scoring layer and the two pruned ones
        assert model.config.get_text_config()._attn_implementation == "sdpa"


@families
@backends
def test_leaving_restores_the_model(family: str, backend: str) -> None:
    model, inputs = model_of(family, backend), inputs_of(family, *ONE)
    plain = generate(model, inputs).sequences
    with untouched(model):
        compressed(model, DyCoke(), inputs)
    with untouched(model), pytest.raises(KeyError, match="mine"), DyCoke()(model):
        generate(model, inputs)
        raise KeyError("mine")
    assert torch.equal(generate(model, inputs).sequences, plain)


class Bomb(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("bomb")


@families
@pytest.mark.parametrize("where", ["processor", "layer"])
def test_an_exception_leaves_nothing_behind(family: str, where: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    expected = compressed(model, DyCoke(), inputs)[0].sequences
    with untouched(model), DyCoke()(model) as run:
        if where == "processor":
            with pytest.raises(RuntimeError, match="bomb"):
                generate(model, inputs, logits_processor=[Bomb()])
        else:

            def fail(*_: Any) -> None:
                raise RuntimeError("bomb")

            hook = model.get_decoder().layers[4].register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="bomb"):
                generate(model, inputs)
            hook.remove()
        # The same context goes on as if nothing had happened.
        assert torch.equal(generate(model, inputs).sequences, expected)
        assert run.report is not None and run.report.decode_steps == 7
        # ... in another thread, too: the lock was given back.
        result: list[Any] = []
        thread = threading.Thread(target=lambda: result.append(generate(model, inputs)))
        thread.start()
        thread.join(60)
        assert torch.equal(result[0].sequences, expected)


@families
@pytest.mark.parametrize("backend", ["sdpa", standin.NAME])
def test_two_threads_on_one_model_do_not_mix(family: str, backend: str) -> None:
    model = model_of(family, backend)
    clips = [inputs_of(family, [[n]], [(5, 7)], seed=n) for n in (8, 3)]
    alone = [compressed(model, DyCoke(), clip)[0].sequences for clip in clips]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    run = dycoke.apply(model, DyCoke())
    try:

        def work(i: int) -> None:
            for _ in range(2):
                results[i].append(generate(model, clips[i]).sequences)

        threads = [threading.Thread(target=work, args=(i,)) for i in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        dycoke.remove(model)
    for i, outputs in results.items():
        assert len(outputs) == 2
        assert all(torch.equal(out, alone[i]) for out in outputs)
    assert len(run.reports) == 4
    assert sorted(r.samples[0].frames for r in run.reports) == [3] * 2 + [8] * 2
    assert {r.decode_steps for r in run.reports} == {7}


def test_apply_and_remove() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    expected = compressed(model, DyCoke(), inputs)[0].sequences
    with untouched(model):
        run = dycoke.apply(model, DyCoke())
        assert torch.equal(generate(model, inputs).sequences, expected)
        dycoke.remove(model)
        dycoke.remove(model)  # harmless
    assert run.report is not None and run.report.engaged


def test_an_applied_model_can_be_let_go() -> None:
    """Nothing of ours keeps a model alive."""
    model = tiny.FAMILIES["llava_onevision"].model()
    run = dycoke.apply(model, DyCoke())
    inputs = inputs_of("llava_onevision", [[2]], [(2, 2)])
    with torch.no_grad():
        model(**inputs)
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None


def test_ratio_zero_refuses_nothing() -> None:
    """Not even what would be refused otherwise: chunks of a prompt (transformers permitting)."""
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    kwargs = {"prefill_chunk_size": 30}
    plain = generate(model, inputs, **kwargs)
    ours, run = compressed(model, DyCoke(merge_ratio=0, prune_ratio=0), inputs, **kwargs)
    assert torch.equal(ours.sequences, plain.sequences)
    assert run.report is not None and not run.report.engaged


def test_only_the_last_hundred_reports_are_kept() -> None:
    model = model_of("llava_onevision")
    inputs = inputs_of("llava_onevision", [[2]], [(2, 2)])
    with DyCoke()(model) as run, torch.no_grad():
        assert run.reports == [] and run.report is None
        for _ in range(103):
            model(**inputs)
    assert len(run.reports) == 100


@families
def test_two_adjacent_videos_are_two(family: str) -> None:
    """Boundaries come from the encoder's rows, not from gaps in the prompt."""
    model = model_of(family)
    inputs = inputs_of(family, [[5, 5]], [(5, 7)])
    with DyCoke()(
        model, trace=True, frame_source=tiny.FAMILIES[family].frame_source([[5, 5]])
    ) as run:
        generate(model, inputs)
    assert run.report is not None and run.trace is not None
    sample = run.report.samples[0]
    assert [v.frames for v in sample.videos] == [5, 5]
    # Each has its own windows: frames 0 and 4 are anchors, in both.
    n = tiny.FAMILIES[family].tokens_per_frame
    stay = int(0.3 * n + 1e-6)
    for keep in run.trace.samples[0].keep:
        assert keep.sum(1).tolist() == [n, stay, stay, stay, n]


# What is refused by name


@families
def test_a_cache_used_after_the_context_refuses(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    for prune in (0.0, 0.7):
        out, _ = compressed(model, DyCoke(prune_ratio=prune), inputs)
        assert isinstance(out.past_key_values, DynamicCache)
        assert type(out.past_key_values).__name__ == "DycokeCache"
        follow = question(family, out.sequences, [7, 8])
        with pytest.raises(UnsupportedError, match="inside the `with` block"):
            generate(model, follow, past_key_values=out.past_key_values)
        # Equal settings may go on, others may not.
        with DyCoke(prune_ratio=0.3)(model), pytest.raises(UnsupportedError, match="made with"):
            generate(model, follow, past_key_values=out.past_key_values)
        out, _ = compressed(model, DyCoke(prune_ratio=prune), inputs)
        with DyCoke(prune_ratio=prune)(model):
            generate(model, follow, past_key_values=out.past_key_values)


@families
def test_nested_use_is_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    expected = compressed(model, DyCoke(), inputs)[0].sequences
    with untouched(model), DyCoke()(model):
        for target in (model, model.model):
            with pytest.raises(UnsupportedError, match="compressed already"):
                dycoke.apply(target, DyCoke(merge_ratio=0.1))
        with pytest.raises(UnsupportedError, match="compressed already"), DyCoke()(model):
            pass
        assert torch.equal(generate(model, inputs).sequences, expected)


def refused(model: Any, inputs: Any, match: str, settings: DyCoke | None = None, **kw: Any) -> None:
    with untouched(model), pytest.raises(UnsupportedError, match=match):
        compressed(model, settings or DyCoke(), inputs, **kw)


@families
def test_caches_that_are_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    refused(model, inputs, "got a StaticCache", cache_implementation="static")
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    refused(model, inputs, "got a StaticCache", past_key_values=static)

    class Quantized(DynamicCache):
        pass

    refused(model, inputs, "got a Quantized", past_key_values=Quantized())
    offloaded = DynamicCache()
    offloaded.offloading = True
    refused(model, inputs, "offloaded", past_key_values=offloaded)
    refused(model, inputs, "use_cache=False has none", use_cache=False)
    # Ratio 0 leaves all of them alone.
    nothing = DyCoke(merge_ratio=0, prune_ratio=0)
    text: dict[str, Any] = {"suppress_tokens": [tiny.VIDEO]}
    plain = generate(model, inputs, **text).sequences
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    for kwargs in ({"past_key_values": static}, {"use_cache": False}):
        ours, _ = compressed(model, nothing, inputs, **text, **kwargs)
        assert torch.equal(ours.sequences, plain)


def test_decoders_that_are_refused() -> None:
    """Where no layer can be pruned, or one is of a kind that nobody knows."""
    for kinds, settings, match in (
        (["sliding_attention"] * 5, DyCoke(), "has 0 full-attention layers among 5"),
        (["full_attention"] + ["sliding_attention"] * 4, DyCoke(), "has 1 full-attention layers"),
        (["full_attention"] * 4 + ["sliding_attention"], DyCoke(prune_layer=4), "choose 1 to 3"),
        (["chunked_attention"] * 5, DyCoke(prune_ratio=0), "of the kind chunked_attention"),
    ):
        model = tiny.FAMILIES["llava_onevision"].model()
        model.config.get_text_config().layer_types = kinds
        with untouched(model), pytest.raises(UnsupportedError, match=match):
            dycoke.apply(model, settings)
        with DyCoke(merge_ratio=0, prune_ratio=0)(model):
            pass


@families
@pytest.mark.parametrize("size", [4, 20, 30])
def test_chunked_prefill_is_refused(family: str, size: int) -> None:
    """5.17 forgets the pixels, silently; newer releases hand out a slice of the features."""
    if TRANSFORMERS < (5, 18) and family.startswith("qwen") and size == 4:
        pytest.skip("5.17 itself fails in the text before the video")
    model, inputs = model_of(family), inputs_of(family, *ONE)
    refused(model, inputs, "prefill_chunk_size|unchanged", DyCoke(), prefill_chunk_size=size)


@families
def test_placeholders_without_a_video_are_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    refused(model, text, "no video came with them")


@families
def test_assisted_decoding(family: str) -> None:
    """Refused where a step attends to part of the video, right where nothing is pruned."""
    model = model_of(family)
    inputs = inputs_of(family, [[6]], [(5, 7)])
    # A repetitive prompt, so that prompt lookup finds candidates at once.
    inputs["input_ids"][0, -6:] = torch.tensor([3, 4, 3, 4, 3, 4])
    lookup: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if model._is_stateful:
        with pytest.raises(ValueError, match="stateful"):  # stock: linear layers cannot go back
            compressed(model, DyCoke(prune_ratio=0), inputs, **lookup)
        return
    refused(model, inputs, "prompt-lookup", **lookup)
    settings = DyCoke(prune_ratio=0)
    plain, _ = compressed(model, settings, inputs, tokens=12)
    ours, run = compressed(model, settings, inputs, tokens=12, **lookup)
    assert torch.equal(ours.sequences, plain.sequences)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # else each looks new
        assert len(run.reports) == 1


def test_a_part_of_a_question_cannot_be_forgotten() -> None:
    """A whole question can be; of several tokens that came at once, a part can not."""
    model, inputs = model_of("video_llama_3"), inputs_of("video_llama_3", *ONE)
    question = torch.tensor([[7, 8, 9]])
    with DyCoke()(model), torch.no_grad():
        cache = generate(model, inputs, tokens=3).past_key_values
        expected = model(input_ids=question, past_key_values=cache).logits
        with pytest.raises(UnsupportedError, match="prompt-lookup"):
            cache.crop(-2)
        cache.crop(-3)
        close(model(input_ids=question, past_key_values=cache).logits, expected)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.crop(-2)  # after a decode step, as a user would


@families
def test_changing_the_attention_implementation_inside_is_refused(family: str) -> None:
    model = tiny.FAMILIES[family].model()
    inputs = inputs_of(family, *ONE)
    with pytest.raises(UnsupportedError, match="changed from 'sdpa' to 'eager'"):
        with DyCoke()(model):
            model.set_attn_implementation("eager")
            generate(model, inputs)
    plain = generate(model, inputs).sequences
    assert torch.equal(plain, generate(model_of(family, "eager"), inputs).sequences)


@families
def test_what_is_refused_before_anything_runs(family: str) -> None:
    model = model_of(family)
    for layer in (5, 6):
        with (
            untouched(model),
            pytest.raises(UnsupportedError, match=f"prune_layer={layer} .* 1 to 4"),
        ):
            dycoke.apply(model, DyCoke(prune_layer=layer))
    with DyCoke(prune_layer=9, prune_ratio=0)(model):  # nothing to prune, nothing to refuse
        pass
    if tiny.FAMILIES[family].rope == "3-D":
        with pytest.raises(UnsupportedError, match="compact"):
            dycoke.apply(model, DyCoke(positions="compact"))
    flex = tiny.FAMILIES[family].model()
    flex.config.get_text_config()._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedError, match="FlexAttention"):
        dycoke.apply(flex, DyCoke())
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        dycoke.apply(torch.nn.Linear(1, 1), DyCoke())


def test_an_unknown_family_lists_the_known_ones() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**tiny.TEXT))
    known = ", ".join(sorted(families_known()))
    assert set(tiny.FAMILIES) <= set(families_known())
    with pytest.raises(UnsupportedError, match=f"'qwen2' is not known; known: {known}"):
        dycoke.apply(model, DyCoke())


def test_a_layout_of_ones_own_serves_an_unknown_family() -> None:
    """A made-up family: the same prompt, under a name that nobody knows."""
    model = tiny.FAMILIES["llava_onevision"].model()
    inputs = inputs_of("llava_onevision", *ONE)
    expected, _ = compressed(model, DyCoke(), inputs)
    model.config.model_type = "made_up"
    with pytest.raises(UnsupportedError, match=r"'made_up' is not known.*pass layout="):
        dycoke.apply(model, DyCoke())

    def layout(prompt: Any) -> list[dycoke.VideoSpan]:
        places = (prompt.input_ids[0] == tiny.VIDEO).nonzero()[:-1, 0]
        return [dycoke.VideoSpan(0, places.view(-1, 9), (3, 3))]

    with untouched(model), DyCoke()(model, layout=layout) as run:
        output = generate(model, inputs)
    assert torch.equal(output.sequences, expected.sequences)
    assert run.report is not None and run.report.samples[0].frames == 7


def test_a_prompt_that_was_cut_is_refused() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    inputs["input_ids"][0, 6] = 3  # one placeholder less
    with pytest.raises(UnsupportedError, match="63 video placeholders where the videos fill 64"):
        compressed(model, DyCoke(), inputs)


def test_a_mask_of_the_wrong_width_is_named() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with DyCoke()(model), torch.no_grad():
        out = generate(model, inputs, tokens=3)
        with pytest.raises(ValueError, match="attention_mask covers 3 tokens"):
            model(
                input_ids=torch.tensor([[5]]),
                attention_mask=torch.ones(1, 3).long(),
                past_key_values=out.past_key_values,
            )


def test_no_warnings_in_a_plain_run() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed(model, DyCoke(), inputs)


@families
def test_attentions_and_hidden_states_can_be_asked_for(family: str) -> None:
    """Maps of pruned layers are as wide as what they attend to."""
    model, inputs = model_of(family, "eager"), inputs_of(family, *ONE)
    plain, _ = compressed(model, DyCoke(), inputs, tokens=3)
    with DyCoke()(model) as run:
        out = generate(model, inputs, tokens=3, output_attentions=True, output_hidden_states=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert run.report is not None
    sample = run.report.samples[0]
    rows = inputs["input_ids"].shape[1] - sample.visual_tokens + sample.kept_tokens
    bank = sample.kept_tokens - sample.active_tokens
    full = tiny.FAMILIES[family].full

    def widths(maps: Any) -> list[int]:
        """Of the full-attention layers; linear ones have no maps, others may have."""
        return [
            (a if len(maps) == len(full) else maps[i]).shape[-1]
            for a, i in zip(maps, full, strict=False)
        ]

    assert widths(out.attentions[0]) == [rows] * len(full)
    expected = [rows + 1] * (len(full) - 2) + [rows + 1 - bank] * 2
    assert widths(out.attentions[1]) == expected
    assert out.hidden_states[0][0].shape[1] == rows
