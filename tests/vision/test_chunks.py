"""The vision encoder in chunks of frames: the same features, and no more frames at once."""

from __future__ import annotations

import functools
import inspect
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, families, generate, inputs_of, model_of, untouched

from dycoke import DyCoke
from dycoke.vision import memory
from dycoke.vision.chunks import encode_in_chunks

pytestmark = exact

CLIPS = {
    "one": ([[9]], [(5, 7)]),
    "two in a prompt": ([[5, 5]], [(5, 7)]),
    "batch": ([[5], [5]], [(5, 7), (2, 3)]),
    "many short": ([[2, 2], [2, 2]], [(5, 7), (2, 3)]),
}
UNEQUAL = [name for name, family in tiny.FAMILIES.items() if family.unequal_videos]
clips = pytest.mark.parametrize("clip", CLIPS)


def chunked(model: Any, inputs: dict[str, Any], frames: Any) -> tuple[Any, Any, list[Any]]:
    """The encoder's outputs, whole and in chunks, and the pixels of each call in chunks."""
    images = "pixel_values" in inputs
    name = "get_image_features" if images else "get_video_features"
    known = inspect.signature(getattr(model.base_model, name)).parameters
    given = {k: v for k, v in inputs.items() if k in known}
    if not images and "pixel_values_videos" not in known:  # the older name of the same
        given["pixel_values"] = inputs["pixel_values_videos"]
    whole = getattr(model.base_model, name)(**given, return_dict=True)
    calls: list[Any] = []
    inner = getattr(model.base_model, name)

    @functools.wraps(inner)
    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(next(v for k, v in kwargs.items() if k.startswith("pixel_values")))
        return inner(*args, **kwargs)

    setattr(model.base_model, name, count)
    try:
        with encode_in_chunks(model, frames):
            parts = getattr(model.base_model, name)
            assert list(inspect.signature(parts).parameters) == list(known)
            return parts(**given, return_dict=True), whole, calls
    finally:
        delattr(model.base_model, name)


def frame_vectors(family: str, pixels: Any) -> list[Any]:
    """The frames of an encoder's input, each as one vector; padding images left out."""
    if pixels.ndim == 2:  # packed, 4 x 6 patches in each
        return list(pixels.unflatten(0, (-1, 24)).flatten(1))
    own = 2 if family == "gemma4" else 3  # dimensions of a frame
    frames = pixels.flatten(0, -own - 1) if pixels.ndim > own + 1 else pixels
    return [frame.flatten() for frame in frames if (frame != 0).any()]


def same(ours: Any, whole: Any) -> None:
    """The same features but for rounding, in the same form; deeper ones, too."""
    levels = [
        [o.pooler_output, *(getattr(o, "deepstack_features", None) or [])] for o in (ours, whole)
    ]
    for a, b in zip(*levels, strict=True):
        assert len(a) == len(b)
        assert isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)
        for x, y in zip(a, b, strict=True):
            close(x, y)


@families
@clips
@pytest.mark.parametrize("frames", [2, 4])
def test_chunks_give_the_same(family: str, clip: str, frames: int) -> None:
    model, inputs = model_of(family), inputs_of(family, *CLIPS[clip])
    declared = tiny.FAMILIES[family].frame_source(CLIPS[clip][0])
    settings = DyCoke(merge_ratio=0, prune_ratio=1e-9)
    for run in (generate, lambda m, i: compressed(m, settings, i, frame_source=declared)[0]):
        whole = run(model, inputs)
        with untouched(model), encode_in_chunks(model, frames):
            output = run(model, inputs)
        assert torch.equal(output.sequences, whole.sequences)
        close(torch.cat(output.logits), torch.cat(whole.logits))


@families
@clips
@pytest.mark.parametrize("frames", [2, 4, 5])
@torch.no_grad()
def test_no_more_frames_at_once_and_in_order(family: str, clip: str, frames: int) -> None:
    """Of all videos together, in the order of videos and their frames, and none twice."""
    model, inputs = model_of(family), inputs_of(family, *CLIPS[clip])
    ours, whole, calls = chunked(model, inputs, frames)
    same(ours, whole)
    at_once = [frame_vectors(family, pixels) for pixels in calls]
    assert len(at_once) > 1 and max(map(len, at_once)) <= frames
    pixels = inputs["pixel_values" if "pixel_values" in inputs else "pixel_values_videos"]
    expected = frame_vectors(family, pixels)
    assert len(expected) == sum(map(sum, CLIPS[clip][0]))
    assert torch.equal(torch.stack([*chain(*at_once)]), torch.stack(expected))


@pytest.mark.parametrize("family", UNEQUAL)
@torch.no_grad()
def test_unequal_videos(family: str) -> None:
    """A chunk may hold the end of one video and the whole of the next."""
    model = model_of(family)
    inputs = inputs_of(family, [[7, 2], [1], [3]], [(5, 7), (2, 3), (1, 1)])
    for frames in (2, 3, 4, 6):
        ours, whole, calls = chunked(model, inputs, frames)
        same(ours, whole)
        at_once = [len(frame_vectors(family, pixels)) for pixels in calls]
        assert sum(at_once) == 13 and max(at_once) <= frames
        assert len(at_once) < 13 / frames * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3"])
@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_grids_and_merge_sizes_stay_with_their_videos(family: str, kind: str) -> None:
    model = model_of(family)
    slices = [1, 1, 1, 1, 1] if kind == "image" else [2, 1, 3, 1, 2]
    sides = [(4, 6), (2, 4), (4, 4), (6, 2), (2, 2)]
    grids = torch.tensor([[t, *side] for t, side in zip(slices, sides, strict=True)])
    width = inputs_of(family, *CLIPS["one"])["pixel_values_videos"].shape[-1]
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(int(grids.prod(1).sum()), width, generator=g)
    inputs = {f"{kind}_grid_thw": grids, f"{kind}_merge_sizes": torch.tensor([2, 1, 2, 1, 1])}
    inputs["pixel_values" if kind == "image" else "pixel_values_videos"] = pixels
    for frames in (2, 3):
        ours, whole, calls = chunked(model, inputs, frames)
        same(ours, whole)
        assert len(calls) == -(-sum(slices) // frames)
        assert torch.equal(torch.cat(calls), pixels)


@families
@torch.no_grad()
def test_auto_takes_what_fits_in_half_of_free_memory(family: str, monkeypatch: Any) -> None:
    model, inputs = model_of(family), inputs_of(family, *CLIPS["one"])
    numbers = []
    for free in (1, 3e5, 1e6, 1e12):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: int(free))
        ours, whole, calls = chunked(model, inputs, "auto")
        same(ours, whole)
        numbers.append(len(calls))
    assert numbers[0] == 5  # two at once, even where nothing is free
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 1
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert len(chunked(model, inputs, "auto")[2]) == 1  # 9 frames, below the fallback


def test_how_many_frames_fit(monkeypatch: Any) -> None:
    """Against the formula, written out for LLaVA-OneVision's encoder, and never fewer with more."""
    vision = SimpleNamespace(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26)
    config = SimpleNamespace(vision_config=vision)
    fits = functools.partial(memory.frames_that_fit, device=torch.device("cpu"))
    frame = 729 * 2 * (12 * 1152 + 3 * 4304)
    for free, expected in ((0, 2), (frame * 4, 2), (frame * 20 - 1, 9), (frame * 20, 10)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert fits(config, 729, 2) == expected
        assert fits(config, 729, 4) == max(2, free // 4 // frame)
    monkeypatch.setattr(memory, "free_memory", lambda device: frame * 200)
    counts = [fits(config, patches, 2) for patches in (1, 81, 256, 729, 1024, 4096)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 6
    config.vision_feature_layer = -1  # may keep what every layer gives
    assert fits(config, 729, 2) == 100 * (12 * 1152 + 3 * 4304) // (38 * 1152 + 3 * 4304)
    del config.vision_feature_layer
    vision._attn_implementation, vision.num_heads = "eager", 16  # has attention maps
    assert fits(config, 729, 2) == 100 * 26736 // (26736 + 4 * 16 * 729)
    vision.embed_dim, vision.hidden_size, vision.mlp_ratio = 1280, 3584, 4
    del vision.intermediate_size, vision._attn_implementation
    assert memory.frame_bytes(config, 100, 2) == 200 * 24 * 1280
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    for unknown in (SimpleNamespace(), SimpleNamespace(vision_config=SimpleNamespace())):
        assert fits(unknown, 729, 2) == memory.FALLBACK


def test_free_memory(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    free = memory.free_memory(cpu)
    assert free is None or free > 2**20
    assert memory.free_memory(torch.device("xpu")) is None
    assert memory.free_memory(cpu, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  90 kB\nMemAvailable:  70 kB\nHugePages: 0\n")
    assert memory.free_memory(cpu, tmp_path) == 70 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "max\n"), ("current", "900\n"), ("stat", "anon 1\n")):
        (group / f"memory.{name}").write_text(text)
    assert memory.free_memory(cpu, tmp_path) == 70 * 1024  # no limit
    (group / "memory.max").write_text("1000\n")
    assert memory.free_memory(cpu, tmp_path) == 100
    (group / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert memory.free_memory(cpu, tmp_path) == 400
    (group / "memory.max").write_text("500\n")
    assert memory.free_memory(cpu, tmp_path) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_memory_of_a_gpu() -> None:
    """What the allocator holds unused counts as free."""
    device = torch.device("cuda")
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    before = memory.free_memory(device)
    del held
    after = memory.free_memory(device)
    assert before is not None and after is not None and after - before >= 2**28


@families
def test_beams_over_chunks(family: str) -> None:
    """What generate repeats for beams has lost its unused hidden states."""
    model, inputs = model_of(family), inputs_of(family, *CLIPS["one"])
    whole, _ = compressed(model, DyCoke(), inputs, num_beams=2)
    with encode_in_chunks(model, 2):
        output, _ = compressed(model, DyCoke(), inputs, num_beams=2)
    assert torch.equal(output.sequences, whole.sequences)


@torch.no_grad()
def test_padding_images_stay_out() -> None:
    """SmolVLM: black filling, also of whole samples, and masks of its pixels."""
    model = model_of("smolvlm")
    pixels = tiny.slow_noise(torch.Generator().manual_seed(3), 15, 3, 24, 24).unflatten(0, (3, 5))
    pixels[0, 4] = 0
    pixels[1] = 0
    mask = torch.ones(3, 5, 24, 24, dtype=torch.bool)
    mask[2, 3, 16:] = False
    for given in ({}, {"pixel_attention_mask": mask}):
        ours, whole, calls = chunked(model, {"pixel_values": pixels, **given}, 2)
        same(ours, whole)
        assert [call.shape[1] for call in calls] == [2, 2, 2, 2, 1]
    ours, whole, calls = chunked(model, {"pixel_values": pixels * 0}, 2)
    same(ours, whole)
    assert len(calls) == 1


@torch.no_grad()
def test_tiles_of_images_are_encoded_whole() -> None:
    """LLaVA-OneVision: (images, tiles, C, H, W) look like videos and are none."""
    model = model_of("llava_onevision")
    pixels = tiny.slow_noise(torch.Generator().manual_seed(3), 8, 3, 24, 24).unflatten(0, (4, 2))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[24, 24]] * 4)}
    ours, whole, calls = chunked(model, inputs, 2)
    assert len(calls) == 1
    for a, b in zip(ours.pooler_output, whole.pooler_output, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (1, "frames must be at least 2, got 1"),
        ("all", "frames must be \"auto\" or an integer of at least 2, got 'all'"),
    ],
)
def test_other_numbers_of_frames_are_refused(frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with encode_in_chunks(model_of("llava_onevision"), frames):
            pass
