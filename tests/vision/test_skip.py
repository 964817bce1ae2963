"""The vision encoder without the cells that merging drops: the rule, and the hooks by an oracle.

The oracle computes all rows of the stock encoder, and overwrites those that left by their
counterparts' in front of every block from the first one on, and behind the last.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import standin
import tiny
import torch
from support import close, compressed, exact, generate, inputs_of, model_of, untouched
from torch import Tensor

from dycoke import DyCoke, UnsupportedError
from dycoke.merging import merge_mask
from dycoke.models import family_of
from dycoke.vision import encoder, skip
from dycoke.vision.chunks import encode_in_chunks
from dycoke.vision.skip import answering, computed_cells, square_cells

pytestmark = exact

FAMILIES = [name for name in tiny.FAMILIES if name != "gemma4"]
families = pytest.mark.parametrize("family", FAMILIES)


def counterpart(frame: int, window: int) -> int:
    place = frame % window
    return frame - 1 if place % 2 else frame - place


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(("frames", "window"), [(1, 4), (7, 4), (8, 3), (9, 6), (5, 1)])
def test_the_cells_that_changed_least_leave(
    frames: int, window: int, ratio: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    still = torch.randn(12, 5, generator=g, dtype=torch.float64)
    states = still + 0.3 * torch.randn(frames, 12, 5, generator=g, dtype=torch.float64)
    states[frames // 2 :] += 1.5 * torch.randn(12, 5, generator=g, dtype=torch.float64)
    members = torch.arange(12).view(4, 3)
    made = computed_cells(states, members, ratio, window)
    answers = answering(made, window)
    for f in range(frames):
        other = counterpart(f, window)
        apart = [(states[f, p] - states[other, p]).square().sum() for p in range(12)]
        spread = sum(
            (states[h, p] - states[h].mean(0)).square().sum() for h in (f, other) for p in range(12)
        )
        change = [float(sum(apart[p] for p in row)) for row in members.tolist()]
        count = int((1 - ratio) * 4 + 1e-6)
        expected = set(sorted(range(4), key=lambda c: (-change[c], -c))[:count])
        if other == f or sum(apart) > skip.CUT * spread:
            expected = set(range(4))
        assert set(made[f].nonzero()[:, 0].tolist()) == expected
        for c in range(4):
            root = f
            while not made[root, c]:
                root = counterpart(root, window)
            assert int(answers[f, c]) == root


@pytest.mark.parametrize(("patches", "tokens"), [(6, 3), (12, 6), (8, 2), (27, 14), (5, 3), (4, 4)])
def test_cells_are_what_pooling_reads(patches: int, tokens: int) -> None:
    """A token's features change where, and only where, a patch of its cell does."""
    cells = square_cells(patches, tokens)
    assert len(cells) == tokens**2
    for p in range(patches**2):
        image = torch.zeros(1, 1, patches, patches, dtype=torch.float64)
        image.view(-1)[p] = 1.0
        if patches % tokens:
            pooled = torch.nn.functional.interpolate(
                image, size=(tokens, tokens), mode="bilinear", align_corners=False
            )
        else:
            pooled = torch.nn.functional.adaptive_avg_pool2d(image, tokens)
        reads = {c for c in range(tokens**2) if p in cells[c].tolist()}
        assert set(pooled.flatten().nonzero()[:, 0].tolist()) <= reads


def test_a_cell_counts_as_computed_where_its_patches_are(monkeypatch: Any) -> None:
    """Of a square of 5 pooled to 4, neighbours may compute all patches of a cell between them."""
    model = model_of("llava_onevision")
    with DyCoke(skip_ratio=0.5)(model) as run:
        skips = run._engine.skips
        assert skips is not None and skips.family is not None
        skips.family = replace(skips.family, token_side=lambda config, side: 4)
        cells = square_cells(5, 4)
        for chosen, more in (([0, 2, 8, 10], {1, 4, 5, 6, 9}), ([5], set()), ([0, 15], set())):
            made = torch.zeros(2, 16, dtype=torch.bool)
            made[0], made[1, chosen] = True, True
            monkeypatch.setattr(encoder, "computed_cells", lambda *_, made=made: made)
            work = encoder._Work([2], None)
            kept = skips._choose(work, torch.randn(2, 25, 4))
            assert kept is not None
            patches = {p for c in chosen for p in cells[c].tolist()}
            expected = [set(row) <= patches for row in cells.tolist()]
            assert {c for c in range(16) if expected[c]} == {*chosen, *more}
            assert work.masks[0][1].tolist() == expected and work.masks[0][0].all()
            assert int(kept[1].sum()) == len(patches)


def features(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Features of what the inputs hold, as the model takes them."""
    base = model.base_model
    if "pixel_values" in inputs:
        known = {"pixel_values": inputs["pixel_values"]}
        output = base.get_image_features(**known, return_dict=True)
    else:
        names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")
        known = {name: inputs[name] for name in names if name in inputs}
        output = base.get_video_features(*known.values(), return_dict=True)
    deep = getattr(output, "deepstack_features", None) or []
    # The oldest supported release joins a level's videos.
    levels = [[level] if isinstance(level, Tensor) else level for level in deep]
    rows = [*output.pooler_output, *(r for level in levels for r in level)]
    return [r.reshape(-1, r.shape[-1]) for r in rows], output


def answers_of(work: Any) -> Tensor:
    """The row that answers for each row of the encoder, by loops over the chosen cells."""
    rows: list[int] = []
    for number, (mask, frames) in enumerate(zip(work.masks, work.videos, strict=True)):
        if work.cells is None:
            length = work.shape[1]
            side = math.isqrt(length)
            tokens = math.isqrt(mask.shape[1])
            first, step = length - side**2, side // tokens
            assert side % tokens == 0  # cells of these tiny encoders share no patches
            cell_of = {
                first + y * side + x: (y // step) * tokens + x // step
                for y in range(side)
                for x in range(side)
            }
        else:
            size = work.cells[number].shape[1]
            length = mask.shape[1] * size
            cell_of = {p: p // size for p in range(length)}
        start = len(rows)
        for f in range(frames):
            for p in range(length):
                root = f
                while p in cell_of and not mask[root, cell_of[p]]:
                    root = counterpart(root, 4)
                rows.append(start + root * length + p)
    return torch.tensor(rows)


@contextlib.contextmanager
def overwritten(skips: Any, work: Any) -> Iterator[None]:
    """The oracle's hooks: rows that left are those of the computed rows that answer for them."""
    row_of = answers_of(work)

    def filled(states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        return rows[row_of].view(states.shape)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (filled(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": filled(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        return (filled(output[0]), *output[1:]) if isinstance(output, tuple) else filled(output)

    hooks = [b.register_forward_pre_hook(before, with_kwargs=True) for b in skips.blocks]
    # In front of every block and behind the last one; behind each, for what is taken in between.
    hooks += [b.register_forward_hook(after, prepend=True) for b in skips.blocks]
    yield
    for hook in hooks:
        hook.remove()


def skipped(
    model: Any, inputs: dict[str, Any], method: DyCoke, source: Any
) -> tuple[list[Tensor], Any, Any, Any]:
    """Features with cells left out, the encoder's output, the hooks, and what they chose."""
    seen: list[Any] = []
    choose = encoder.Skips._choose

    def noted(self: Any, work: Any, states: Tensor) -> Any:
        keep = choose(self, work, states)
        seen.append(work)
        return keep

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(encoder.Skips, "_choose", noted)
        with method(model, frame_source=source) as run:
            made, output = features(model, inputs)
            skips = run._engine.skips
    return made, output, skips, seen[0]


CASES = {"one": [[7]], "two videos": [[5, 5]], "a batch": [[8], [8]], "short": [[2]], "odd": [[9]]}


@families
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("layer", [0, 1])
def test_features_equal_the_oracles(family: str, kind: str, layer: int) -> None:
    videos = CASES[kind]
    if family == "llava_next_video":
        layer = 0  # its features come from the first of the tiny encoder's two layers
    inputs = inputs_of(family, videos, [(5, 7), (3, 4)][: len(videos)], seed=1)
    source, model = tiny.FAMILIES[family].frame_source(videos), model_of(family)
    if isinstance(source, list) or (tiny.FAMILIES[family].images and len(videos) > 1):
        source = [n for sample in videos for n in sample]
    method = DyCoke(skip_ratio=0.6, skip_layer=layer)
    with torch.no_grad():
        stock, _ = features(model, inputs)
    with untouched(model):
        made, output, skips, work = skipped(model, inputs, method, source)
    assert work.keep is None and work.stand is not None  # given back, and something left
    with torch.no_grad(), overwritten(skips, work):
        expected, _ = features(model, inputs)
    for a, b in zip(made, expected, strict=True):
        close(a, b)
    assert any(not torch.allclose(a, b) for a, b in zip(made, stock, strict=True))
    notes = [note for (note,) in output.encoded]
    frames = [n for sample in videos for n in sample]
    tokens = tiny.FAMILIES[family].tokens_per_frame
    assert sum(len(note) for note in notes) == sum(frames)
    count = int(0.4 * tokens + 1e-6)
    start = 0
    everything = torch.cat(notes)
    for length in frames:
        for f in range(length):
            own = everything[start + f]
            assert own.all() if f % 4 == 0 else own.sum() in (count, tokens)
        start += length


def test_notes_are_in_the_order_of_the_prompt() -> None:
    """A token that was left out has the features of the token at its own place, and others not.

    Several windows of Qwen2.5-VL's encoder in a slice, so that its order is not the prompt's.
    """
    model, (frames, height, width) = model_of("qwen2_5_vl"), (5, 8, 12)
    vision = model.config.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    g = torch.Generator().manual_seed(0)
    still = torch.randn(height * width, channels, generator=g)
    change = torch.randn(frames, height * width, channels, generator=g)
    pixels = (still + 0.3 * change).flatten(0, 1)
    grid = torch.tensor([[frames, height, width]])
    order = family_of(model.config).encoder_order
    assert order is not None
    assert not torch.equal(order(vision, (1, 4, 6)), torch.arange(24))
    with DyCoke(skip_ratio=0.5)(model), torch.no_grad():
        output = model.base_model.get_video_features(pixels, grid, return_dict=True)
    ((encoded,),) = output.encoded
    made = torch.cat(list(output.pooler_output)).view(frames, 24, -1)
    assert encoded.shape == (frames, 24) and not encoded.all()
    for f in range(frames):
        for n in range(24):
            same = torch.allclose(made[f, n], made[counterpart(f, 4), n])
            assert bool(encoded[f, n]) != same or f % 4 == 0


def test_anchors_that_were_not_computed_are_noticed() -> None:
    """Two prompts' images, taken for one video, whose windows do not end where the first does."""
    model = model_of("internvl")
    inputs = inputs_of("internvl", [[6], [6]], [(5, 7), (3, 4)])
    with pytest.raises(UnsupportedError, match=r"encoded as a part of another one.* frame_source"):
        compressed(model, DyCoke(skip_ratio=0.6), inputs, 2, frame_source="images")
    output, run = compressed(model, DyCoke(skip_ratio=0.6), inputs, 2, frame_source=[6, 6])
    assert run.report.engaged and len(output.logits) == 2


def test_what_was_not_encoded_leaves_before_what_is_most_alike() -> None:
    features = torch.randn(4, 10, 5, dtype=torch.float64)
    features[1:, :5] = features[0, :5]  # the first five never change
    encoded = torch.ones(4, 10, dtype=torch.bool)
    assert not merge_mask(features, 0.5)[1:, :5].any()
    encoded[1:, 5:] = False
    keep = merge_mask(features, 0.5, encoded=encoded)
    assert keep[0].all() and keep[1:, :5].all() and not keep[1:, 5:].any()


@families
def test_anchors_are_those_of_the_whole_encoder(family: str) -> None:
    inputs, model = inputs_of(family, [[6]], [(5, 7)]), model_of(family)
    source = tiny.FAMILIES[family].frame_source([[6]])
    with torch.no_grad():
        stock, _ = features(model, inputs)
        made, _, _, _ = skipped(model, inputs, DyCoke(skip_ratio=0.7), source)
    for a, b in zip(made, stock, strict=True):
        if tiny.FAMILIES[family].images and len(stock) > 1:
            continue  # an image each, which the next lines join
        size = tiny.FAMILIES[family].tokens_per_frame
        for anchor in (0, 4):
            part = slice(anchor * size, (anchor + 1) * size)
            close(a[part], b[part])
    if tiny.FAMILIES[family].images and len(stock) > 1:
        close(made[0], stock[0])
        close(made[4], stock[4])


@families
def test_nothing_left_out_is_stock_to_the_bit(family: str, monkeypatch: Any) -> None:
    inputs, model = inputs_of(family, [[5]], [(5, 7)]), model_of(family)
    source = tiny.FAMILIES[family].frame_source([[5]])
    plain, _ = compressed(model, DyCoke(), inputs, 3, frame_source=source)
    monkeypatch.setattr(skip, "CUT", -1.0)  # every frame stands behind a cut
    output, run = compressed(model, DyCoke(skip_ratio=0.5), inputs, 3, frame_source=source)
    assert torch.equal(torch.cat(output.logits), torch.cat(plain.logits))
    video = run.report.samples[0].videos[0]
    assert video.encoded_tokens == video.visual_tokens and video.encoded_share == 1


@families
@pytest.mark.parametrize("more", [{}, {"echo": 0.6, "echo_exact": 1, "score_layer": 3}])
def test_what_was_not_encoded_leaves(family: str, more: dict[str, Any]) -> None:
    """By the mask alone: half of a frame is left out, and merging takes that and one more."""
    inputs, model = inputs_of(family, [[7]], [(5, 7)]), model_of(family)
    source = tiny.FAMILIES[family].frame_source([[7]])
    method = DyCoke(skip_ratio=0.5, **more)
    with method(model, trace=True, frame_source=source) as run, torch.no_grad():
        generate(model, inputs, 3)
    assert run.trace is not None and run.report is not None
    (keep,), (encoded,) = run.trace.samples[0].keep, run.trace.samples[0].encoded
    assert not (keep & ~encoded).any()
    video = run.report.samples[0].videos[0]
    assert video.encoded_tokens == int(encoded.sum()) < video.visual_tokens
    assert video.kept_tokens == int(keep.sum()) < video.encoded_tokens
    assert f"encoded   {video.encoded_tokens} (" in str(run.report)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("limit", [4, 6, 9, 2])
def test_chunks_are_whole_windows(family: str, limit: int) -> None:
    videos = [[11]]
    inputs, model = inputs_of(family, videos, [(5, 7)]), model_of(family)
    source = tiny.FAMILIES[family].frame_source(videos)
    method = DyCoke(skip_ratio=0.6)
    whole, _ = compressed(model, method, inputs, 3, frame_source=source)
    calls: list[int] = []
    choose = encoder.Skips._choose

    def noted(self: Any, work: Any, states: Tensor) -> Any:
        calls.append(sum(work.videos))
        return choose(self, work, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.Skips, "_choose", noted)
        with method(model, frame_source=source), encode_in_chunks(model, limit):
            output = generate(model, inputs, 3)
    assert len(calls) > 1 and all(n % 4 == 0 for n in calls[:-1]) and sum(calls) == 11
    for a, b in zip(output.logits, whole.logits, strict=True):
        close(a, b)
    with (
        encode_in_chunks(model, limit),
        pytest.raises(UnsupportedError, match="enter it inside the block"),
        method(model, frame_source=source),
    ):
        pass


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("backend", ["eager", standin.NAME])
def test_the_backend_does_not_matter(family: str, backend: str) -> None:
    inputs = inputs_of(family, [[7]], [(5, 7)])
    expected, _ = compressed(model_of(family), DyCoke(skip_ratio=0.6), inputs, 3)
    output, _ = compressed(model_of(family, backend), DyCoke(skip_ratio=0.6), inputs, 3)
    for a, b in zip(output.logits, expected.logits, strict=True):
        close(a, b)


def test_images_stay_whole() -> None:
    """A picture beside a video is encoded as ever."""
    model = model_of("qwen2_5_vl")
    grid = torch.tensor([[1, 4, 6]])
    patch = model.config.vision_config.patch_size
    pixels = torch.randn(24, 3 * 2 * patch**2)
    with torch.no_grad():
        stock = model.base_model.get_image_features(pixels, grid, return_dict=True)
        with DyCoke(skip_ratio=0.6)(model):
            made = model.base_model.get_image_features(pixels, grid, return_dict=True)
    assert not hasattr(made, "encoded")
    for a, b in zip(made.pooler_output, stock.pooler_output, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"skip_ratio": 0.8}, ValueError, "skip_ratio=0.8 must not be above merge_ratio=0.7"),
        ({"skip_ratio": -0.1}, ValueError, r"skip_ratio must be .*\[0, 1\)"),
        ({"skip_ratio": 0.5, "merge": "mean"}, ValueError, "merge='mean' needs the features"),
        ({"skip_ratio": 0.5, "token_budget": 0.2}, ValueError, "a token_budget needs the features"),
        ({"skip_ratio": 0.5, "skip_layer": -1}, ValueError, "skip_layer must be at least 0"),
        ({"skip_layer": 1.5}, TypeError, "skip_layer must be"),
    ],
)
def test_bad_settings(values: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        DyCoke(**values)


def test_what_cannot_work_is_refused() -> None:
    gemma, llava = model_of("gemma4"), model_of("llava_onevision")
    with pytest.raises(UnsupportedError, match="is not known for gemma4"), DyCoke(skip_ratio=0.5)(gemma):  # fmt: skip  # noqa: E501
        pass
    with (
        pytest.raises(UnsupportedError, match=r"skip_layer=7: .* choose 0 to"),
        DyCoke(skip_ratio=0.5, skip_layer=7)(llava),
    ):
        pass
    inputs = inputs_of("llava_onevision", [[6]], [(5, 7)])
    with (
        DyCoke(skip_ratio=0.5)(llava),
        torch.enable_grad(),
        pytest.raises(UnsupportedError, match="is for inference"),
    ):
        features(llava, inputs)
