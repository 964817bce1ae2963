"""Make the nano model from nothing: configs, tokenizer, processor and seeded random weights.

The result is an ordinary LLaVA-OneVision folder that ``AutoModelForImageTextToText`` and
``AutoProcessor`` load like any other; only the sizes are small. :mod:`dycoke.nano.train` starts
from the same folder.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke.nano.stories import SIZE, WORDS

__all__ = ["PATCH", "TOKENS_PER_FRAME", "build", "build_model", "build_processor"]

PATCH = 8
"""Side of a vision patch, in pixels."""

SIDE = SIZE // PATCH
TOKENS_PER_FRAME = ((SIDE + 1) // 2) ** 2
"""Visual tokens per frame after LLaVA-OneVision's 2x pooling."""

PAD, UNKNOWN, START, END, IMAGE, VIDEO = (
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
)
SPECIAL = (PAD, UNKNOWN, START, END, IMAGE, VIDEO)

# The layout of Qwen2-based LLaVA-OneVision: pictures and videos first, then the words.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ '\\n' + part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level over the stories' closed vocabulary; anything else falls back to characters.

    WordPiece over whole words and single characters takes the longest match first: a known word
    is one token, an unknown one a run of characters, and what is outside ASCII or longer than
    100 characters is ``<unk>``.
    Whitespace separates words and costs no token.
    """
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    pieces = [*SPECIAL, "user", "assistant", "system", *WORDS, *characters]
    pieces += [f"##{c}" for c in characters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START, IMAGE, VIDEO],
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaOnevisionProcessor:
    """The processor: tokenizer, chat template, image and video processing at nano's frame size."""
    picture: dict[str, Any] = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=_pinpoints(), **picture),
        video_processor=LlavaOnevisionVideoProcessor(**picture),
        tokenizer=build_tokenizer(),
        num_image_tokens=SIDE * SIDE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def _pinpoints() -> list[list[int]]:
    """Resolutions that a still image may be cut into, up to 2 x 2 tiles."""
    return [[SIZE * rows, SIZE * columns] for rows in (1, 2) for columns in (1, 2)]


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionConfig:
    """The shapes: 3 vision layers of width 96 and 8 decoder layers of width 128."""
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        # Wider than the default 0.02, which is meant for widths in the thousands.
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=_pinpoints(),
        tie_word_embeddings=True,
        initializer_range=0.05,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """The model in float32 with weights drawn from `seed`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(build_config(tokenizer))
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def build(folder: str | Path, seed: int = 0) -> Path:
    """Write model and processor with seeded random weights to `folder`, in float16.

    Parameters
    ----------
    folder : path
        Made if missing.
    seed : int
        Seed of the weights.

    Returns
    -------
    Path
        `folder`.
    """
    processor = build_processor()
    return save(build_model(processor.tokenizer, seed), processor, folder)


def save(
    model: LlavaOnevisionForConditionalGeneration,
    processor: LlavaOnevisionProcessor,
    folder: str | Path,
) -> Path:
    """Write `model` in float16 (converted in place) and `processor` to `folder`."""
    folder = Path(folder)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
