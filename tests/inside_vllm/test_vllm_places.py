"""Counts and positions of dycoke.vllm, which need no vLLM: against masks, and a naive placing."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dycoke import DyCoke
from dycoke.errors import UnsupportedError
from dycoke.methods import EVS, RandomTokens
from dycoke.vllm.counts import keep_mask, kept_count, parse
from dycoke.vllm.places import Media, Placing, columns, decode, encode, put, tag, whole_positions

VIDEO, TEXT = 7, 1


@pytest.mark.parametrize(("frames", "tokens"), [(1, 9), (4, 16), (5, 7), (13, 25)])
@pytest.mark.parametrize(
    "method",
    [
        DyCoke(prune_ratio=0),
        DyCoke(merge_ratio=0.9, window=3, prune_ratio=0),
        DyCoke(token_budget=0.2, prune_ratio=0),
        RandomTokens(prune_ratio=0),
        EVS(ratio=0.6),
    ],
    ids=repr,
)
def test_as_many_stay_as_the_prompt_has_places(method: DyCoke, frames: int, tokens: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        keep = keep_mask(method, torch.randn(frames * tokens, 8), frames)
        assert int(keep.sum()) == kept_count(method, frames, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_travel_exactly(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 255, 256], [65_535, 65_536, 256**3 - 1]])
    assert decode(encode(numbers).to(dtype)).tolist() == numbers.tolist()
    with pytest.raises(ValueError, match="shorter video"):
        encode(torch.tensor([[256**3]]))


@pytest.mark.parametrize("seed", range(6))
def test_positions_are_those_of_the_whole_prompt(seed: int) -> None:
    """Two videos with text around, chunks of any size, and what was computed again."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(4, 20, (2,), generator=generator).tolist()
    kept = [sorted(torch.randperm(n, generator=generator)[: n // 2].tolist()) for n in sizes]
    for places, n in zip(kept, sizes, strict=True):
        places[-1] = n - 1  # As a newline's row stays.
    texts = torch.randint(0, 4, (3,), generator=generator).tolist()
    texts[2] += 1
    whole: list[int] = []
    tokens: list[int] = []
    media, rows = [], []
    for text, n, places in zip(texts, sizes, kept, strict=False):
        tokens += [TEXT] * text
        whole += range(len(whole) and whole[-1] + 1, (len(whole) and whole[-1] + 1) + text)
        start = whole[-1] + 1 if whole else 0
        media.append(Media(len(tokens), len(places), [VIDEO] * n))
        tokens += [VIDEO] * len(places)
        whole += [start + p for p in places]
        rows.append(tag(torch.zeros(len(places), 2), torch.tensor(places)[:, None].expand(-1, 3)))
    end = whole[-1] + 1
    whole += range(end, end + texts[2])
    tokens += [TEXT] * texts[2]
    positions, delta = whole_positions(
        tokens, media, lambda ids, _: torch.arange(len(ids)).expand(3, -1)
    )
    assert delta == whole[-1] + 1 - len(tokens)
    for _ in range(2):
        step = int(torch.randint(1, 9, (1,), generator=generator))
        for computed in range(0, len(tokens), step):
            pieces = []
            for item, features in zip(media, rows, strict=True):
                low = max(computed - item.offset, 0)
                high = min(computed + step - item.offset, item.length)
                if low < high:
                    pieces.append(features[low:high])
            stripped, positions, again = put([*tokens], [VIDEO], pieces, positions, computed)
            assert again == delta
            assert [*map(len, stripped)] == [*map(len, pieces)]
            assert all(piece.shape[1] == 2 for piece in stripped)
        assert positions.tolist() == [whole] * 3


def test_a_models_own_rule_places_the_whole_prompt() -> None:
    """A stock class of which a video's frames have one time each: text begins after the last."""

    @dataclass(frozen=True)
    class Place:
        offset: int
        length: int

    @dataclass(frozen=True)
    class Feature:
        mm_position: Place

    class Stock:
        config = SimpleNamespace(image_token_id=6, video_token_id=VIDEO)

        def get_mrope_input_positions(self, tokens: list[int], media: list[Any]) -> Any:
            (place,) = (feature.mm_position for feature in media)
            video = torch.arange(12) // 4 + place.offset  # three frames of four
            rest = torch.arange(len(tokens) - place.offset - 12) + place.offset + 3
            positions = torch.cat([torch.arange(place.offset), video, rest]).expand(3, -1)
            return positions.int(), 0

    class Ours(Placing, Stock):
        def media_of(self, tokens: list[int], feature: Any) -> Media:
            place = feature.mm_position
            return Media(place.offset, place.length, [VIDEO] * 12)

    model, tokens = Ours(), [TEXT] * 2 + [VIDEO] * 5 + [TEXT] * 3
    positions, delta = model.get_mrope_input_positions(tokens, [Feature(Place(2, 5))])
    # Cells 0 to 3 of frame 0, and one of frame 2.
    rows = tag(torch.zeros(5, 2), torch.tensor([0, 0, 0, 0, 2])[:, None].expand(-1, 3))
    assert positions[0, -3:].tolist() == [5, 6, 7]
    assert delta == 8 - 10
    for pieces, computed in (([rows[:3]], 0), ([rows[3:]], 5)):
        _, positions, again = model.recompute_mrope_positions(tokens, pieces, positions, computed)
        assert again == delta
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 4, 5, 6, 7]] * 3


def test_rows_of_text_lead() -> None:
    """Qwen3-VL: a frame's time and start are rows of the media, before its first placeholder."""
    offsets = torch.tensor([[0], [1], [2], [2], [3]]).expand(-1, 3)
    piece = torch.cat([torch.zeros(5, 2), columns(offsets, lead=2).float()], 1)
    tokens = [TEXT, TEXT, TEXT, TEXT, VIDEO, VIDEO, TEXT, TEXT]
    positions = torch.arange(8).expand(3, -1)
    _, placed, _ = put(tokens, [VIDEO], [piece], positions, 0)
    assert placed[0].tolist() == [0, 1, 2, 3, 4, 4, 5, 7]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{", ValueError, "no JSON"),
        ("[1]", ValueError, "JSON object"),
        ('{"merge_ratio": 2}', ValueError, "merge_ratio"),
        ('{"method": "nobody"}', ValueError, "unknown method"),
        ('{"off": true}', ValueError, "unset it"),
        ('{"method": "vidcom2"}', UnsupportedError, "dycoke serve"),
        ('{"method": "dycoke+"}', UnsupportedError, "not possible inside vLLM"),
        ('{"prune_ratio": 0.7}', UnsupportedError, "rows per step"),
        ('{"merge": "mean"}', UnsupportedError, "merge='mean'"),
        ('{"token_budget": 300}', UnsupportedError, "token_budget=0.3"),
    ],
)
def test_what_vllm_cannot_have_is_refused(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse(text)
    assert parse('{"merge_ratio": 0.5}') == DyCoke(merge_ratio=0.5, prune_ratio=0)
    assert parse('{"method": "dycoke"}') == parse("{}") == DyCoke(prune_ratio=0)
    assert parse('{"method": "random", "seed": 3}') == RandomTokens(prune_ratio=0, seed=3)
