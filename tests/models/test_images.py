"""Images are never merged, but where they are declared to be the frames of a video."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, generate, inputs_of, model_of, untouched

import dycoke
from dycoke import DyCoke, UnsupportedError
from dycoke.models import families as known

pytestmark = exact

ONE = ([[7]], [(5, 7)])
TWO = ([[3, 5], [3]], [(5, 7), (2, 4)])
FRAMED = [name for name, family in tiny.FAMILIES.items() if family.images]
BOTH = [name for name in tiny.FAMILIES if known()[name].frame_sources == ("videos", "images")]
NEITHER = [name for name in tiny.FAMILIES if known()[name].frame_sources == ("videos",)]

framed = pytest.mark.parametrize("family", FRAMED)
both = pytest.mark.parametrize("family", BOTH)


@pytest.fixture(autouse=True)
def declared() -> None:
    """Nothing is declared here but what a test says itself."""


def as_images(family: str, videos: Any, text: Any, seed: int = 0) -> dict[str, Any]:
    """The frames of a video family's inputs, given as images, each between its markers."""
    row = tiny.FAMILIES[family]
    pixels = inputs_of(family, videos, text, seed)["pixel_values_videos"]
    frame = [tiny.VISION_START, *[tiny.IMAGE] * row.tokens_per_frame, tiny.VISION_END]
    inputs, _ = tiny._framed(videos, text, seed, frame, (1, 1))
    images = sum(map(sum, videos))
    grids = torch.tensor([[1, 4, 6]] * images)
    types = (inputs["input_ids"] == tiny.IMAGE).long()
    return {**inputs, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}


@framed
def test_undeclared_images_pass_untouched(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    plain = generate(model, inputs)
    for source in (None, "videos"):
        with untouched(model):
            output, run = compressed(model, DyCoke(), inputs, frame_source=source)
        assert torch.equal(output.sequences, plain.sequences)
        assert run.report is not None and not run.report.engaged
        assert 'say frame_source="images"' in str(run.report.reason)
        assert run.report.samples[0].visual_tokens == 0


@both
def test_images_of_a_video_family_pass_untouched(family: str) -> None:
    model, inputs = model_of(family), as_images(family, *ONE)
    plain = generate(model, inputs)
    output, run = compressed(model, DyCoke(), inputs)
    assert torch.equal(output.sequences, plain.sequences)
    assert run.report is not None and not run.report.engaged
    assert 'say frame_source="images"' in str(run.report.reason)


@both
def test_declared_images_of_a_video_family_are_merged(family: str) -> None:
    """... and give what the same mask gives by hand: the spans are right, the rest is tested."""
    model, inputs = model_of(family), as_images(family, *TWO)
    with DyCoke()(model, frame_source=[3, 5], trace=True) as run:
        output = generate(model, inputs)
    assert run.report is not None and run.trace is not None
    videos = [sample.videos for sample in run.report.samples]
    assert [[v.frames for v in sample] for sample in videos] == [[3, 5], [3]]
    assert {v.source for sample in videos for v in sample} == {"images"}
    n = tiny.FAMILIES[family].tokens_per_frame
    stay = int(0.3 * n + 1e-6)
    assert run.trace.samples[0].keep[1].sum(1).tolist() == [n, stay, stay, stay, n]

    def layout(prompt: Any) -> list[dycoke.VideoSpan]:
        spans = []
        for sample, counts in enumerate(TWO[0]):
            places = (prompt.input_ids[sample] == tiny.IMAGE).nonzero()[:, 0].view(-1, n)
            spans += [dycoke.VideoSpan(sample, p, (2, 3)) for p in places.split(counts)]
        return spans

    with DyCoke()(model, layout=layout):
        by_hand = generate(model, inputs)
    assert torch.equal(output.sequences, by_hand.sequences)
    close(torch.cat(output.logits), torch.cat(by_hand.logits))


@framed
def test_declared_images_are_reported_as_such(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    _, run = compressed(model, DyCoke(), inputs, frame_source="images")
    assert run.report is not None and run.report.engaged
    assert [v.source for v in run.report.samples[0].videos] == ["images"]
    assert "7 frames given as images" in str(run.report)
    run = dycoke.apply(model, DyCoke(), frame_source="images")
    generate(model, inputs)
    dycoke.remove(model)
    assert run.report is not None and run.report.engaged


@framed
def test_all_images_are_one_video_unless_told_otherwise(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *TWO)
    for source, counts in (("images", [[8], [3]]), ([3, 5], [[3, 5], [3]]), ((3, 3, 2), None)):
        if counts is None:
            counts = [[3, 3, 2], [3]]
        _, run = compressed(model, DyCoke(), inputs, frame_source=source)
        assert run.report is not None
        assert [[v.frames for v in s.videos] for s in run.report.samples] == counts


@framed
@pytest.mark.parametrize("source", [[8], [5, 3], [3, 4], [3]])
def test_counts_that_do_not_fit_are_refused(family: str, source: list[int]) -> None:
    model, inputs = model_of(family), inputs_of(family, *TWO)
    with untouched(model), pytest.raises(UnsupportedError, match="does not fit a prompt with"):
        compressed(model, DyCoke(), inputs, frame_source=source)


@pytest.mark.parametrize("source", ["image", "", [], [0], [2.0], [True], 8, "88", {"images": 1}])
def test_a_bad_declaration_is_named(source: Any) -> None:
    with pytest.raises(ValueError, match=r'frame_source must be "videos", "images", or how many'):
        dycoke.apply(model_of("internvl"), DyCoke(), frame_source=source)


def test_a_layout_needs_no_declaration() -> None:
    with pytest.raises(ValueError, match="layout= finds the frames itself"):
        dycoke.apply(model_of("internvl"), DyCoke(), layout=lambda _: [], frame_source="images")


@pytest.mark.parametrize("family", NEITHER)
def test_images_of_unequal_tokens_are_no_frames(family: str) -> None:
    with pytest.raises(UnsupportedError, match=f"images of {family} are not known as frames"):
        dycoke.apply(model_of(family), DyCoke(), frame_source="images")


def test_tiles_of_an_image_are_no_frames() -> None:
    """InternVL's touch each other, SmolVLM's have a marker each."""
    model, inputs = model_of("internvl"), inputs_of("internvl", *ONE)
    ids = inputs["input_ids"]
    order = (ids[0] == tiny.IMAGE).long().argsort(stable=True)  # all placeholders at the end
    inputs["input_ids"] = torch.cat([ids[:, order], ids[:, -1:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(UnsupportedError, match="images that are frames must be whole"):
        compressed(model, DyCoke(), inputs, frame_source="images")
    generate(model, inputs)  # which the stock model takes

    model, inputs = model_of("smolvlm"), inputs_of("smolvlm", *ONE)
    starts = (inputs["input_ids"][0] == tiny.VISION_START).nonzero()[:, 0]
    inputs["input_ids"][0, starts] = torch.arange(1, 8)  # row 1 column 1, row 1 column 2, ...
    with pytest.raises(UnsupportedError, match="do_image_splitting=False"):
        compressed(model, DyCoke(), inputs, frame_source="images")


@both
def test_images_of_other_sizes_are_no_frames_of_one_video(family: str) -> None:
    model, inputs = model_of(family), as_images(family, [[2]], [(3, 3)])
    ids = inputs["input_ids"]
    last = int((ids[0] == tiny.IMAGE).nonzero()[-1])
    wider = torch.full((1, 2), tiny.IMAGE)  # 2 x 4 tokens, and the first has 2 x 3
    inputs["input_ids"] = torch.cat([ids[:, :last], wider, ids[:, last:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).long()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 4, 8]])
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.cat([pixels, pixels[:8]])
    with pytest.raises(UnsupportedError, match=r"images of \(2, 3\) and of \(2, 4\) tokens"):
        compressed(model, DyCoke(), inputs, frame_source="images")
    _, run = compressed(model, DyCoke(), inputs, frame_source=[1, 1])
    assert run.report is not None and [v.frames for v in run.report.samples[0].videos] == [1, 1]


def test_a_video_beside_images_keeps_its_own_tokens() -> None:
    """Undeclared, the images of a prompt with a video are text rows."""
    family = "qwen2_5_vl"
    model = model_of(family)
    video, image = inputs_of(family, *ONE), as_images(family, [[2]], [(3, 3)])
    inputs = {k: torch.cat([video[k], image[k]], 1) for k in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = torch.cat(
        [video["mm_token_type_ids"], image["mm_token_type_ids"]], 1
    )
    for name in ("pixel_values", "image_grid_thw"):
        inputs[name] = image[name]
    for name in ("pixel_values_videos", "video_grid_thw"):
        inputs[name] = video[name]
    for source, sources in ((None, ["videos"]), ("images", ["videos", "images"])):
        _, run = compressed(model, DyCoke(), inputs, frame_source=source)
        assert run.report is not None and run.report.engaged
        assert [v.source for v in run.report.samples[0].videos] == sources


def test_chunked_prefill_of_declared_images_is_refused() -> None:
    for family in FRAMED:
        model, inputs = model_of(family), inputs_of(family, *ONE)
        with pytest.raises(UnsupportedError, match=r"prefill_chunk_size|unchanged"):
            compressed(model, DyCoke(), inputs, frame_source="images", prefill_chunk_size=20)


def test_a_compression_mask_that_drops_tokens_is_refused() -> None:
    """VideoLLaMA3's own compression: refused, and untouched at ratio 0."""
    model, inputs = model_of("video_llama_3"), inputs_of("video_llama_3", *ONE)
    gone = (inputs["input_ids"][0] == tiny.VIDEO).nonzero()[7]
    inputs["video_compression_mask"][7] = False
    keep = torch.arange(inputs["input_ids"].shape[1]) != gone
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, keep]
    with pytest.raises(UnsupportedError, match="use_token_compression=False"):
        compressed(model, DyCoke(), inputs)
    plain = generate(model, inputs).sequences
    ours, _ = compressed(model, DyCoke(merge_ratio=0, prune_ratio=0), inputs)
    assert torch.equal(ours.sequences, plain)
