"""Videos, images and text in one prompt: images and text are never merged and never pruned."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import tiny
import torch
from images import image_of, image_rows, insert
from support import close, compressed, exact, families, generate, inputs_of, model_of, untouched
from test_parity import check, with_margin
from torch import Tensor, nn

from dycoke import DyCoke

pytestmark = exact

NOTHING = DyCoke(merge_ratio=0, prune_ratio=0)
PLACES = {"image first": 2, "video first": -3}
places = pytest.mark.parametrize("place", PLACES)


class Embedding(nn.Module):
    """Token embeddings, with the image's rows where its placeholders are."""

    def __init__(self, inner: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, ids: Tensor) -> Tensor:
        out = self.inner(ids)
        if ids.ndim and (ids == tiny.IMAGE).any():
            out = out.clone()
            out[ids == tiny.IMAGE] = self.rows.to(out.dtype)
        return out


class Judge(oracle.Oracle):
    """The oracle where an image is in the prompt: it is text that looks like an image."""

    def _encode(self, core: Any, inputs: dict[str, Tensor]) -> Any:
        if "image_grid_thw" in inputs:
            core.get_rope_index = functools.partial(
                core.get_rope_index, image_grid_thw=inputs["image_grid_thw"]
            )
        beside = ("pixel_values", "image_grid_thw", "image_sizes")
        return super()._encode(core, {k: v for k, v in inputs.items() if k not in beside})


def mixed(family: str, place: str, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    model = model_of(family, seed=seed)
    if tiny.FAMILIES[family].token == tiny.IMAGE:
        pytest.skip("the stock model takes all of its placeholders for the image's")
    image = image_of(model, seed)
    inputs = insert(model, inputs_of(family, [[7]], [(5, 7)], seed), image, PLACES[place])
    return inputs, image_rows(model, image)


@families
@places
def test_video_and_image_equal_the_oracle(family: str, place: str) -> None:
    if getattr(model_of(family).config.vision_config, "deepstack_visual_indexes", None):
        pytest.skip("the oracle has no deeper features of images; test_prefill.py has")

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs, rows = mixed(family, place, seed)
        model = model_of(family, seed=seed)
        judge = Judge(model, family, K=0.7, P=0.7, L=3)
        core = judge.model.model
        core.set_input_embeddings(Embedding(core.get_input_embeddings(), rows))
        judge.prompt(inputs, tiny.FAMILIES[family].tokens_per_frame, tiny.VIDEO)
        return [judge.generate(8)]

    seed, (expected,) = with_margin(1, attempt)
    inputs, _ = mixed(family, place, seed)
    output, run = compressed(model_of(family, seed=seed), DyCoke(), inputs)
    check(expected, output, inputs, run.report)
    assert run.report is not None
    sample = run.report.samples[0]
    assert sample.visual_tokens == 7 * tiny.FAMILIES[family].tokens_per_frame
    dropped = sample.visual_tokens - sample.kept_tokens
    assert output.past_key_values.row_count == inputs["input_ids"].shape[1] - dropped + 7


@families
@places
def test_video_and_image_at_ratio_zero(family: str, place: str) -> None:
    model, (inputs, _) = model_of(family), mixed(family, place)
    plain = generate(model, inputs)
    for settings in (NOTHING, DyCoke(merge_ratio=0, prune_ratio=1e-9)):
        output, _ = compressed(model, settings, inputs)
        assert torch.equal(output.sequences, plain.sequences)
        close(torch.cat(output.logits), torch.cat(plain.logits))


@families
def test_images_alone_pass_untouched(family: str) -> None:
    model = model_of(family)
    ids = torch.arange(3, 12)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs_of(family, [[1]], [(1, 1)]):
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    inputs = insert(model, text, image_of(model), 4)
    plain = generate(model, inputs)
    with untouched(model):
        output, run = compressed(model, DyCoke(), inputs)
    assert torch.equal(output.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, plain.logits, strict=True))
    report = run.report
    assert report is not None and not report.engaged
    assert report.reason is not None and report.reason.startswith("no video in the prompt")
    assert report.samples[0].visual_tokens == 0 and report.decode_steps == 7


@families
def test_two_videos_in_one_prompt_at_ratio_zero(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[5, 5]], [(5, 7)])
    source = tiny.FAMILIES[family].frame_source([[5, 5]])
    plain = generate(model, inputs)
    for settings in (NOTHING, DyCoke(merge_ratio=0, prune_ratio=1e-9)):
        output, run = compressed(model, settings, inputs, frame_source=source)
        assert torch.equal(output.sequences, plain.sequences)
        close(torch.cat(output.logits), torch.cat(plain.logits))
        assert run.report is not None
        assert [v.frames for v in run.report.samples[0].videos] == [5, 5]
