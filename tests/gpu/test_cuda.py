"""On a CUDA device: the same tokens as on the CPU, on every backend there is."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import tiny
import torch
from support import close, compressed, exact, families, generate, in_float64, inputs_of, model_of
from test_rounding import MULTIPLE

from dycoke import DyCoke, methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    dtype = dtype or torch.get_default_dtype()
    return {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


@exact
@families
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_cpus_tokens_and_logits(family: str, backend: str) -> None:
    inputs = inputs_of(family, [[6], [6]], [(5, 7), (2, 3)], seed=7)
    expected, _ = compressed(model_of(family, backend, seed=7), DyCoke(), inputs)
    model = tiny.FAMILIES[family].model(backend, seed=7).cuda()
    output, _ = compressed(model, DyCoke(), on_cuda(inputs))
    assert torch.equal(output.sequences.cpu(), expected.sequences)
    close(torch.cat(output.logits).cpu(), torch.cat(expected.logits))


@exact
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "full"])
def test_every_method_keeps_the_same_tokens(family: str, name: str) -> None:
    inputs = inputs_of(family, [[6], [6]], [(5, 7), (2, 3)], seed=7)
    method = methods.create(name, retention=0.5)
    with method(model_of(family, seed=7), trace=True) as run:
        expected = generate(run._engine.model, inputs, tokens=4).sequences
    there = tiny.FAMILIES[family].model("sdpa", seed=7).cuda()
    with method(there, trace=True) as other:
        output = generate(there, on_cuda(inputs), tokens=4).sequences
    for a, b in zip(run.trace.samples, other.trace.samples, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.keep, b.keep, strict=True))
    assert torch.equal(output.cpu(), expected)


@families
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"
)
def test_flash_attention_with_nothing_to_drop(family: str) -> None:
    """Gapped positions and 2-D masks through the real kernel: the stock model's noise, no more."""
    with in_float64():
        inputs = inputs_of(family, [[6], [6]], [(5, 7), (2, 3)], seed=7)
        model = tiny.FAMILIES[family].model("sdpa", seed=7)
        true = generate(model, inputs, tokens=1).logits[0]
    model.set_attn_implementation("flash_attention_2")
    model, inputs = model.cuda().bfloat16(), on_cuda(inputs, torch.bfloat16)
    plain = generate(model, inputs, tokens=1).logits[0].cpu().double()
    output, _ = compressed(model, DyCoke(merge_ratio=0, prune_ratio=1e-9), inputs, tokens=1)
    noise = (plain - true).abs().max()
    assert (output.logits[0].cpu().double() - true).abs().max() < MULTIPLE * noise
