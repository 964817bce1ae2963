"""dycoke.vllm's hooks against the installed vLLM, without an engine: a CUDA build will do, too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm_process

from dycoke.vllm.counts import kept_count, parse

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")

SETTINGS = '{"merge_ratio": 0.7}'


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Any:
    """As vLLM loads it in each of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYCOKE_VLLM", SETTINGS)
        patch.setenv("HF_HUB_OFFLINE", "1")
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        yield


def test_what_is_overridden_is_there() -> None:
    """A method that vLLM renamed would be ours alone, and never called."""
    from dycoke.vllm.plugin import MODELS

    for architecture, path in MODELS.items():
        module, name = path.split(":")
        ours = getattr(importlib.import_module(module), name)
        bases = ours.__mro__
        own = [base for base in bases if base.__module__.startswith("dycoke.")]
        stock = [base for base in bases if not base.__module__.startswith("dycoke.")]
        assert stock[0].__name__ == architecture
        helpers = {"media_ids", "media_of", "whole_rule", "_offsets", "_per_frame"}
        for base in own:
            for method in vars(base):
                if callable(getattr(base, method)) and not method.startswith("__"):
                    there = any(hasattr(other, method) for other in stock)
                    assert there or method in helpers, f"{architecture} has no {method}"


@pytest.mark.parametrize("frames", [12, 5])
@pytest.mark.parametrize(
    ("name", "token", "side", "tokens", "joined"),
    [
        ("llava_onevision", "<video>", 96, 36, 1),
        ("llava_next_video", "<video>", 24, 9, 1),
        ("qwen2_5_vl", "<|vision_start|><|video_pad|><|vision_end|>", 48, 36, 2),
        ("qwen3_vl", "<|vision_start|><|video_pad|><|vision_end|>", 48, 36, 2),
    ],
)
def test_a_prompt_has_a_place_for_each_token_that_stays(
    name: str, token: str, side: int, tokens: int, joined: int, frames: int, tmp_path: Path
) -> None:
    import vllm_checkpoints
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    path = getattr(vllm_checkpoints, name)(tmp_path)
    config = EngineArgs(
        model=str(path),
        dtype="float32",
        max_model_len=4096,
        limit_mm_per_prompt={"video": 1, "image": 0},
    ).create_model_config()
    assert config.uses_mrope
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    noise = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    video: Any = noise
    how: dict[str, Any] = {}
    if joined == 2:
        about = {**vllm_process.times(frames, fps=4.0), "do_sample_frames": False}
        video = (noise, {**about, "video_backend": "none"})
        how = {"do_sample_frames": False, "fps": 4.0}
    ids = processor.info.get_tokenizer().encode(f"{token} what happens")
    asked = ProcessorInputs(
        prompt=ids,
        mm_data_items=processor.info.parse_mm_data({"video": [video]}),
        hf_processor_mm_kwargs=how,
    )
    made = processor.apply(asked, TimingContext())
    hf = config.hf_config
    place = getattr(hf, "video_token_id", None) or hf.video_token_index
    groups = -(-frames // joined)
    newline = name == "llava_onevision"
    expected = kept_count(parse(SETTINGS), groups, tokens) + newline
    assert made["prompt_token_ids"].count(place) == expected
