"""Scores and keys of the vision encoder: what a method gets equals a naive oracle.

The oracle works out queries and keys from the encoder's weights, one head and one frame at a time,
and asks autograd which patches a token is made of, so that it knows no family's layout.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import images
import pytest
import standin
import tiny
import torch
from support import (
    backends,
    close,
    compressed,
    exact,
    families,
    generate,
    inputs_of,
    model_of,
    untouched,
)
from torch import Tensor
from transformers import AttentionInterface

from dycoke import DyCoke, UnsupportedError
from dycoke.attention import OVERRIDE
from dycoke.compressor import Compressor
from dycoke.core.method import NO_CONTEXT, VideoContext
from dycoke.models import families as known_families
from dycoke.vision import scores as encoder_scores
from dycoke.vision.chunks import encode_in_chunks

pytestmark = exact

Seen = tuple[Tensor, Tensor]

# The attention module of the last layer that features come from; 2 layers in each encoder.
MODULES = {
    "llava_onevision": "vision_tower.encoder.layers.1.self_attn",
    "llava_next_video": "vision_tower.encoder.layers.0.self_attn",
    "internvl": "vision_tower.encoder.layer.1.attention",
    "smolvlm": "vision_model.encoder.layers.1.self_attn",
    "video_llama_3": "vision_model.encoder.layers.1.self_attn",
}
CLASS_TOKEN = {"llava_next_video", "internvl"}
PATCHES = 24  # per frame, of families that pack them
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "video_llama_3"]
SERVED = [name for name in tiny.FAMILIES if name != "gemma4"]
served = pytest.mark.parametrize("family", SERVED)
BATCH = ([[5], [5]], [(5, 7), (2, 3)])
SEVERAL = ([[3, 2], [3]], [(5, 7), (2, 3)])
SEVERAL_EQUAL = ([[3, 3]], [(5, 7)])  # for families that take videos as one tensor
ONE = ([[5]], [(5, 7)])


@dataclass(frozen=True)
class Recorder(Compressor):
    """Keeps every token, and every clip that it was given."""

    needs_vision: ClassVar[bool] = True
    off: bool = False
    clips: ClassVar[list[VideoContext]]  # of each object, yet no setting

    def __post_init__(self) -> None:
        object.__setattr__(self, "clips", [])

    @property
    def idle(self) -> bool:
        return self.off

    def merge_tokens(
        self, features: Tensor, context: VideoContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        assert context.scores is not None and context.keys is not None
        assert context.scores.shape == context.keys.shape[:2] == features.shape[:2]
        self.clips.append(context)
        return super().merge_tokens(features, context)


def recorded(model: Any, inputs: dict[str, Any], source: Any = None, **kwargs: Any) -> list[Seen]:
    """What the method is given while the model generates."""
    method = Recorder()
    compressed(model, method, inputs, tokens=2, frame_source=source, **kwargs)
    return seen_by(method)


def seen_by(method: Recorder) -> list[Seen]:
    seen = [(clip.scores, clip.keys) for clip in method.clips]
    method.clips.clear()
    return seen


def equal(ours: list[Seen], theirs: list[Seen]) -> None:
    assert len(ours) == len(theirs) > 0
    for (scores, keys), (their_scores, their_keys) in zip(ours, theirs, strict=True):
        assert scores.dtype == keys.dtype == torch.float32
        close(scores, their_scores)
        close(keys, their_keys)


# The oracle


def encoder_of(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method of a model that encodes a prompt's videos, and its arguments."""
    kind = "video" if "pixel_values_videos" in inputs else "image"
    encode = getattr(model.base_model, f"get_{kind}_features")
    known = inspect.signature(encode).parameters
    given = {k: v for k, v in inputs.items() if k in known}
    if not any(k.startswith("pixel_values") for k in given):  # the older name of the same
        given["pixel_values"] = inputs["pixel_values_videos"]
    return encode, {**given, "return_dict": True}


def oracle(model: Any, inputs: dict[str, Any], videos: Any, tokens: int) -> list[Seen]:
    family = model.config.model_type
    path = MODULES.get(family, "visual.blocks.1.attn")
    module = model.base_model.get_submodule(path)
    layer = model.base_model.get_submodule(path.rpartition(".")[0])
    told: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, a, k: told.update(k, hidden=a[0] if a else k["hidden_states"]),
            with_kwargs=True,
        ),
        layer.register_forward_hook(
            lambda m, a, out: told.update(out=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    encode, given = encoder_of(model, inputs)
    with torch.enable_grad():
        output = encode(**given)
    for handle in handles:
        handle.remove()
    rows = torch.cat([video.flatten(0, -2) for video in output.pooler_output])
    with torch.no_grad():
        scores, keys = by_hand(module, told, family in CLASS_TOKEN)

    token_scores, token_keys = [], []
    for row in rows:
        (slope,) = torch.autograd.grad(row.sum(), told["out"], retain_graph=True, allow_unused=True)
        used = None if slope is None else slope.flatten(0, -2).abs().sum(-1).nonzero()[:, 0]
        if used is None or not len(used):
            continue  # a token that closes a video
        token_scores.append(sum(scores[i] for i in used) / len(used))
        token_keys.append(sum(keys[i] for i in used) / len(used))
    seen, start = [], 0
    for count in [frames for sample in videos for frames in sample]:
        own = slice(start, start + count * tokens)
        start = own.stop
        found = torch.stack(token_scores[own]), torch.stack(token_keys[own])
        seen.append((found[0].view(count, tokens), found[1].view(count, tokens, -1)))
    assert start == len(token_scores)
    return seen


def by_hand(module: Any, told: dict[str, Any], class_token: bool) -> Any:
    """What each row of the module's input receives, (rows,), and its key, (rows, C)."""
    hidden = told["hidden"]
    if hidden.ndim == 3:
        sequences, per_frame = [len(hidden[0])] * len(hidden), hidden.shape[1]
    else:
        sequences, per_frame = told["cu_seqlens"].diff().tolist(), PATCHES
    hidden = hidden.reshape(-1, hidden.shape[-1])
    heads = module.num_heads
    if hasattr(module, "qkv"):
        parts = module.qkv(hidden).chunk(3, -1)[:2]
    else:
        parts = module.q_proj(hidden), module.k_proj(hidden)
    queries, keys = (part.view(len(hidden), heads, -1) for part in parts)
    width = queries.shape[-1]
    if told.get("position_embeddings") is not None:
        cos, sin = (x[:, None] for x in told["position_embeddings"])
        half = width // 2
        queries, keys = (
            x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (queries, keys)
        )
    scores, start = [], 0
    for length in sequences:
        total = torch.zeros(length)
        for head in range(heads):
            q, k = (x[start : start + length, head] for x in (queries, keys))
            for query in q[:1] if class_token else q:
                total += ((k @ query) / width**0.5).softmax(0)
        scores.append(total / heads / (1 if class_token else per_frame))
        start += length
    return torch.cat(scores), sum(keys[:, head] for head in range(heads)) / heads


def expected(family: str, model: Any, inputs: dict[str, Any], videos: Any) -> list[Seen]:
    return oracle(model, inputs, videos, tiny.FAMILIES[family].tokens_per_frame)


def several(family: str) -> Any:
    return SEVERAL if tiny.FAMILIES[family].unequal_videos else SEVERAL_EQUAL


# What a method gets


@served
@backends
@pytest.mark.parametrize("case", ["batch", "several"])
def test_scores_and_keys_equal_the_oracle(family: str, backend: str, case: str) -> None:
    videos, text = BATCH if case == "batch" else several(family)
    model = model_of(family, backend, seed=3)
    inputs = inputs_of(family, videos, text, seed=3)
    source = tiny.FAMILIES[family].frame_source(videos)
    plain = generate(model, inputs, 3)
    with untouched(model):
        method = Recorder()
        output, _ = compressed(model, method, inputs, tokens=3, frame_source=source)
    assert torch.equal(output.sequences, plain.sequences)  # it keeps everything
    ours = seen_by(method)
    equal(ours, expected(family, model, inputs, videos))
    if family not in CLASS_TOKEN:  # what queries spend, they spend on patches
        patches = 24 if family in PACKED or "qwen" in family or "glm" in family else 36
        for scores, _ in ours:
            spent = scores.sum(1) * patches / scores.shape[1]
            close(spent, torch.ones_like(spent))


@served
def test_a_bare_forward_and_one_frame(family: str) -> None:
    videos, text = [[1]], [(3, 2)]
    model, inputs = model_of(family), inputs_of(family, videos, text)
    method = Recorder()
    with method(model), torch.no_grad():
        model(**inputs)
    equal(seen_by(method), expected(family, model, inputs, videos))


def test_an_odd_side_is_pooled_as_the_model_pools_features() -> None:
    """5 x 5 patches to 3 x 3 tokens, bilinear, corners not aligned."""
    config = copy.deepcopy(model_of("llava_onevision").config)
    config.vision_config.image_size = 20
    model = tiny._build(tiny.LlavaOnevisionForConditionalGeneration, config, "sdpa", 5)
    inputs = inputs_of("llava_onevision", *BATCH)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][..., :20, :20]
    ours = recorded(model, inputs)

    whole: list[Tensor] = []
    module = model.base_model.get_submodule(MODULES["llava_onevision"])
    handle = module.register_forward_pre_hook(
        lambda m, a, k: whole.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    encode, given = encoder_of(model, inputs)
    with torch.no_grad():
        encode(**given)
        handle.remove()
        scores, keys = by_hand(module, {"hidden": whole[0]}, class_token=False)
    places = []
    for y in range(3):
        for x in range(3):
            weights = torch.zeros(5, 5)
            for row, row_weight in taps(y):
                for column, column_weight in taps(x):
                    weights[row, column] += row_weight * column_weight
            places.append(weights.flatten())
    pool = torch.stack(places)  # (9, 25)
    theirs = [
        (
            torch.stack([pool @ frame for frame in scores.view(2, 5, 25)[video]]),
            torch.stack([pool @ frame for frame in keys.view(2, 5, 25, -1)[video]]),
        )
        for video in range(2)
    ]
    equal(ours, theirs)


def taps(place: int) -> list[tuple[int, float]]:
    """Two of 5 values, and their weights, that one of 3 lies between."""
    at = max(0.0, (place + 0.5) * 5 / 3 - 0.5)
    low = int(at)
    return [(low, 1 - (at - low)), (min(low + 1, 4), at - low)]


@pytest.mark.parametrize(("asked", "layer"), [(-1, 1), (1, 0), ([0, 2, -2], 1), ([1, -3], 0)])
def test_the_last_layer_that_features_come_from(asked: Any, layer: int) -> None:
    config = copy.deepcopy(model_of("llava_next_video").config)
    config.vision_feature_layer = asked
    model = tiny._build(tiny.LlavaNextVideoForConditionalGeneration, config, "sdpa", 5)
    module = model.base_model.get_submodule(f"vision_tower.encoder.layers.{layer}.self_attn")
    with Recorder()(model):
        changed = [
            name
            for name, part in model.base_model.vision_tower.named_modules()
            if OVERRIDE in vars(part)
        ]
        assert model.base_model.vision_tower.get_submodule(changed[0]) is module
        assert len(changed) == 1


def test_no_layer_or_another_one_is_refused() -> None:
    config = copy.deepcopy(model_of("llava_onevision").config)
    config.vision_feature_layer = 0
    model = tiny._build(tiny.LlavaOnevisionForConditionalGeneration, config, "sdpa", 5)
    with untouched(model), pytest.raises(UnsupportedError, match="vision_feature_layer=0 is not"):
        with Recorder()(model):
            pass
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    with pytest.raises(UnsupportedError, match="vision_feature_layer=-2 was asked for"):
        with Recorder()(model):
            generate(model, inputs, vision_feature_layer=-2)


def test_a_last_layer_with_windows() -> None:
    """What comes from the queries of a patch's window counts as a mean over the frame's."""
    config = copy.deepcopy(model_of("qwen2_5_vl").config)
    config.vision_config.fullatt_block_indexes = [0]
    model = tiny._build(tiny.Qwen2_5_VLForConditionalGeneration, config, "sdpa", 5)
    inputs = inputs_of("qwen2_5_vl", *SEVERAL)
    equal(recorded(model, inputs), expected("qwen2_5_vl", model, inputs, SEVERAL[0]))


@pytest.mark.parametrize("backend", ["sdpa", "eager", standin.NAME])
def test_patches_that_a_mask_hides(backend: str) -> None:
    """SmolVLM fills small images up: nobody attends to what was filled in."""
    model, inputs = model_of("smolvlm", backend), inputs_of("smolvlm", *BATCH)
    mask = torch.ones(2, 5, 24, 24, dtype=torch.bool)
    mask[0, 1, :, 16:] = mask[1, 3, 8:] = False
    whole = recorded(model, inputs)
    part = recorded(model, {**inputs, "pixel_attention_mask": mask})
    for video, frame, shown in ((0, 1, mask[0, 1]), (1, 3, mask[1, 3])):
        tokens = shown[4::8, 4::8].flatten()
        assert (part[video][0][frame][~tokens] == 0).all()
        close(part[video][0][frame].sum(), torch.tensor(0.25))
    close(part[0][0][0], whole[0][0][0])


@pytest.mark.parametrize("block", [1, 40, 700, 1 << 24])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 7, 4), (2, 3, 5, 8)])
def test_blocks_add_up(block: int, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_scores, "BLOCK", block)
    frames, heads, patches, width = shape
    g = torch.Generator().manual_seed(patches)
    query, keys = torch.randn(2, *shape, generator=g).unbind()
    hidden = torch.rand(frames, 1, 1, patches, generator=g) < 0.3
    hidden[..., 0] = False
    for mask in (None, hidden):
        ours = encoder_scores.received(query, keys, None, mask)
        for frame in range(frames):
            total = torch.zeros(patches)
            for head in range(heads):
                for one in query[frame, head]:
                    logits = torch.stack([key @ one / width**0.5 for key in keys[frame, head]])
                    if mask is not None:
                        logits[hidden[frame, 0, 0]] = -torch.inf
                    total += logits.softmax(0)
            close(ours[frame], total / heads)
    double = encoder_scores.received(query.double(), keys.double(), 0.5)
    assert double.dtype == torch.float64
    close(double.float(), encoder_scores.received(query, keys, 0.5))


def test_half_precision_is_scored_in_float32() -> None:
    model = copy.deepcopy(model_of("llava_onevision")).bfloat16()
    inputs = inputs_of("llava_onevision", *ONE)
    pixels = inputs["pixel_values_videos"]
    half = {**inputs, "pixel_values_videos": pixels.bfloat16()}
    ours = recorded(model, half)
    true = expected("llava_onevision", model_of("llava_onevision"), inputs, ONE[0])
    rounded = expected("llava_onevision", model, half, ONE[0])
    for mine, theirs, value in zip(ours[0], rounded[0], true[0], strict=True):
        noise = (theirs.double() - value).abs().max()  # of working it out in bfloat16
        assert mine.dtype == torch.float32 and (mine.double() - value).abs().max() < 4 * noise
    assert (ours[0][0].bfloat16().float() != ours[0][0]).any()


# Packed patches, as FlashAttention takes them

FLASH = "flash_standin"
PACKED_CALLS: list[int] = []


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
) -> tuple[Tensor, None]:
    assert module.config._attn_implementation == FLASH
    lengths = kw["cu_seq_lens_q"].diff().tolist()
    PACKED_CALLS.append(len(lengths))
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    outputs = [
        ((q * kw["scaling"]) @ k.transpose(2, 3)).softmax(-1).matmul(v).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(outputs, 1), None


AttentionInterface.register(FLASH, packed_attention)


@pytest.mark.parametrize("family", PACKED)
def test_patches_of_all_slices_at_once(family: str) -> None:
    model, inputs = tiny.FAMILIES[family].model(), inputs_of(family, *SEVERAL)
    theirs = expected(family, model, inputs, SEVERAL[0])
    model.config.vision_config._attn_implementation_internal = FLASH
    for part in model.base_model.modules():
        if "vision" in type(getattr(part, "config", None)).__name__.lower():
            part.config._attn_implementation_internal = FLASH
    PACKED_CALLS.clear()
    with untouched(model):
        ours = recorded(model, inputs)
    assert len(PACKED_CALLS) == 2 and PACKED_CALLS[1] == 8  # a call per layer
    equal(ours, theirs)


# On its way to the prefill


@served
@pytest.mark.parametrize("outer", ["chunks", "method"])
@pytest.mark.parametrize("case", ["batch", "several"])
def test_in_chunks(family: str, outer: str, case: str) -> None:
    videos, text = BATCH if case == "batch" else several(family)
    model, inputs = model_of(family), inputs_of(family, videos, text)
    source = tiny.FAMILIES[family].frame_source(videos)
    theirs = expected(family, model, inputs, videos)
    method = Recorder()
    blocks = [encode_in_chunks(model, 2), method(model, frame_source=source)]
    with untouched(model), contextlib.ExitStack() as stack:
        for block in reversed(blocks) if outer == "chunks" else blocks:
            stack.enter_context(block)
        generate(model, inputs, 2)
        equal(seen_by(method), theirs)
        if not tiny.FAMILIES[family].images:
            encode, given = encoder_of(model, inputs)
            with torch.no_grad():
                output = encode(**given)
            equal(output.vision, theirs)


@served
@pytest.mark.parametrize("way", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_several_answers(family: str, way: dict[str, Any]) -> None:
    videos, text = several(family)
    model, inputs = model_of(family), inputs_of(family, videos, text)
    source = tiny.FAMILIES[family].frame_source(videos)
    ours = recorded(model, inputs, source, **way)
    theirs = iter(expected(family, model, inputs, videos))
    repeated = []
    for sample in videos:
        repeated += [next(theirs) for _ in sample] * next(iter(way.values()))
    if tiny.OLDER and family.startswith("llava"):
        assert len(ours) == len(repeated)  # this stock release mixes up a sample's videos itself
        return
    equal(ours, repeated)


older = pytest.mark.skipif(tiny.OLDER, reason="this transformers takes no features of before")


def handed(inputs: dict[str, Any], output: Any) -> dict[str, Any]:
    kind = "video" if "pixel_values_videos" in inputs else "image"
    left = {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
    return {**left, "mm_encoder_outputs": {kind: output}}


@older
@served
def test_features_computed_earlier(family: str) -> None:
    videos, text = several(family)
    model, inputs = model_of(family), inputs_of(family, videos, text)
    source = tiny.FAMILIES[family].frame_source(videos)
    encode, given = encoder_of(model, inputs)
    method = Recorder()
    with torch.no_grad(), method(model, frame_source=source):
        bare = copy.copy(encode(**given))  # not wrapped: taken before the block
        encode, _ = encoder_of(model, inputs)
        output = pickle.loads(pickle.dumps(encode(**given)))
    assert not hasattr(bare, "vision")
    theirs = expected(family, model, inputs, videos)
    ways: list[dict[str, Any]] = [{}]
    if tiny.FAMILIES[family].repeats:
        ways.append({"num_beams": 2})
    with method(model, frame_source=source):
        generate(model, handed(inputs, output), 2)
        equal(seen_by(method), theirs)
        with pytest.raises(
            UnsupportedError, match=r"came without it: pass the pixels, or encode|encoded outside"
        ):
            generate(model, handed(inputs, bare), 2)
        assert not method.clips
        if tiny.FAMILIES[family].repeats:
            generate(model, handed(inputs, output), 2, num_beams=2)
            assert len(seen_by(method)) == 2 * len(theirs)


@older
def test_features_of_another_prompt_are_refused() -> None:
    model, inputs = model_of("qwen2_5_vl"), inputs_of("qwen2_5_vl", *SEVERAL)
    method = Recorder()
    with method(model):
        encode, given = encoder_of(model, inputs)
        with torch.no_grad():
            output = encode(**given)
        for wrong in (output.vision[:1], [(s[:, :3], k[:, :3]) for s, k in output.vision]):
            output.vision = wrong
            with pytest.raises(UnsupportedError, match="hand over what was encoded for this"):
                generate(model, handed(inputs, output), 2)


@served
def test_an_error_leaves_nothing_behind(family: str) -> None:
    """An encoder that fails, a text-only prompt, features without scores, then a right prompt."""
    model = model_of(family)
    source = tiny.FAMILIES[family].frame_source(ONE[0])
    first = inputs_of(family, *ONE, seed=1)
    second = inputs_of(family, *ONE, seed=2)
    method = Recorder()
    module = model.base_model.get_submodule(MODULES.get(family, "visual.blocks.1.attn"))
    behind = module.register_forward_hook(lambda *_: 1 / 0)
    with untouched(model), pytest.raises(ZeroDivisionError), method(model, frame_source=source):
        generate(model, first, 2)
    behind.remove()
    with method(model, frame_source=source):
        behind = module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, first, 2)
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model(**first)
        behind.remove()
        model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=2)
        assert not method.clips
        generate(model, second, 2)
        equal(seen_by(method), expected(family, model, second, ONE[0]))


def test_an_interrupt_leaves_nothing_behind() -> None:
    """Torch runs no hooks behind a forward that is interrupted."""
    model = model_of("qwen2_5_vl")
    first, second = (inputs_of("qwen2_5_vl", *ONE, seed=seed) for seed in (1, 2))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    method = Recorder()
    with method(model), torch.no_grad():
        behind = model.get_decoder().layers[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**first)
        behind.remove()
        method.clips.clear()
        model(**second)
    equal(seen_by(method), expected("qwen2_5_vl", model, second, ONE[0]))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("at", [2, -2])
def test_an_undeclared_image_beside_a_video(family: str, at: int) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    theirs, image = expected(family, model, inputs, ONE[0]), images.image_of(model)
    equal(recorded(model, images.insert(model, inputs, image, at)), theirs)
    with Recorder()(model), torch.no_grad():
        output = model.base_model.get_image_features(**image, return_dict=True)
    assert not hasattr(output, "vision")  # nobody asked


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_declared_images_beside_a_video(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, *ONE)
    theirs = expected(family, model, inputs, ONE[0])
    image = images.image_of(model)
    ours = recorded(model, images.insert(model, inputs, image, 2), source="images")
    theirs += oracle(model, image, [[1]], 6)
    assert len(ours) == 2
    equal(sorted(ours, key=lambda seen: -len(seen[0])), theirs)


def test_inputs_that_are_moved_to_a_device_are_copied_without_scores() -> None:
    """As `device_map` does: its hooks rebuild what they move."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = tiny.FAMILIES["qwen2_5_vl"].model(), inputs_of("qwen2_5_vl", *BATCH)
    theirs = expected("qwen2_5_vl", model, inputs, BATCH[0])
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    equal(recorded(model, inputs), theirs)


def test_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits inside its encoder's attention, while the other one would encode."""
    model = model_of("llava_onevision")
    prompts = [inputs_of("llava_onevision", *ONE, seed=seed) for seed in (1, 2)]
    theirs = [expected("llava_onevision", model, inputs, ONE[0]) for inputs in prompts]
    inside, passed = threading.Barrier(2), threading.Event()
    method, found, errors = Recorder(), {}, []
    merge = Recorder.merge_tokens

    def note(self: Recorder, features: Tensor, context: VideoContext = NO_CONTEXT) -> Any:
        found[threading.get_ident()] = (context.scores, context.keys)
        return merge(self, features, context)

    monkeypatch.setattr(Recorder, "merge_tokens", note)

    def ask(place: int) -> None:
        try:
            inside.wait(10)
            generate(model, prompts[place], 2)
            equal([found[threading.get_ident()]], theirs[place])
        except BaseException as error:
            errors.append(error)
        passed.set()

    with method(model):
        (override,) = [
            vars(part)[OVERRIDE]
            for part in model.base_model.vision_tower.modules()
            if OVERRIDE in vars(part)
        ]
        own = override.inner

        def slow(*args: Any, **kwargs: Any) -> Any:
            passed.wait(0.3)
            return own(*args, **kwargs)

        override.inner = slow
        threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and len(found) == 2


# Only where it is asked for


def overridden(model: Any) -> bool:
    """Whether an attention module of the vision encoder is."""
    return any(
        OVERRIDE in vars(part)
        for name, part in model.base_model.named_modules()
        if "vision" in name or "visual" in name
    )


@families
def test_nothing_is_installed_for_methods_that_do_without(family: str) -> None:
    model = model_of(family)
    for method in (DyCoke(), Recorder(off=True)):
        with method(model):
            generate(model, inputs_of(family, *ONE), 2)
            assert not overridden(model)
    with Recorder(off=True)(model, trace=True) if family != "gemma4" else contextlib.nullcontext():
        assert overridden(model) is (family != "gemma4")


def test_what_is_collected_is_let_go() -> None:
    model, method = model_of("llava_onevision"), Recorder()
    with method(model) as run, torch.no_grad():
        local = run._engine.vision._local
        for ask in (lambda i: generate(model, i, 2), lambda i: model(**i)):
            ask(inputs_of("llava_onevision", *ONE))
            assert local.call is None and local.found is None and local.handed is None


def test_families_without_are_refused_at_the_door() -> None:
    known = {name for name, family in known_families().items() if family.vision_attention}
    assert known >= set(SERVED)
    model = model_of("gemma4")
    with (
        untouched(model),
        pytest.raises(
            UnsupportedError,
            match=r"not known for gemma4; it is for "
            r"glm46v, .*video_llama_3; .*method that does without",
        ),
    ):
        with Recorder()(model):
            pass
    model = model_of("qwen2_vl")
    with untouched(model), pytest.raises(UnsupportedError, match="a layout of your own"):
        with Recorder()(model, layout=lambda prompt: []):
            pass
