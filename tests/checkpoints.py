"""Tiny checkpoints in the real on-disk format: model, processor, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from dycoke.nano.build import build


def template(video: str, start: str = "", end: str = "") -> str:
    """A chat template that writes ``video`` where a video stands."""
    return (
        (
            "{% for message in messages %}START{{ message['role'] }} "
            "{% for part in message['content'] %}{% if part['type'] == 'video' %}VIDEO"
            "{% else %} {{ part['text'] }}{% endif %}{% endfor %}END {% endfor %}"
            "{% if add_generation_prompt %}STARTassistant {% endif %}"
        )
        .replace("START", start)
        .replace("END", end)
        .replace("VIDEO", video)
    )


QWEN_TEMPLATE = template(
    "<|vision_start|><|video_pad|><|vision_end|>", "<|im_start|>", "<|im_end|>"
)


def llava_onevision(folder: Path) -> Path:
    return build(folder / "llava_onevision", seed=1)


def _tokenizer(special: dict[int, str], **named: str) -> PreTrainedTokenizerFast:
    """A vocabulary of words, with special tokens at the ids that `tiny` uses."""
    special = {tiny.EOS: "<|im_end|>", **special}
    words = ["<pad>", "<unk>", "user", "assistant", "what", "happens"]
    words += [f"w{i}" for i in range(len(words), tiny.VOCABULARY)]
    vocabulary = {special.get(i, word): i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens={**{f"token_{i}": t for i, t in special.items()}, **named},
        padding_side="left",
    )


def _save(model: Any, processor: Any, path: Path) -> Path:
    model.generation_config.eos_token_id = tiny.EOS
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


PATCHES = {"patch_size": 4, "merge_size": 2}
SIZE = {"size": {"shortest_edge": 16 * 16, "longest_edge": 24 * 24}}
CLIP = {"size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 16 * 24}}  # of all frames together


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    special = {
        tiny.IMAGE: "<|image_pad|>",
        tiny.VIDEO: "<|video_pad|>",
        tiny.VISION_START: "<|vision_start|>",
        tiny.VISION_END: "<|vision_end|>",
        tiny.EOS + 1: "<|im_start|>",
    }
    return _tokenizer(special)


def qwen2_5_processor(size: dict[str, Any]) -> Qwen2_5_VLProcessor:
    sizes = {**PATCHES, "temporal_patch_size": 2, **size}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    )


def qwen2_5_vl(folder: Path) -> Path:
    return _save(tiny.qwen2_5_vl(), qwen2_5_processor(SIZE), folder / "qwen2_5_vl")


def glm4v(folder: Path) -> Path:
    special = {
        tiny.IMAGE: "<|image|>",
        tiny.VIDEO: "<|video|>",
        tiny.VISION_START: "<|begin_of_image|>",
        tiny.VISION_END: "<|end_of_image|>",
        tiny.VIDEO_START: "<|begin_of_video|>",
        tiny.VIDEO_END: "<|end_of_video|>",
    }
    sizes = {**PATCHES, "temporal_patch_size": 2}
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(**sizes, **CLIP),
        tokenizer=_tokenizer(special, image_token="<|image|>", video_token="<|video|>"),
        video_processor=Glm4vVideoProcessor(**sizes, **CLIP),
        chat_template=template("<|begin_of_video|><|video|><|end_of_video|>"),
    )
    return _save(tiny.glm4v(), processor, folder / "glm4v")


def internvl(folder: Path) -> Path:
    """Its processor makes images of a video's frames."""
    special = {tiny.IMAGE: "<IMG_CONTEXT>", tiny.VISION_START: "<img>", tiny.VISION_END: "</img>"}
    special[tiny.VIDEO] = "<video>"
    names = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    names |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    size = {"height": 24, "width": 24}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=_tokenizer(special, **names),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=9,
        chat_template=template("<video>"),
    )
    return _save(tiny.internvl(), processor, folder / "internvl")


def video_llama_3(folder: Path) -> Path:
    """Its processor drops tokens by itself, unless it is told not to."""
    special = {tiny.IMAGE: "<|image_pad|>", tiny.VIDEO: "<|video_pad|>"}
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(**PATCHES, **SIZE),
        tokenizer=_tokenizer(special, **names),
        video_processor=VideoLlama3VideoProcessor(**PATCHES, **CLIP),
        chat_template=template("<|video_pad|>"),
    )
    return _save(tiny.video_llama_3(), processor, folder / "video_llama_3")


def smolvlm(folder: Path) -> Path:
    """Its processor makes images of a video's frames, and writes their number as a word."""
    if processing_smolvlm.num2words is None:
        pytest.skip("its processor needs the package num2words")
    special = {
        tiny.IMAGE: "<image>",
        tiny.VIDEO: "<video>",
        tiny.VISION_START: "<fake_token_around_image>",
        tiny.VISION_END: "<global-img>",
        tiny.EOS + 1: "<end_of_utterance>",
    }
    sizes = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 24}}
    sampling = {"max_frames": 64, "fps": 1, "video_size": {"longest_edge": 24}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes, do_image_splitting=False),
        tokenizer=_tokenizer(special, image_token="<image>", video_token="<video>"),
        video_processor=SmolVLMVideoProcessor(**sizes, video_sampling=sampling),
        image_seq_len=9,
        chat_template=template("<video>"),
    )
    return _save(tiny.smolvlm(), processor, folder / "smolvlm")


CHECKPOINTS = {
    f.__name__: f for f in (llava_onevision, qwen2_5_vl, glm4v, internvl, smolvlm, video_llama_3)
}
