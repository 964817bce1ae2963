"""What several test files share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import safetensors.torch  # noqa: F401  (its table of dtypes is made on import, see `in_float64`)
import standin
import tiny
import torch

from dycoke import Run
from dycoke.compressor import Compressor

torch.save(torch.zeros(1), io.BytesIO())  # torch keeps a table of dtypes from its first saving on

BACKENDS = ("sdpa", "eager", standin.NAME)

families = pytest.mark.parametrize("family", tiny.FAMILIES)
backends = pytest.mark.parametrize("backend", BACKENDS)

# Rounding must decide no test: neither whether a bound holds, nor which of two near-equal scores is
# the higher one, and processors, kernels and thread counts round differently. So tests of numbers
# run in float64 throughout (`pytestmark = exact`), where what rounding makes of a tiny model's
# logits is some 1e-13. `test_rounding.py` measures it, and that ROUNDING is far above.
exact = pytest.mark.usefixtures("float64")
ROUNDING = 1e-9


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """All computing in float64: also where the library or a stock model asks for float32.

    Stock models take norms, softmax and rotary angles in float32 whatever their weights are. Here
    the name stands for float64, so that nothing is rounded to 24 bits on the way.
    """
    single, widen = torch.float32, torch.Tensor.float
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = torch.float = single  # type: ignore[misc]
        torch.Tensor.float = widen  # type: ignore[method-assign]
        torch.set_default_dtype(before)


def model_of(family: str, backend: str = "sdpa", seed: int = 0, layers: int = 5) -> Any:
    """A tiny model of the default dtype; tests must leave it as they found it."""
    return _model_of(family, backend, seed, layers, torch.get_default_dtype())


@cache
def _model_of(family: str, backend: str, seed: int, layers: int, dtype: torch.dtype) -> Any:
    return tiny.FAMILIES[family].model(backend, seed=seed, layers=layers)


def inputs_of(family: str, videos: Any, text: Any, seed: int = 0) -> dict[str, Any]:
    return tiny.FAMILIES[family].inputs(videos, text, seed=seed)


def generate(model: Any, inputs: dict[str, Any], tokens: int = 8, **kwargs: Any) -> Any:
    """Greedy, with logits: .sequences (B, S + tokens), .logits (steps of (B, V))."""
    family = tiny.FAMILIES.get(model.config.model_type)
    if {"num_beams", "num_return_sequences"} & set(kwargs) and family and not family.repeats:
        pytest.skip(f"this transformers loses or mixes up the frames of {family.name}'s beams")
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **kwargs},
    )


def compressed(
    model: Any,
    settings: Compressor,
    inputs: dict[str, Any],
    tokens: int = 8,
    frame_source: Any = None,
    **kwargs: Any,
) -> tuple[Any, Run]:
    with settings(model, frame_source=frame_source) as run:
        return generate(model, inputs, tokens, **kwargs), run


def answer(output: Any, inputs: dict[str, Any]) -> list[list[int]]:
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@contextlib.contextmanager
def untouched(model: Any) -> Any:
    """Fails where a block leaves hooks or changed configs behind."""
    before = _marks(model)
    yield
    assert _marks(model) == before


def _marks(model: Any) -> list[Any]:
    """Whatever of ours could be left. transformers itself adds hooks and caches when first run."""
    return [
        (
            name,
            [h for h in module._forward_pre_hooks.values() if _is_ours(h)],
            [h for h in module._forward_hooks.values() if _is_ours(h)],
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            sorted(
                set(vars(module))
                & {"forward", "get_video_features", "get_image_features", "generate"}
            ),
        )
        for name, module in model.named_modules()
    ]


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("dycoke")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """``a`` is ``b`` but for rounding in float64, and to its own dtype, where it has another."""
    assert b.dtype == torch.float64
    last = 0.0 if a.dtype == b.dtype else torch.finfo(a.dtype).eps
    torch.testing.assert_close(a.double(), b, rtol=last, atol=ROUNDING)
