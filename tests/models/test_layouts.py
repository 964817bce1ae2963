"""Frames are those that the vision encoder got, whatever the prompt looks like."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, generate, inputs_of, model_of, untouched

import dycoke
from dycoke import DyCoke, UnsupportedError
from dycoke.models import Prompt
from dycoke.models import families as known
from dycoke.models.locate import _encoded_rows

# Stock models of these take the places of a video's tokens from runs of equal types themselves,
# and fail on every prompt below, with or without us.
PLACED = [name for name, row in tiny.FAMILIES.items() if row.rope == "3-D"]
FREE = [name for name, row in tiny.FAMILIES.items() if row.rope == "1-D"]
# Their frames are images, each behind the same marker, or else refused (`test_images.py`).
VIDEOS = [name for name in FREE if not tiny.FAMILIES[name].images]

older = pytest.mark.skipif(tiny.OLDER, reason="this transformers encodes inside its forward")

pytestmark = exact


def glued(row: list[int], token: int) -> list[int]:
    """All placeholders right behind each other; what stood between them stands before."""
    first, count = row.index(token), row.count(token)
    last = len(row) - row[::-1].index(token)
    between = [t for t in row[first:last] if t != token]
    return [*row[:first], *between, *[token] * count, *row[last:]]


def split(row: list[int], token: int) -> list[int]:
    """Text in the middle of the first frame."""
    at = row.index(token) + 3
    return [*row[:at], 7, *row[at:]]


def rebuilt(family: str, inputs: dict[str, Any], way: Any) -> dict[str, Any]:
    token = tiny.FAMILIES[family].token
    ids = torch.tensor([way(row, token) for row in inputs["input_ids"].tolist()])
    changed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        changed["mm_token_type_ids"] = (ids == token).long() * 2
    return inputs | changed


def by_hand(family: str, videos: list[list[int]]) -> Any:
    """A layout that counts placeholders in order, as the model scatters features."""
    row = tiny.FAMILIES[family]
    newline = int(family == "llava_onevision")

    def layout(prompt: Prompt) -> list[dycoke.VideoSpan]:
        spans = []
        for sample, counts in enumerate(videos):
            places = (prompt.input_ids[sample] == row.token).nonzero()[:, 0]
            for frames in counts:
                n = row.tokens_per_frame
                own, places = places[: frames * n], places[frames * n + newline :]
                spans.append(dycoke.VideoSpan(sample, own.view(frames, n), (1, n)))
        return spans

    return layout


@pytest.mark.parametrize("way", [glued, split])
@pytest.mark.parametrize("videos", [[[6]], [[5, 5]], [[1]]], ids=["one", "adjacent", "a frame"])
@pytest.mark.parametrize("family", VIDEOS)
def test_frames_do_not_depend_on_what_stands_between(
    family: str, videos: list[list[int]], way: Any
) -> None:
    model = model_of(family)
    inputs = rebuilt(family, inputs_of(family, videos, [(4, 5)]), way)
    with untouched(model):
        output, run = compressed(model, DyCoke(), inputs, 4)
    report = run.report
    assert report is not None
    assert [v.frames for v in report.samples[0].videos] == videos[0]
    with DyCoke()(model, layout=by_hand(family, videos)):
        expected = generate(model, inputs, 4)
    assert torch.equal(output.sequences, expected.sequences)
    close(torch.cat(output.logits), torch.cat(expected.logits))
    with DyCoke(prune_ratio=0)(model) as bare, torch.no_grad():
        model(**inputs)
    assert bare.report is not None
    assert [v.kept_tokens for v in bare.report.samples[0].videos] == [
        v.kept_tokens for v in report.samples[0].videos
    ]


@pytest.mark.parametrize("family", [name for name in FREE if tiny.FAMILIES[name].images])
def test_images_that_touch_each_other_are_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[5]], [(4, 5)])
    with DyCoke()(model):
        with pytest.raises(UnsupportedError, match="touch each other"):
            generate(model, rebuilt(family, inputs, glued), 2)
    _, run = compressed(model, DyCoke(), rebuilt(family, inputs, split), 2)
    assert run.report is not None and run.report.samples[0].frames == 5


@pytest.mark.parametrize("way", [glued, split])
@pytest.mark.parametrize("family", PLACED)
def test_a_prompt_that_the_model_places_itself_fails_or_has_its_frames(
    family: str, way: Any
) -> None:
    model = model_of(family)
    inputs = rebuilt(family, inputs_of(family, [[5, 5]], [(4, 5)]), way)
    with pytest.raises((RuntimeError, StopIteration)):
        generate(model, inputs, 2)
    with DyCoke()(model), pytest.raises((RuntimeError, StopIteration)):
        generate(model, inputs, 2)


@pytest.mark.parametrize("family", PLACED)
def test_without_token_types_positions_tell_no_grid(family: str) -> None:
    """Such a prompt gets 1-D positions from transformers, three times over."""
    inputs = inputs_of(family, [[4]], [(4, 5)])
    config = model_of(family).base_model.config
    ids = inputs["input_ids"]
    flat = torch.arange(ids.shape[1]).expand(4, 1, -1)
    prompt = Prompt(config, ids, flat, {}, [24])
    with pytest.raises(UnsupportedError, match="pass the processor's mm_token_type_ids"):
        known()[family].layout(prompt)


@pytest.mark.parametrize("family", PLACED)
def test_grids_that_are_not_those_of_the_features_are_refused(family: str) -> None:
    inputs = inputs_of(family, [[4]], [(4, 5)])
    config = model_of(family).base_model.config
    grids = {"video_grid_thw": torch.tensor([[2, 4, 6]])}
    prompt = Prompt(config, inputs["input_ids"], None, grids, [24])
    with pytest.raises(UnsupportedError, match=r"is of \[12\] tokens per video, .* made \[24\]"):
        known()[family].layout(prompt)


def encoded(model: Any, family: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What is left of the inputs, and the encoder's output."""
    kind = "image" if tiny.FAMILIES[family].images else "video"
    encode = getattr(model.base_model, f"get_{kind}_features")
    names = ("pixel", f"{kind}_", "num_frames")
    given = {k: v for k, v in inputs.items() if k.startswith(names)}
    given.pop("video_compression_mask", None)
    left = {k: v for k, v in inputs.items() if "pixel" not in k}
    with torch.no_grad():
        return left, {kind: encode(**given, return_dict=True)}


@pytest.mark.parametrize("shape", [(36, 8), (4, 9, 8)])
def test_rows_of_encoded_features_are_counted_whatever_their_shape(shape: tuple[int, ...]) -> None:
    """LLaVA-NeXT-Video gives a video as (F, N, D) in transformers 5.19, as (F * N, D) later."""
    features = SimpleNamespace(pooler_output=[torch.zeros(shape), torch.zeros(5, 8)])
    assert _encoded_rows({"mm_encoder_outputs": {"video": features}}, "video") == [36, 5]


# Nothing in the features themselves tells where a frame ends, nor does the config.
UNTOLD = ["video_llama_3", "gemma4", "smolvlm"]


@older
@pytest.mark.parametrize("family", UNTOLD)
def test_features_from_outside_are_refused_where_nothing_tells_their_frames(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[5]], [(4, 5)])
    left, output = encoded(model, family, inputs)
    with DyCoke()(model):
        with pytest.raises(UnsupportedError, match="encoded outside the block"):
            generate(model, left | {"mm_encoder_outputs": copy.deepcopy(output)}, 2)
        expected = generate(model, inputs, 2).sequences
        left, output = encoded(model, family, inputs)  # now its frames are noted
    with DyCoke()(model) as run:
        handed = generate(model, left | {"mm_encoder_outputs": output}, 2).sequences
    assert run.report is not None and run.report.samples[0].frames == 5
    assert torch.equal(handed, expected)


@older
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "video_llama_3", "internvl"])
def test_frames_that_the_encoder_did_not_get_are_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[6]], [(4, 5)])
    with DyCoke()(model):
        left, output = encoded(model, family, inputs)
        kind = next(iter(output))
        noted = output[kind].frame_counts
        assert sum(noted) == 6
        output[kind].frame_counts = [5] if len(noted) == 1 else noted[:-1]
        with pytest.raises(UnsupportedError, match="encoder got"):
            generate(model, left | {"mm_encoder_outputs": output}, 2)


@older
@pytest.mark.parametrize("family", ["video_llama_3", "smolvlm"])
def test_frames_are_known_where_inputs_are_copied_on_their_way(family: str) -> None:
    """A model over several devices gets copies of its inputs, without what is noted on them."""
    model, inputs = model_of(family), inputs_of(family, [[6]], [(4, 5)])
    _, run = compressed(model, DyCoke(), inputs, 2)
    assert run.report is not None
    forward = model.forward

    def copying(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("mm_encoder_outputs") or {}
        copies = {kind: type(output)(**output) for kind, output in given.items()}
        assert not any(hasattr(output, "frame_counts") for output in copies.values())
        return forward(*args, **kwargs | ({"mm_encoder_outputs": copies} if given else {}))

    copying.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = copying
    try:
        _, again = compressed(model, DyCoke(), inputs, 2)
    finally:
        del model.forward
    assert again.report is not None
    assert again.report.samples == run.report.samples


@pytest.mark.parametrize("side", [16, 24])
def test_images_of_another_size_than_the_configs_have_their_own_tokens(side: int) -> None:
    """SmolVLM takes smaller images; what the config says of 24 x 24 is not theirs."""
    model = model_of("smolvlm")
    tokens = (side // 4 // 2) ** 2
    g = torch.Generator().manual_seed(0)
    pixels = tiny.slow_noise(g, 9, 3, side, side)[None]
    frame = [tiny.VISION_START, *[tiny.IMAGE] * tokens, tiny.VISION_END, 5]
    ids = torch.tensor([[3, 4, *frame * 9, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    _, run = compressed(model, DyCoke(), inputs, 3)
    assert run.report is not None
    assert run.report.samples[0].frames == 9
    assert run.report.samples[0].visual_tokens == 9 * tokens


def test_oblong_tiles_are_one_frame_each() -> None:
    """Eight tokens are no square, and not two frames of a square either."""
    config = model_of("internvl").base_model.config
    ids = torch.tensor([[5, *[tiny.IMAGE] * 8, 6, *[tiny.IMAGE] * 8]])
    pixels = torch.zeros(2, 3, 16, 32)
    for given, rows in (({"pixel_values": pixels}, None), ({}, [8, 8])):
        spans = known()["internvl"].layout(Prompt(config, ids, None, given, rows, "image"))
        assert [tuple(span.positions.shape) for span in spans] == [(1, 8), (1, 8)]


def test_ragged_frames_of_a_compression_mask_are_refused() -> None:
    model, inputs = model_of("video_llama_3"), inputs_of("video_llama_3", [[4]], [(4, 5)])
    inputs["video_compression_mask"][3] = False
    row = inputs["input_ids"][0].tolist()
    row.remove(tiny.VIDEO)
    inputs |= {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}
    generate(model, inputs, 2)
    with DyCoke()(model), pytest.raises(UnsupportedError, match="use_token_compression=False"):
        generate(model, inputs, 2)


def test_videos_of_other_merge_sizes_have_their_own_frames() -> None:
    model, inputs = model_of("video_llama_3"), inputs_of("video_llama_3", [[3, 4]], [(4, 5)])
    merges = torch.tensor([2, 1])  # the second video keeps every patch
    rows = [3 * 6, 4 * 24]
    ids = torch.tensor([[5, *[tiny.VIDEO] * sum(rows), 6]])
    inputs |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "video_merge_sizes": merges,
        "video_compression_mask": torch.ones(sum(rows), dtype=torch.bool),
    }
    _, run = compressed(model, DyCoke(), inputs, 2)
    assert run.report is not None
    videos = run.report.samples[0].videos
    assert [(v.frames, v.visual_tokens) for v in videos] == [(3, 18), (4, 96)]


def test_chunks_of_frames_are_counted_together() -> None:
    from dycoke.vision.chunks import encode_in_chunks

    model, inputs = model_of("gemma4"), inputs_of("gemma4", [[7]], [(4, 5)])
    inputs = rebuilt("gemma4", inputs, glued)
    for first in (True, False):
        with encode_in_chunks(model, 2) if first else DyCoke()(model) as outer:
            with DyCoke()(model) if first else encode_in_chunks(model, 2) as inner:
                generate(model, inputs, 2)
        run = inner if first else outer
        assert run.report.samples[0].frames == 7
