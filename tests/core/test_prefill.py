"""What the decoder receives at prefill: every row that stays keeps what belonged to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dycoke import DyCoke, UnsupportedError, VideoSpan
from dycoke.core.prefill import shorten
from dycoke.vision.encoder import contexts_of

BATCH, LENGTH, WIDTH = 2, 40, 6

METHOD: Any = DyCoke()


def decoder_inputs() -> tuple[dict, list[VideoSpan]]:
    """Two samples: an image at 5..8 in both, 4 frames of 5 tokens, the second left-padded by 3."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(BATCH, LENGTH).long()
    mask[1, :3] = 0
    visual = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    visual[:, 5:9] = visual[0, 10:30] = visual[1, 15:35] = True
    inputs = {
        "inputs_embeds": torch.randn(BATCH, LENGTH, WIDTH, generator=g),
        "attention_mask": mask,
        "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
        "visual_pos_masks": visual,
        "deepstack_visual_embeds": [torch.randn(48, WIDTH, generator=g) for _ in range(2)],
    }
    spans = [
        VideoSpan(b, torch.arange(20).view(4, 5) + start, (1, 5)) for b, start in ((0, 10), (1, 15))
    ]
    return inputs, spans


def test_deepstack_features_follow_their_tokens() -> None:
    inputs, spans = decoder_inputs()
    whole = []
    for layer in inputs["deepstack_visual_embeds"]:
        whole.append(torch.zeros(BATCH, LENGTH, WIDTH))
        whole[-1][inputs["visual_pos_masks"]] = layer
    rows, _ = shorten(inputs, spans, METHOD, cached=True, contexts=contexts_of(spans))
    real = rows.lower.index >= 0
    assert rows.lower.padded and inputs["visual_pos_masks"].sum() == 2 * (4 + 8)
    for full, layer in zip(whole, inputs["deepstack_visual_embeds"], strict=True):
        short = torch.zeros(*rows.source.shape, WIDTH)
        short[inputs["visual_pos_masks"]] = layer
        expected = full.gather(1, rows.source[..., None].expand(-1, -1, WIDTH))
        assert torch.equal(short, expected * real[..., None])


def test_an_unknown_row_per_token_is_refused() -> None:
    inputs, spans = decoder_inputs()
    inputs["weather"] = torch.zeros(BATCH, LENGTH)
    with pytest.raises(UnsupportedError, match="'weather', with a row per token"):
        shorten(inputs, spans, METHOD, cached=True, contexts=contexts_of(spans))
