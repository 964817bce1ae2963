"""What a family states, and what it may not need."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from support import model_of
from transformers import CONFIG_MAPPING

from dycoke import UnsupportedError
from dycoke.core import engine
from dycoke.models import Family, Prompt, families, limits, locate

FILES = {inspect.getmodule(family.layout): family for family in families().values()}
each = pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__.split(".")[-1])


def test_every_file_of_the_folder_is_a_family_and_served_once() -> None:
    folder = Path(inspect.getfile(locate)).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "locate"}
    assert {module.__name__ for module in FILES} == {f"dycoke.models.{name}" for name in names}
    assert all(module.FAMILY is family for module, family in FILES.items())
    assert sum(len(family.model_types) for family in FILES.values()) == len(families())


@each
def test_a_family_states_what_the_table_needs(module: ModuleType) -> None:
    family = FILES[module]
    assert limits(family)
    known = [name for name in family.model_types if name in CONFIG_MAPPING]
    assert known, "transformers knows none of its names"


@each
def test_a_family_is_a_small_file_and_is_tested(module: ModuleType) -> None:
    assert len(Path(inspect.getfile(module)).read_text().splitlines()) <= 60
    for name in FILES[module].model_types:
        if name in CONFIG_MAPPING:  # the oldest transformers may lack it
            assert name in tiny.FAMILIES


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_family_names_what_its_model_has(name: str) -> None:
    """A wrong name would not raise where a config, or a module, is asked for it."""
    base, family = model_of(name).base_model, families()[name]
    placeholders = {"videos": family.video_token, "images": "image_token_id"}
    tokens = [getattr(base.config, placeholders[source]) for source in family.frame_sources]
    assert tiny.FAMILIES[name].token in tokens
    assert family.rope == tiny.FAMILIES[name].rope
    if family.vision_attention is not None:
        assert base.get_submodule(family.vision_attention.replace("*", "0"))


def layout(prompt: Prompt) -> list[Any]:
    return []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "", "name must be a word"),
        ("name", None, "name must be a word"),
        ("model_types", "gemma4", "model_types must be a tuple of words, got 'gemma4'"),
        ("model_types", (), "model_types must have at least one word"),
        ("model_types", ("a", "a"), "none twice"),
        ("model_types", (None,), "model_types must be a tuple of words"),
        ("rope", "2-D", "rope must be one of '1-D', '3-D', got '2-D'"),
        ("layout", None, "layout must be a function, got None"),
        ("checkpoints", ("llava",), "checkpoints must be \"owner/name\", got 'llava'"),
        ("checkpoints", (), "checkpoints must have at least one word"),
        ("frame_sources", ("video",), "frame_sources must be one of 'videos', 'images', got"),
        ("frame_sources", ("images", "images"), "none twice"),
        ("frame_sources", (), "frame_sources must have at least one word"),
        ("vision_attention", "visual.blocks.0.attn", "vision_attention must be the path"),
        ("vision_attention", "visual.*.blocks.*.attn", "vision_attention must be the path"),
        ("vision_attention", "visual.blocks.*", "vision_attention must be the path"),
        ("vision_attention", "", "vision_attention must be the path"),
        ("encoder_order", (0, 1), "encoder_order must be a function"),
        ("masks", "causal", "masks must be a function"),
        ("video_token", "video token", "video_token must be the name of a config's field"),
        ("processor_options", {1: 2}, "processor_options must map names to values"),
        ("processor_options", None, "processor_options must map names to values"),
        ("notes", "one note", "notes must be a tuple of words"),
    ],
)
def test_a_family_is_checked(field: str, value: Any, says: str) -> None:
    fields: dict[str, Any] = {
        "name": "Made up",
        "model_types": ("made_up",),
        "rope": "1-D",
        "layout": layout,
        "checkpoints": ("nobody/made-up",),
        "vision_attention": "tower.layers.*.inner.self_attn",
    }
    assert Family(**fields).frame_sources == ("videos",)
    with pytest.raises((ValueError, TypeError)) as refused:
        Family(**fields | {field: value})
    assert says in str(refused.value)


def test_a_family_is_frozen_and_has_no_other_fields() -> None:
    family = families()["gemma4"]
    with pytest.raises(AttributeError):
        family.rope = "3-D"  # type: ignore[misc]
    with pytest.raises(TypeError, match="ROPE"):
        Family(ROPE="1-D")  # type: ignore[call-arg]


@pytest.mark.parametrize("module", [engine, locate])
def test_the_engine_knows_no_family(module: ModuleType) -> None:
    code = inspect.getsource(module).lower()
    for name, family in families().items():
        assert name not in code and family.name.lower() not in code


def prompt(ids: list[list[int]], **kwargs: Any) -> Prompt:
    return Prompt(None, torch.tensor(ids), None, {}, None, **kwargs)


def test_frames_are_those_that_the_encoder_got() -> None:
    ids = [[0, 9, 9, 0, 9, 9], [9, 9, 0, 0, 0, 0]]
    found = prompt(ids, counts=[2, 1]).cut(9, [4, 2])
    assert [(s, p.tolist()) for s, p in found] == [(0, [[1, 2], [4, 5]]), (1, [[0, 1]])]
    # A sample without images has an entry of its own.
    assert len(prompt(ids, counts=[2, 0, 1]).cut(9, [4, 0, 2])) == 2
    with pytest.raises(UnsupportedError, match="4 video tokens are not 3 frames of one size"):
        prompt(ids, counts=[3, 1]).cut(9, [4, 2])
    with pytest.raises(UnsupportedError, match="2 videos where the encoder got 3"):
        prompt(ids, counts=[1, 2, 1]).cut(9, [4, 2])
    with pytest.raises(UnsupportedError, match="nothing tells how many frames each video has"):
        prompt(ids).cut(9, [4, 2])


def test_repeated_samples_have_the_frames_of_the_first() -> None:
    """Beams repeat a prompt, and its videos' features, but not what the encoder was given."""
    three = prompt([[0]], counts=[2, 5, 3])  # two videos in sample 0, one in sample 1
    assert three.counts_of([0, 0, 1]) == [2, 5, 3]
    assert three.counts_of([0, 0, 1, 1, 2, 3]) == [2, 5, 2, 5, 3, 3]


def test_videos_fill_placeholders_in_order() -> None:
    ids = [[0, 9, 9, 9], [9, 9, 0, 9]]
    found = prompt(ids).split(9, [1, 2, 3])
    assert [(s, p.tolist()) for s, p in found] == [(0, [1]), (0, [2, 3]), (1, [0, 1, 3])]
    with pytest.raises(UnsupportedError, match="6 image placeholders where the images fill 5"):
        prompt(ids, kind="image").split(9, [5])
    with pytest.raises(UnsupportedError, match="a video runs over the end"):
        prompt(ids).split(9, [4, 2])
