"""When the selection is made anew, with attention that a test dictates; and the trace."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from support import exact, families, generate, inputs_of, model_of
from test_parity import of_one_video

from dycoke import DyCoke

pytestmark = exact


@pytest.fixture
def dictate(monkeypatch: Any) -> Any:
    """Make the scoring layer report given attention over the visual tokens, step by step."""

    def start(model: Any, steps: list[torch.Tensor]) -> None:
        waiting = iter(steps)

        def scores(query: Any, keys: torch.Tensor, scaling: Any, mask: Any) -> torch.Tensor:
            from dycoke.core.engine import engine_of

            engine = engine_of(model)
            assert engine is not None and engine.running is not None
            rows = engine.running.cache.generation.lower_rows
            result = torch.zeros(keys.shape[0], keys.shape[2])
            wanted = next(waiting).expand(keys.shape[0], -1)
            return result.scatter(1, rows, wanted[:, : rows.shape[1]])

        monkeypatch.setattr("dycoke.core.engine.query_scores", scores)

    return start


def on(tokens: list[int], count: int) -> torch.Tensor:
    attention = torch.full((count,), 1e-4)
    attention[tokens] = torch.linspace(0.2, 0.1, len(tokens))
    return attention


@families
def test_similar_attention_keeps_and_different_attention_swaps(family: str, dictate: Any) -> None:
    model, inputs = model_of(family), inputs_of(family, [[4]], [(3, 4)])
    n = 4 * tiny.FAMILIES[family].tokens_per_frame  # nothing is merged
    settings = DyCoke(merge_ratio=0, prune_ratio=1 - 4.5 / n)
    early, late = [0, 1, 2, 3], [n - 1, n - 2, n - 3, n - 4]
    mixed = [0, 1, n - 1, n - 2]
    slightly = on(early, n).clone()
    slightly[5] = 0.05  # moves, but not under 0.9
    steps = [on(early, n), slightly, on(late, n), on(late, n), on(early, n), on(mixed, n)]
    dictate(model, steps)
    with settings(model, trace=True) as run:
        generate(model, inputs, tokens=7)
    trace, report = run.trace, run.report
    assert trace is not None and report is not None
    sets = [set(active.nonzero()[:, 0].tolist()) for active in trace.samples[0].active]
    assert sets == [set(s) for s in (early, early, late, late, early, mixed)]
    sample = report.samples[0]
    assert sample.active_tokens == 4
    assert (sample.refreshes, sample.recalled_tokens) == (3, 4 + 4 + 2)
    for step, attention in zip(steps, trace.samples[0].attention, strict=True):
        assert torch.equal(step, attention)


@families
def test_threshold_zero_chooses_once(family: str, dictate: Any) -> None:
    model, inputs = model_of(family), inputs_of(family, [[4]], [(3, 4)])
    n = 4 * tiny.FAMILIES[family].tokens_per_frame
    dictate(model, [on([1], n), on([n - 1], n), on([2], n)])
    settings = DyCoke(merge_ratio=0, prune_ratio=1 - 1.5 / n, refresh_threshold=0)
    with settings(model, trace=True) as run:
        generate(model, inputs, tokens=4)
    assert run.trace is not None and run.report is not None
    assert [int(a.nonzero()[0, 0]) for a in run.trace.samples[0].active] == [1, 1, 1]
    assert run.report.samples[0].refreshes == 0


@families
def test_samples_refresh_apart(family: str, dictate: Any, monkeypatch: Any) -> None:
    """One sample's attention moves, the other's does not."""
    model = model_of(family)
    inputs = inputs_of(family, [[4], [4]], [(3, 4), (3, 4)])
    n = 4 * tiny.FAMILIES[family].tokens_per_frame
    first, second = torch.stack([on([0], n), on([0], n)]), torch.stack([on([0], n), on([7], n)])
    dictate(model, [first, second])
    with DyCoke(merge_ratio=0, prune_ratio=1 - 1.5 / n)(model, trace=True) as run:
        generate(model, inputs, tokens=3)
    assert run.report is not None and run.trace is not None
    assert [s.refreshes for s in run.report.samples] == [0, 1]
    last = [s.active[-1].nonzero()[:, 0].tolist() for s in run.trace.samples]
    assert last == [[0], [7]]


@families
@pytest.mark.parametrize("merge", [0.0, 0.7])
def test_the_trace_equals_the_oracle(family: str, merge: float) -> None:
    expected, visual, model, inputs = of_one_video(family, merge)
    with DyCoke(merge_ratio=merge)(model, trace=True) as run:
        generate(model, inputs)
    assert run.trace is not None
    sample = run.trace.samples[0]
    assert [keep.tolist() for keep in sample.keep] == expected.keep
    ours = [{visual[v] for v in active.nonzero()[:, 0].tolist()} for active in sample.active]
    assert ours == expected.active
    assert all(0 < a.sum() < 1 and a.shape == (len(visual),) for a in sample.attention)


def test_only_the_last_trace_is_kept() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[3]], [(3, 4)])
    with DyCoke()(model, trace=True) as run:
        for _ in range(3):
            generate(model, inputs, tokens=2)
        engine = run._engine
        assert [record.trace is None for record in engine.records.listed] == [True, True, False]
    assert run.trace is not None


def test_without_trace_nothing_is_kept() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[3]], [(3, 4)])
    with DyCoke()(model) as run:
        generate(model, inputs, tokens=2)
    assert run.trace is None
