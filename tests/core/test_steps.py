"""What a listener hears of each forward, against the oracle and against the rows themselves."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from support import answer, close, exact, families, generate, inputs_of, model_of, untouched
from test_drop import Best
from test_parity import of_one_video

from dycoke import DyCoke
from dycoke.core.forward import Forward
from dycoke.core.steps import Step

pytestmark = exact

QUESTION = 7
ONE = ([[7]], [(5, QUESTION)])
PADDED = ("llava_onevision", [[5], [5]], [(3, 4), (6, 2)])
TWO_VIDEOS = ("llava_onevision", [[4, 4]], [(3, 4)])
UNEVEN = ("qwen2_5_vl", [[4, 3], [5]], [(3, 2), (6, 4)])  # videos, lengths, and tokens kept
LATE = DyCoke(echo=0.6, echo_exact=1, score_layer=3)


@torch.no_grad()
def watched(model: Any, inputs: dict[str, Any]) -> Any:
    """The cache of a prompt without its last tokens."""
    shape = inputs["input_ids"].shape
    short = {k: v[:, :-QUESTION] if v.shape == shape else v for k, v in inputs.items()}
    return model(**short, use_cache=True).past_key_values


def attended(cache: Any) -> list[set[int]]:
    """The visual tokens of each row whose keys stand in the view of a decode step.

    Read from the map of the upper layers' rows, where a step's own account has no part.
    """
    generation = cache.generation
    rows, result = generation.upper, []
    for b, real in enumerate(generation.visual.valid):
        visual = generation.lower.index[b, generation.lower_rows[b][real]].tolist()
        seen = set(rows.index[b, int(rows.first[b]) :].tolist())
        result.append({v for v, place in enumerate(visual) if place in seen})
    return result


def listening(model: Any, settings: Any, work: Callable[[], Any], **more: Any) -> Any:
    """The steps of ``work``, what stood in the view after each, its output, and the run."""
    steps: list[Step] = []
    views: list[list[set[int]]] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        cache = caches[-1]
        views.append(attended(cache) if cache is not None else [])

    caches: list[Any] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(
            next((kwargs[k] for k in ("cache", "past_key_values") if k in kwargs), None)
        ),
        with_kwargs=True,
    )
    try:
        with settings(model, on_step=on_step, **more) as run:
            output = work()
    finally:
        handle.remove()
    return steps, views, output, run


def tokens(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


@families
@pytest.mark.parametrize("merge", [0.0, 0.7])
def test_steps_equal_the_oracle(family: str, merge: float) -> None:
    expected, visual, model, inputs = of_one_video(family, merge)
    steps, _, output, _ = listening(
        model, DyCoke(merge_ratio=merge), lambda: generate(model, inputs)
    )
    assert answer(output, inputs) == [expected.ids]
    assert [step.index for step in steps] == list(range(8))
    assert len({step.generation for step in steps}) == 1
    assert torch.equal(steps[0].ids, inputs["input_ids"])
    assert [int(step.ids) for step in steps[1:]] == expected.ids[:-1]  # fed, one step later
    for step in steps:
        assert [[video.keep.tolist() for video in row] for row in step.videos] == [expected.keep]
        assert all(video.encoded is None for video in step.videos[0])
        rows, columns = step.videos[0][0].grid
        assert rows * columns == tiny.FAMILIES[family].tokens_per_frame
    rows = [step.samples[0] for step in steps]
    assert tokens(rows[0].active) == set(range(len(visual)))
    assert rows[0].attention is None and not rows[0].recalled.any()
    sets = [{visual[v] for v in tokens(row.active)} for row in rows[1:]]
    assert sets == expected.active
    back = [{visual[v] for v in tokens(row.recalled)} for row in rows[1:]]
    assert back == [set(), *(b - a for a, b in pairwise(sets))]
    assert sum(map(len, back)) == expected.recalled


@pytest.mark.parametrize("prompt", [PADDED, TWO_VIDEOS, UNEVEN])
@pytest.mark.parametrize("settings", [DyCoke(), LATE], ids=["below", "late"])
def test_steps_are_what_the_rows_say(prompt: Any, settings: DyCoke) -> None:
    """In a padded batch, over two videos, with echoes and a late scoring layer."""
    name, videos, words = prompt
    model, inputs = model_of(name), inputs_of(name, videos, words)
    steps, views, output, run = listening(
        model, settings, lambda: generate(model, inputs), trace=True
    )
    assert run.report is not None and run.report.scores_late == (settings is LATE)
    with settings(model):
        assert torch.equal(generate(model, inputs).sequences, output.sequences)
    for b, trace in enumerate(run.trace.samples):
        rows = [step.samples[b] for step in steps]
        kept = run.report.samples[b].kept_tokens
        assert rows[0].active.all() and all(row.active.shape == (kept,) for row in rows)
        assert [tokens(row.active) for row in rows[1:]] == [view[b] for view in views[1:]]
        assert len({frozenset(view[b]) for view in views[1:]}) > 1  # it moved at all
        recalled = sum(int(row.recalled.sum()) for row in rows)
        assert recalled == run.report.samples[b].recalled_tokens
        assert all(not (row.recalled & ~row.active).any() for row in rows)
        assert [v.keep.tolist() for v in steps[0].videos[b]] == [k.tolist() for k in trace.keep]
        assert len(trace.active) == len(trace.attention) == 7
        for row, active, attention in zip(rows[1:], trace.active, trace.attention, strict=True):
            assert torch.equal(row.active, active) and row.attention is not None
            assert torch.equal(row.attention, attention)
    assert (steps[0].attention is not None) == (settings is LATE)
    assert sum(len(videos) for videos in steps[0].videos) == sum(map(len, videos))


def test_beams_bring_their_rows_along() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    steps, views, _, run = listening(
        model, DyCoke(), lambda: generate(model, inputs, num_beams=3), trace=True
    )
    for step, view in zip(steps[1:], views[1:], strict=True):
        assert [tokens(row.active) for row in step.samples] == view
        assert len(step.videos) == len(view) == 3
    assert len(run.trace.samples) == 3
    assert all(len(sample.active) == 7 for sample in run.trace.samples)


def test_what_the_encoder_left_out_is_told() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    settings = DyCoke(skip_ratio=0.5)
    steps, _, _, run = listening(model, settings, lambda: generate(model, inputs), trace=True)
    encoded = steps[0].videos[0][0].encoded
    assert encoded is not None and not encoded.all() and encoded[0].all()
    assert int(encoded.sum()) == run.report.samples[0].videos[0].encoded_tokens
    assert torch.equal(run.trace.samples[0].encoded[0], encoded)


def test_copies_tell_of_themselves() -> None:
    """Two questions on one prefilled video, step by step in turns."""
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    alone, _, _, _ = listening(model, DyCoke(), lambda: generate(model, inputs))
    with DyCoke()(model):
        cache = watched(model, inputs)  # with nobody listening
    copies = [copy.deepcopy(cache), copy.deepcopy(cache)]
    heard: list[Step] = []
    ids = [inputs["input_ids"][:, -QUESTION:]] * 2
    with DyCoke()(model, trace=True) as run, torch.no_grad():
        run.on_step = heard.append
        for _ in range(8):
            for i in (0, 1):
                output = model(input_ids=ids[i], past_key_values=copies[i])
                ids[i] = output.logits[:, -1:].argmax(-1)
        trace = run.trace
    assert [step.index for step in heard] == [i for i in range(8) for _ in (0, 1)]
    numbers = [step.generation for step in heard]
    assert numbers[0] != numbers[1] and numbers == numbers[:2] * 8
    assert trace is not None and len(trace.samples[0].active) == 7
    for step, other, expected in zip(heard[::2], heard[1::2], alone, strict=True):
        for one in (step, other):
            assert torch.equal(one.active, expected.active)
            assert torch.equal(one.recalled, expected.recalled)
            assert torch.equal(one.videos[0][0].keep, expected.videos[0][0].keep)
            if one.index:
                close(one.attention, expected.attention)
                assert torch.equal(one.ids, expected.ids)


def test_a_later_turn_begins_at_0_and_selects_anew() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)

    def work() -> None:
        cache = watched(model, inputs)
        generate(model, {"input_ids": inputs["input_ids"]}, past_key_values=cache)

    steps, _, _, _ = listening(model, DyCoke(), work)
    assert [step.index for step in steps] == [0, 0, *range(1, 8)]
    assert steps[1].active.all() and steps[1].ids.shape[1] == QUESTION
    assert not steps[2].recalled.any()
    assert torch.equal(steps[0].videos[0][0].keep, steps[1].videos[0][0].keep)


def test_tokens_dropped_inside_are_not_active() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    steps, views, _, run = listening(model, Best(), lambda: generate(model, inputs))
    went_on = run.report.samples[0].active_tokens
    assert 0 < went_on < run.report.samples[0].kept_tokens
    assert [int(step.active.sum()) for step in steps] == [went_on] * 8
    assert [tokens(step.samples[0].active) for step in steps] == [view[0] for view in views]


def test_without_a_cache_each_forward_tells() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    steps, _, _, run = listening(
        model, DyCoke(prune_ratio=0), lambda: generate(model, inputs, use_cache=False), trace=True
    )
    assert [step.index for step in steps] == list(range(8))
    assert all(step.active.all() and step.attention is None for step in steps)
    assert int(steps[0].active.sum()) == run.report.samples[0].kept_tokens
    assert len(run.trace.samples[0].keep) == 1 and not run.trace.samples[0].active


def test_settings_that_remove_nothing_are_watched_where_asked() -> None:
    """The full model's answer, with its attention: what a comparison shows beside DyCoke's."""
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    expected = generate(model, inputs)
    steps, _, output, _ = listening(model, DyCoke(0, 0), lambda: generate(model, inputs))
    assert torch.equal(output.sequences, expected.sequences)
    assert all(step.active.all() for step in steps)
    assert all(step.attention is not None for step in steps[1:])
    with DyCoke(0, 0)(model) as run:
        with pytest.raises(ValueError, match="give on_step= to the method itself"):
            run.on_step = steps.append
        assert run.on_step is None


class Heard(Exception):
    pass


@pytest.mark.parametrize("at", [0, 3])
def test_what_a_listener_raises_ends_generate_and_nothing_else(at: int) -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with DyCoke()(model):
        expected = generate(model, inputs)

    def on_step(step: Step) -> None:
        if step.index == at:
            raise Heard(f"step {at}")

    with untouched(model):
        with DyCoke()(model, on_step=on_step) as run:
            with pytest.raises(Heard, match=f"step {at}"):
                generate(model, inputs)
            assert run.report is not None and run.report.decode_steps == at
            run.on_step = None  # the same run goes on, with its lock free
            assert torch.equal(generate(model, inputs).sequences, expected.sequences)
        with pytest.raises(Heard):
            with DyCoke()(model, on_step=on_step):
                generate(model, inputs)
    with DyCoke()(model):
        assert torch.equal(generate(model, inputs).sequences, expected.sequences)


def test_the_model_is_free_while_a_listener_runs() -> None:
    """Another thread may generate with it meanwhile, as another request does."""
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    own = threading.get_ident()
    others: list[Any] = []

    def on_step(step: Step) -> None:
        if step.index == 2 and threading.get_ident() == own:
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(generate, model, inputs).result(timeout=30))

    with DyCoke()(model, on_step=on_step):
        output = generate(model, inputs)
    assert [torch.equal(other.sequences, output.sequences) for other in others] == [True]


def test_nothing_is_made_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    monkeypatch.setattr(Forward, "tell", None)
    with DyCoke()(model) as run:
        generate(model, inputs)
        assert run.trace is None
        run.on_step = print
        with pytest.raises(TypeError, match="not callable"):
            generate(model, inputs)


@pytest.mark.parametrize("wrong", [True, "print", 3])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    model = model_of("llava_onevision")
    with untouched(model):
        with pytest.raises(TypeError, match=f"on_step must be a function .* got {wrong!r}"):
            with DyCoke()(model, on_step=wrong):
                pass
        with DyCoke()(model) as run:
            with pytest.raises(TypeError, match="on_step must be"):
                run.on_step = wrong
            assert run.on_step is None
