"""How models come: spread over devices, with quantised weights, compiled, in a pipeline."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import checkpoints
import clips
import pytest
import tiny
import torch
from support import close, compressed, exact, families, generate, inputs_of, model_of, untouched
from torch import nn
from transformers import pipeline

import dycoke
from dycoke import DyCoke, UnsupportedError
from dycoke.assistant import Assistant
from dycoke.models.locate import processor_options
from dycoke.video import read

pytestmark = exact
ONE = ([[7]], [(5, 7)])


def move(value: Any, device: str) -> Any:
    """Tensors of nested arguments on another device; caches stay where they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    return tuple(move(v, device) for v in value) if isinstance(value, tuple) else value


@families
@torch.no_grad()
def test_index_tensors_follow_each_layers_device(family: str) -> None:
    """The pruned layers stand on "meta", which refuses to be mixed with another device."""
    if family.endswith("moe"):
        pytest.skip("stock experts ask which tokens they got, and meta tensors hold no answer")
    model = tiny.FAMILIES[family].model("eager")
    inputs = inputs_of(family, [[6], [6]], [(5, 7), (2, 3)])  # padded, so that masks are needed
    decoder = model.get_decoder()
    upper = [*decoder.layers[3:], decoder.norm, model.lm_head]
    for module in upper:
        module.to("meta")
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (move(args, "meta"), move(kwargs, "meta")), with_kwargs=True
        )
    with DyCoke(refresh_threshold=1.0)(model) as run:
        out = model(**inputs)
        cache, mask = out.past_key_values, inputs["attention_mask"]
        for token in (3, 4, 5):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            ids = torch.full((2, 1), token)
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
    assert out.logits.device.type == "meta"
    rows = {i: layer.keys for i, layer in enumerate(cache.layers) if hasattr(layer, "keys")}
    assert set(rows) >= set(tiny.FAMILIES[family].full)
    assert all(keys.device.type == ("cpu" if i < 3 else "meta") for i, keys in rows.items())
    assert run.report is not None
    assert [s.refreshes for s in run.report.samples] == [2, 2]


@families
@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map(family: str, place: str, tmp_path: Path) -> None:
    """accelerate's hooks around every module; "disk" brings weights only while a layer runs."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.FAMILIES[family].model(), inputs_of(family, *ONE)
    expected, _ = compressed(model, DyCoke(), inputs)
    layers = list(model.get_decoder().layers)
    within = {id(m) for layer in layers for m in layer.modules()}
    names = {id(m): name for name, m in model.named_modules()}
    device_map = {n: "cpu" for n, m in model.named_modules() if id(m) not in within and n}
    device_map = {
        n: d for n, d in device_map.items() if not list(model.get_submodule(n).children())
    }
    device_map |= {names[id(m)]: place if i > 1 else "cpu" for i, m in enumerate(layers)}
    device_map |= {n: "cpu" for n, _ in model.named_parameters() if "layers" not in n}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    output, run = compressed(model, DyCoke(), inputs)
    assert torch.equal(output.sequences, expected.sequences)
    assert run.report is not None and run.report.engaged


class Int8Linear(nn.Module):
    """As quantised layers are: the weight's dtype says nothing of the activations'."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@families
def test_quantised_weights(family: str) -> None:
    model, inputs = tiny.FAMILIES[family].model(), inputs_of(family, *ONE)
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    plain = generate(model, inputs)
    output, _ = compressed(model, DyCoke(merge_ratio=0, prune_ratio=1e-9), inputs)
    assert torch.equal(output.sequences, plain.sequences)
    close(torch.cat(output.logits), torch.cat(plain.logits))
    _, run = compressed(model, DyCoke(), inputs)
    assert run.report is not None and run.report.engaged


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_a_compiled_model(way: str) -> None:
    family = "qwen2_5_vl"
    model, inputs = tiny.FAMILIES[family].model(layers=3), inputs_of(family, *ONE)
    settings = DyCoke(prune_layer=1)
    expected, _ = compressed(model, settings, inputs, tokens=3)
    if way == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    # A second shape of anything runs uncompiled here, since compiling takes long.
    with torch._dynamo.config.patch(recompile_limit=1):
        output, run = compressed(model, settings, inputs, tokens=3)
    assert torch.equal(output.sequences, expected.sequences)
    assert run.report is not None and run.report.engaged and run.report.decode_steps == 2


@pytest.mark.parametrize("family", checkpoints.CHECKPOINTS)
def test_the_pipeline_of_transformers(family: str, tmp_path: Path) -> None:
    """Decoded frames as chat content."""
    assistant = Assistant.load(checkpoints.CHECKPOINTS[family](tmp_path), device="cpu")
    model, processor = assistant.model, assistant.processor
    frames = read(clips.render(tmp_path / "clip.mp4", 20), 9).frames
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "what happens"}]
    chat = [{"role": "user", "content": content}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"do_sample_frames": False, **processor_options(model.config)}

    def ask() -> str:
        (answer,) = pipe(
            text=chat,
            max_new_tokens=6,
            return_full_text=False,
            generate_kwargs={"do_sample": False},
            processor_kwargs=options,
        )
        text: str = answer["generated_text"]
        return text

    plain = ask()
    with untouched(model):
        with DyCoke(merge_ratio=0, prune_ratio=0)(model):
            assert ask() == plain
        with DyCoke()(model) as run:
            answer = ask()
            piped = run.report
            inputs = processor.apply_chat_template(
                chat,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                processor_kwargs=options,
            )
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert piped is not None and piped.engaged and piped == run.report
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert answer.strip() == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_two_threads_cannot_both_apply() -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", *ONE)
    expected = compressed(model, DyCoke(merge_ratio=0.3), inputs)[0].sequences
    for _ in range(20):
        outcomes: list[Any] = []
        barrier = threading.Barrier(2)

        def work(ratio: float, outcomes: Any = outcomes, barrier: Any = barrier) -> None:
            barrier.wait(10)
            try:
                outcomes.append((ratio, dycoke.apply(model, DyCoke(merge_ratio=ratio))))
            except UnsupportedError as error:
                outcomes.append((ratio, error))

        threads = [threading.Thread(target=work, args=(ratio,)) for ratio in (0.3, 0.7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        dycoke.remove(model)
        runs = [(ratio, run) for ratio, run in outcomes if isinstance(run, dycoke.Run)]
        assert len(runs) == 1 and len(outcomes) == 2
    with untouched(model):
        run = dycoke.apply(model, DyCoke(merge_ratio=0.3))
        with pytest.raises(UnsupportedError, match="compressed already"):
            dycoke.apply(model, DyCoke())
        assert torch.equal(generate(model, inputs).sequences, expected)
        assert run.report is not None and run.report.settings["merge_ratio"] == 0.3
        dycoke.remove(model)
