"""Ratio 0 is plain generate, and the real path with nothing to drop is, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
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

from dycoke import DyCoke

pytestmark = exact

BATCHES = {
    "one": ([[6]], [(5, 7)]),
    "three, left-padded": ([[5], [5], [5]], [(5, 7), (2, 3), (11, 1)]),
}
batches = pytest.mark.parametrize("batch", BATCHES)
NOTHING = DyCoke(merge_ratio=0, prune_ratio=0)


@families
@backends
@batches
def test_ratio_zero_gives_the_same_tokens_and_logits(family: str, backend: str, batch: str) -> None:
    model, inputs = model_of(family, backend), inputs_of(family, *BATCHES[batch])
    plain = generate(model, inputs)
    output, run = compressed(model, NOTHING, inputs)
    assert torch.equal(output.sequences, plain.sequences)
    for ours, stock in zip(output.logits, plain.logits, strict=True):
        assert torch.equal(ours, stock)
    report = run.report
    assert report is not None
    assert not report.engaged
    assert report.reason == "the settings remove nothing: ratios of 0, or a token_budget of 1.0"
    assert report.retention == report.final_retention == 1.0
    assert report.decode_steps == 7
    assert report.kv_bytes == report.kv_bytes_full > 0
    frames = BATCHES[batch][0][0][0]
    assert [s.frames for s in report.samples] == [frames] * len(inputs["input_ids"])


@families
@backends
@batches
@pytest.mark.parametrize("trace", [False, True])
def test_the_real_path_with_nothing_to_drop(
    family: str, backend: str, batch: str, trace: bool
) -> None:
    model, inputs = model_of(family, backend), inputs_of(family, *BATCHES[batch])
    plain = generate(model, inputs)
    settings = NOTHING if trace else DyCoke(merge_ratio=0, prune_ratio=1e-9)
    with settings(model, trace=trace) as run:
        output = generate(model, inputs)
    assert torch.equal(output.sequences, plain.sequences)
    close(torch.cat(output.logits), torch.cat(plain.logits))
    assert run.report is not None and not run.report.engaged
    assert run.report.reason
    if trace:
        assert run.trace is not None
        assert len(run.trace.samples[0].attention) == 7


@families
@backends
@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "two answers"],
)
def test_ways_of_generating_at_ratio_zero(
    family: str, backend: str, kwargs: dict[str, Any]
) -> None:
    model, inputs = model_of(family, backend), inputs_of(family, *BATCHES["one"])
    outputs = []
    for settings in (NOTHING, DyCoke(merge_ratio=0, prune_ratio=1e-9)):
        torch.manual_seed(7)
        plain = generate(model, inputs, **kwargs)
        torch.manual_seed(7)
        output, run = compressed(model, settings, inputs, **kwargs)
        assert torch.equal(output.sequences, plain.sequences)
        outputs.append(output)
        rows = kwargs.get("num_beams", 1) * kwargs.get("num_return_sequences", 1)
        assert run.report is not None and len(run.report.samples) == rows


@families
@pytest.mark.parametrize("prune", [0.0, 0.7])
def test_each_beam_scores_what_it_scores_alone(family: str, prune: float) -> None:
    """Reordered caches: a returned beam, forced token by token without beams, has its score."""
    model, inputs = model_of(family), inputs_of(family, *BATCHES["one"])
    settings = DyCoke(merge_ratio=0.5, prune_ratio=prune)
    beams, run = compressed(
        model, settings, inputs, num_beams=3, num_return_sequences=3, output_scores=True
    )
    assert run.report is not None and len(run.report.samples) == 3
    for row, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        forced = row[inputs["input_ids"].shape[1] :].tolist()

        def only(batch_id: int, ids: torch.Tensor, forced: Any = forced) -> list[int]:
            return [forced[min(len(ids) - inputs["input_ids"].shape[1], len(forced) - 1)]]

        alone, _ = compressed(model, settings, inputs, prefix_allowed_tokens_fn=only)
        assert alone.sequences[0].tolist() == row.tolist()
        chosen = [
            step[0].log_softmax(-1)[token] for step, token in zip(alone.logits, forced, strict=True)
        ]
        close(torch.stack(chosen).sum() / len(forced), score)


@families
def test_prompts_without_video_pass_untouched(family: str) -> None:
    model = model_of(family)
    inputs = inputs_of(family, *BATCHES["one"])
    text = {"input_ids": inputs["input_ids"][:, :5], "attention_mask": torch.ones(1, 5).long()}
    plain = generate(model, text)
    with untouched(model):
        output, run = compressed(model, DyCoke(), text)
    assert torch.equal(output.sequences, plain.sequences)
    report = run.report
    assert report is not None
    assert not report.engaged
    assert report.reason == "no video in the prompt"
    assert report.decode_steps == 7
    assert report.samples[0].visual_tokens == 0
    assert "no video" in str(report)
