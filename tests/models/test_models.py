"""What a family's file states, and what it may not need."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from dycoke import UnsupportedError, finder
from dycoke.core import engine
from dycoke.models import Prompt, families, frame_kinds, limits

FILES = {module.__name__.split(".")[-1]: module for module in families().values()}
each = pytest.mark.parametrize("family", FILES.values(), ids=list(FILES))


@each
def test_a_family_states_what_the_table_needs(family: ModuleType) -> None:
    assert family.ROPE in ("1-D", "3-D")
    assert family.NAME and family.CHECKPOINTS and limits(family)
    assert all("/" in checkpoint for checkpoint in family.CHECKPOINTS)
    assert not isinstance(getattr(family, "NOTES", ()), str)
    assert set(frame_kinds(family)) <= {"videos", "images"}
    known = [name for name in family.MODEL_TYPES if name in CONFIG_MAPPING]
    assert known, "transformers knows none of its names"


@each
def test_a_family_is_a_small_file_and_is_tested(family: ModuleType) -> None:
    assert len(Path(inspect.getfile(family)).read_text().splitlines()) <= 60
    for name in family.MODEL_TYPES:
        if name in CONFIG_MAPPING:  # the oldest transformers may lack it
            assert name in tiny.FAMILIES


@pytest.mark.parametrize("module", [engine, finder])
def test_the_engine_knows_no_family(module: ModuleType) -> None:
    code = inspect.getsource(module).lower()
    for name, family in families().items():
        assert name not in code and family.NAME.lower() not in code


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
