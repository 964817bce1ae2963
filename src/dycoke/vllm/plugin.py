"""What changes in vLLM: four model classes, what Qwen3-VL counts, and a model's configuration."""

from __future__ import annotations

import importlib
from typing import Any

from dycoke.errors import UnsupportedError
from dycoke.vllm import VARIABLE
from dycoke.vllm.counts import asked, kept_count

TESTED = ("0.32", "0.33")
"""Versions of vLLM whose code this was written against."""

MODELS = {
    "Qwen2_5_VLForConditionalGeneration": "dycoke.vllm.qwen2_5_vl:DyCokeQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "dycoke.vllm.qwen3_vl:DyCokeQwen3VL",
    "LlavaOnevisionForConditionalGeneration": "dycoke.vllm.llava:DyCokeLlavaOnevision",
    "LlavaNextVideoForConditionalGeneration": "dycoke.vllm.llava:DyCokeLlavaNextVideo",
}
"""Architectures, and the classes that take their place."""

ONE_AXIS = ("LlavaOnevisionForConditionalGeneration", "LlavaNextVideoForConditionalGeneration")
"""Those with plain RoPE: three equal axes let vLLM take positions that are not numbered through."""


def install() -> None:
    """Put DyCoke into this process's vLLM; what vLLM calls in each of its processes.

    Raises
    ------
    UnsupportedError
        For a version of vLLM that this was not written for, and for settings it cannot have.
    ValueError
        For settings that are wrong.
    """
    import vllm
    from vllm.config import ModelConfig

    check_version(vllm.__version__)
    asked()
    for architecture, path in MODELS.items():
        vllm.ModelRegistry.register_model(architecture, path)
    _wrap(ModelConfig, "_try_verify_and_update_model_config", configure)
    _count_for_qwen3()
    tell_the_cpu_runner()


def check_version(version: str) -> None:
    """Refuse a vLLM that nobody tried this with."""
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise UnsupportedError(
            f"vLLM {version} was not tested with dycoke; install one of {', '.join(TESTED)} "
            f"(for example vllm=={TESTED[-1]}.0), or unset {VARIABLE}"
        )


def configure(config: Any) -> None:
    """Switch vLLM's way for pruned videos on for a model, or refuse the model by name.

    Parameters
    ----------
    config : vLLM's ModelConfig, all read.
    """
    media = config.multimodal_config
    if media is None:
        return  # A model of text alone, such as the decoder of another.
    name = config.architecture
    if name not in MODELS:
        raise UnsupportedError(
            f"DyCoke inside vLLM does not know {name}; it knows {', '.join(MODELS)}. Use `dycoke "
            f"serve`, or unset {VARIABLE}"
        )
    if getattr(media, "dycoke", False):
        return
    if media.video_pruning_rate:
        raise UnsupportedError(
            f"--video-pruning-rate {media.video_pruning_rate} and {VARIABLE} both say how videos "
            "are pruned; give one of them"
        )
    # Any rate above 0 switches the way on; what it counts is replaced.
    media.video_pruning_rate = 0.5
    object.__setattr__(media, "dycoke", True)
    if name in ONE_AXIS:
        three_axes(config.hf_config.get_text_config())


def three_axes(text: Any) -> None:
    """Declare a decoder's RoPE to have three axes; with equal positions on all it is the same."""
    rope = dict(text.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(
            f"DyCoke inside vLLM needs plain RoPE to keep positions, and this model's is {kind!r}; "
            "use `dycoke serve`"
        )
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    text.rope_parameters = {**rope, "mrope_section": [half - 2 * third, third, third]}


def _count_for_qwen3() -> None:
    # Its processor asks for counts at two places in the middle of long functions, by these names.
    module = importlib.import_module("vllm.model_executor.models.qwen3_vl")
    method = asked()

    def count(tokens_per_frame: int, num_frames: int, q: float) -> int:
        return kept_count(method, num_frames, tokens_per_frame)

    name = "compute_retained_tokens_count"
    if not hasattr(module, name):
        raise UnsupportedError(
            f"vLLM's {module.__name__} has no {name}, which DyCoke replaces; install a tested "
            f"version: {', '.join(TESTED)}"
        )
    setattr(module, name, count)


def tell_the_cpu_runner() -> None:
    """vLLM's runner on a CPU loads a model without asking whether videos are pruned."""
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    except ImportError:  # A build without that platform's parts.
        return

    def ask(runner: Any) -> None:
        media = runner.model_config.multimodal_config
        runner.is_multimodal_pruning_enabled = bool(
            media is not None and media.is_multimodal_pruning_enabled()
        )

    _wrap(CPUModelRunner, "load_model", ask)


def _wrap(owner: Any, name: str, after: Any) -> None:
    """Have ``after(self)`` called when a method is done; once, however often a process asks."""
    stock = getattr(owner, name, None)
    if stock is None:
        raise UnsupportedError(
            f"vLLM's {owner.__name__} has no {name}, which DyCoke needs; install a tested version: "
            f"{', '.join(TESTED)}"
        )
    if getattr(stock, "dycoke", False):
        return

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        after(self)
        return result

    wrapped.dycoke = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
