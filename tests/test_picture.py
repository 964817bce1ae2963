"""The picture of a trace, checked by its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dycoke import picture
from dycoke.core.steps import SampleTrace


def sample() -> SampleTrace:
    keep = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]).bool()
    attention = [torch.tensor([0.1, 0, 0, 0, 0.3, 0.0]), torch.tensor([0.0, 0, 0, 0.1, 0, 0.5])]
    return SampleTrace([keep], [torch.ones(6).bool()] * 2, attention)


def test_mass_by_frame() -> None:
    mass = picture.attention_by_frame(sample())
    np.testing.assert_allclose(mass, [[0.1, 0.3, 0.0], [0.1, 0.0, 0.5]], atol=1e-7)
    two = SampleTrace([sample().keep[0][:2], sample().keep[0][2:]], [], sample().attention)
    np.testing.assert_allclose(picture.attention_by_frame(two), mass)


def test_merged_tokens_are_dimmed_and_attention_is_drawn() -> None:
    frames = np.full((3, 40, 40, 3), 200, dtype=np.uint8)
    image = np.asarray(picture.draw(frames, sample(), ["a", "b", "c"], "two\nlines", (2, 2)))
    top = picture.MARGIN + 3 * picture.ROW
    for f, row in enumerate(sample().keep[0].view(3, 2, 2)):
        for r in range(2):
            for c in range(2):
                y = top + (2 * r + 1) * picture.CELL // 4
                x = picture.LABEL + f * picture.CELL + (2 * c + 1) * picture.CELL // 4
                value = image[y, x, 0]
                assert value == pytest.approx(200 if row[r, c] else 200 * picture.DIM, abs=3)
    below = top + picture.CELL + picture.MARGIN + picture.ROW // 2
    heat = [
        [
            int(image[below + s * picture.ROW, picture.LABEL + f * picture.CELL + 40, 1])
            for f in range(3)
        ]
        for s in range(2)
    ]
    # More attention, less green; none is white, and the darkest is the largest.
    assert heat[1][1] == heat[0][2] == 255
    assert heat[1][2] == picture.HEAT[1]
    assert 255 > heat[0][0] == heat[1][0] > heat[0][1] > heat[1][2]
