"""The vision encoder in chunks of frames: the same features, and no more frames at once."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, families, generate, inputs_of, model_of, untouched

from dycoke import DyCoke
from dycoke.encoding import encode_in_chunks

CLIPS = {
    "one": ([[9]], [(5, 7)]),
    "two in a prompt": ([[5, 5]], [(5, 7)]),
    "batch": ([[5], [5]], [(5, 7), (2, 3)]),
}


@families
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("frames", [2, 4])
def test_chunks_give_the_same(family: str, clip: str, frames: int) -> None:
    model, inputs = model_of(family), inputs_of(family, *CLIPS[clip])
    settings = DyCoke(merge_ratio=0, prune_ratio=1e-9)
    for run in (generate, lambda m, i: compressed(m, settings, i)[0]):
        whole = run(model, inputs)
        with untouched(model), encode_in_chunks(model, frames):
            output = run(model, inputs)
        assert torch.equal(output.sequences, whole.sequences)
        close(torch.cat(output.logits), torch.cat(whole.logits), 1e-4)


@families
@torch.no_grad()
def test_features_and_how_many_frames_at_once(family: str) -> None:
    if tiny.FAMILIES[family].images:
        pytest.skip("its frames are images, which are encoded as the model does it")
    model, inputs = model_of(family), inputs_of(family, *CLIPS["one"])
    known = inspect.signature(model.base_model.get_video_features).parameters
    given = {k: v for k, v in inputs.items() if k in known}
    if "pixel_values_videos" not in known:  # the older name of the same
        given["pixel_values"] = inputs["pixel_values_videos"]
    sizes: list[int] = []
    whole = model.base_model.get_video_features(**given, return_dict=True)

    inner = model.base_model.get_video_features

    @functools.wraps(inner)
    def count(*args: Any, **kwargs: Any) -> Any:
        sizes.append(next(v for k, v in kwargs.items() if k.startswith("pixel_values")).numel())
        return inner(*args, **kwargs)

    model.base_model.get_video_features = count
    try:
        with encode_in_chunks(model, 4):
            signature = inspect.signature(model.base_model.get_video_features)
            chunked = model.base_model.get_video_features(**given, return_dict=True)
    finally:
        del model.base_model.get_video_features
    pixels = next(v for k, v in given.items() if k.startswith("pixel_values"))
    if sizes != [pixels.numel()]:  # a form that is encoded whole
        assert len(sizes) == 3 and sum(sizes) == pixels.numel()
    assert list(signature.parameters) == list(known)
    for a, b in zip(chunked.pooler_output, whole.pooler_output, strict=True):
        close(a, b, 1e-5)


@families
def test_beams_over_chunks(family: str) -> None:
    """What generate repeats for beams has lost its unused hidden states."""
    model, inputs = model_of(family), inputs_of(family, *CLIPS["one"])
    whole, _ = compressed(model, DyCoke(), inputs, num_beams=2)
    with encode_in_chunks(model, 2):
        output, _ = compressed(model, DyCoke(), inputs, num_beams=2)
    assert torch.equal(output.sequences, whole.sequences)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        with encode_in_chunks(model_of("llava_onevision"), 1):
            pass
