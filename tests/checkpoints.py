"""Tiny checkpoints in the real on-disk format: model, processor, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dycoke.nano.build import build

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def llava_onevision(folder: Path) -> Path:
    return build(folder / "llava_onevision", seed=1)


def qwen2_5_vl(folder: Path) -> Path:
    """The tiny Qwen2.5-VL of `tiny`, whose special ids the tokenizer must meet."""
    special = {
        tiny.IMAGE: "<|image_pad|>",
        tiny.VIDEO: "<|video_pad|>",
        tiny.VISION_START: "<|vision_start|>",
        tiny.VISION_END: "<|vision_end|>",
        tiny.EOS: "<|im_end|>",
        tiny.EOS + 1: "<|im_start|>",
    }
    words = ["<pad>", "<unk>", "user", "assistant", "what", "happens"]
    words += [f"w{i}" for i in range(len(words), min(special))]
    vocabulary = {word: i for i, word in enumerate(words)} | {t: i for i, t in special.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(special.values()),
        padding_side="left",
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 24 * 24}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    )
    model = tiny.qwen2_5_vl()
    model.generation_config.eos_token_id = tiny.EOS
    path = folder / "qwen2_5_vl"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


CHECKPOINTS = {"llava_onevision": llava_onevision, "qwen2_5_vl": qwen2_5_vl}
