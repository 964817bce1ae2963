"""dycoke.vllm in vLLM's own engine on a CPU, against transformers with DyCoke(prune_ratio=0).

`make test-vllm` makes the environment; elsewhere these are skipped. An engine lives in a process
of its own (`vllm_process`), once per case; tokens must be equal, and log-probabilities as near as
those of the full model are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm_process
from numpy.typing import NDArray
from PIL import Image

from dycoke import DyCoke, nano
from dycoke.nano import stories

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
pytestmark = pytest.mark.timeout(900)

SCRATCH = tempfile.TemporaryDirectory(prefix="dycoke-vllm-")  # gone when the process ends
SETTINGS = {"merge_ratio": 0.7}
METHOD = DyCoke(prune_ratio=0, merge_ratio=SETTINGS["merge_ratio"])
FPS = 4.0
"""A Qwen2.5 frame's time is then one position: transformers and vLLM place the text behind a video
anew where its time is longer than its sides."""
NEW_TOKENS = 24
IMAGE_BEFORE = (
    ("<video>", "<image><video>"),
    ("<|vision_start|>", "<|vision_start|><|image_pad|><|vision_end|><|vision_start|>"),
)
MODELS = ("llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl")


def folder() -> Path:
    return Path(SCRATCH.name)


@cache
def checkpoint(name: str) -> Path:
    import vllm_checkpoints

    path: Path = getattr(vllm_checkpoints, name)(folder())
    return path


def clips(name: str) -> list[NDArray[np.uint8]]:
    """Two clips of a model: stories of nano's, noise that changes slowly for the random ones."""
    if name == "llava_onevision":
        return [stories.render(stories.make("seen", seed)) for seed in (8, 11)]
    side = 24 if name == "llava_next_video" else 48
    out = []
    for seed, frames in ((0, 12), (1, 10)):
        generator = np.random.default_rng(seed)
        base = generator.integers(0, 256, (1, side, side, 3))
        noise = generator.integers(-60, 60, (frames, side, side, 3))
        out.append(np.clip(base + noise, 0, 255).astype(np.uint8))
    return out


def rounds(name: str) -> list[list[int]]:
    """A request, again from the prefix cache, beside another, with two videos, with an image."""
    # vLLM takes one video and no image for LLaVA-NeXT-Video.
    return [[0], [0], [0, 1], *([] if name == "llava_next_video" else [[2], [3]])]


def question(name: str, number: int) -> str:
    """Long but for nano's second: blocks of the prefix cache, of up to 128 tokens, then hold the
    whole video, and vLLM keeps its pixels from the model."""
    if name == "llava_onevision":
        return " ".join(stories.DESCRIBE[:1] * (1 if number == 1 else 40))
    return "what happens " + " ".join(f"w{i}" for i in range(10, 88)) * 2


@cache
def requests(name: str) -> list[dict[str, Any]]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint(name))
    files = []
    for number, frames in enumerate(clips(name)):
        files.append(str(folder() / f"{name}-{number}.npy"))
        np.save(files[-1], frames)
    out = []
    image = str(folder() / f"{name}-image.npy")
    np.save(image, clips(name)[1][-1])
    some = [([0], []), ([1], []), ([1, 0], []), ([0], [image])]
    for number, (videos, images) in enumerate(some[: 2 if name == "llava_next_video" else 4]):
        text = {"type": "text", "text": question(name, number)}
        content = [*({"type": "video"} for _ in videos), text]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        if images:
            prompt = prompt.replace(*IMAGE_BEFORE[name.startswith("qwen")], 1)
        out.append(
            {
                "prompt": prompt,
                "videos": [files[v] for v in videos],
                "images": images,
                "max_tokens": NEW_TOKENS,
                "fps": FPS if name.startswith("qwen") else None,
            }
        )
    return out


@cache
def stock(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # The embedded model's own names; what vLLM reads has the hubs'.
    path = nano.path() if name == "llava_onevision" else checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


@cache
def oracle(name: str, number: int, compressed: bool) -> dict[str, Any]:
    """What transformers says to a request: its tokens, their log-probabilities, and how many
    tokens the decoder got."""
    from transformers.video_utils import VideoMetadata

    model, processor = stock(name)
    request = requests(name)[number]
    videos = [np.load(file) for file in request["videos"]]
    how: dict[str, Any] = {}
    if request["fps"]:
        how = {"do_sample_frames": False, "fps": FPS}
        how["video_metadata"] = [VideoMetadata(**vllm_process.times(len(v), FPS)) for v in videos]
    if request["images"]:
        how["images"] = [Image.fromarray(np.load(file)) for file in request["images"]]
    inputs = processor(text=[request["prompt"]], videos=videos, return_tensors="pt", **how)
    length = inputs["input_ids"].shape[1]

    def answer() -> dict[str, Any]:
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, length:]
        likely = torch.cat(out.logits).float().log_softmax(-1)
        return {
            "tokens": tokens.tolist(),
            "logprobs": likely.gather(1, tokens[:, None])[:, 0].tolist(),
            "prompt_tokens": length,
        }

    if not compressed:
        return answer()
    with METHOD(model) as run:
        said = answer()
    sample = run.report.samples[0]
    said["prompt_tokens"] -= sample.visual_tokens - sample.kept_tokens
    return said | {"kept": sample.kept_tokens}


def send(name: str, settings: dict[str, Any] | None, **engine: Any) -> Any:
    """vLLM's answers to `rounds`."""
    job = {
        "model": str(checkpoint(name)),
        "engine": engine,
        "requests": requests(name),
        "rounds": rounds(name),
        "ignore_eos": True,
    }
    return vllm_process.answers(job, settings)


@cache
def plain(name: str) -> Any:
    """Answers of a vLLM in which dycoke sleeps."""
    return send(name, None)


def distance(mine: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(mine["logprobs"], other["logprobs"], strict=True))


def each(name: str, answers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for numbers, said in zip(rounds(name), answers, strict=True):
        yield from zip(numbers, said, strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_asleep_unless_asked_for(name: str) -> None:
    """Then vLLM answers as transformers' full model does, which is what the others rest on."""
    for number, said in each(name, plain(name)):
        whole = oracle(name, number, compressed=False)
        assert said["prompt_tokens"] == whole["prompt_tokens"]
        assert said["tokens"] == whole["tokens"]


@pytest.mark.parametrize("engine", [{}, {"long_prefill_token_threshold": 40}], ids=["", "chunks"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(name: str, engine: dict[str, Any]) -> None:
    # Stock vLLM against stock transformers says how near is near.
    noise = [
        distance(said, oracle(name, number, compressed=False))
        for number, said in each(name, plain(name))
    ]
    answers = send(name, SETTINGS, **engine)
    for number, said in each(name, answers):
        expected = oracle(name, number, compressed=True)
        assert said["prompt_tokens"] == expected["prompt_tokens"]
        assert said["tokens"] == expected["tokens"]
        assert distance(said, expected) <= 10 * max(noise)
    # The second time all of the video comes from the prefix cache.
    again = answers[1][0]
    assert again["cached_tokens"] > oracle(name, 0, compressed=True)["kept"] + 16
    # And what DyCoke left out matters to what is said.
    assert any(
        oracle(name, n, True)["tokens"] != oracle(name, n, False)["tokens"]
        for n in range(len(requests(name)))
    )


def test_positions_survive_bfloat16() -> None:
    """Of 865 positions, bfloat16 holds those to 256; a story told in it is the same."""
    answers = send("llava_onevision", SETTINGS, dtype="bfloat16")
    _, processor = stock("llava_onevision")

    def told(tokens: list[int]) -> str:
        text: str = processor.decode(tokens).split("<|im_end|>")[0].strip()
        return text

    for number, said in each("llava_onevision", answers):
        if number == 1:
            expected = oracle("llava_onevision", number, compressed=True)
            assert told(said["tokens"]) == told(expected["tokens"])


@pytest.mark.parametrize("settings", [{"method": "evs", "ratio": 0.7}, {"token_budget": 0.3}])
def test_other_methods_whose_counts_follow_from_shapes(settings: dict[str, Any]) -> None:
    from dycoke.vllm.counts import kept_count, parse

    answers = send("llava_onevision", settings)
    method = parse(json.dumps(settings))
    frames, tokens = stories.FRAMES, 36
    gone = frames * tokens - kept_count(method, frames, tokens)
    whole = oracle("llava_onevision", 0, compressed=False)["prompt_tokens"]
    assert answers[0][0]["prompt_tokens"] == whole - gone
    assert answers[1][0]["tokens"] == answers[0][0]["tokens"]


def test_what_is_refused_says_so(tmp_path: Path) -> None:
    """An unknown model, and vLLM's own pruning beside ours."""
    import checkpoints

    script = (
        "import sys; from vllm.plugins import load_general_plugins as load; load()\n"
        "from vllm.config import ModelConfig, MultiModalConfig\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs(model=sys.argv[1], video_pruning_rate=float(sys.argv[2]) or None)"
        ".create_model_config()"
    )

    def refusal(path: Path, rate: float) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, str(path), str(rate)],
            capture_output=True,
            text=True,
            env=vllm_process.environment(SETTINGS),
        )
        assert done.returncode != 0
        return done.stderr

    unknown = refusal(checkpoints.internvl(tmp_path), 0)
    assert "does not know InternVL" in unknown
    assert "dycoke serve" in unknown
    both = refusal(checkpoint("qwen2_5_vl"), 0.5)
    assert "--video-pruning-rate 0.5 and DYCOKE_VLLM both say" in both


def test_over_http() -> None:
    """Two stories of equal shape, and the first again: no answer is taken for another's."""
    said = []
    seeds = (8, 11, 8)
    with vllm_process.server(checkpoint("llava_onevision"), SETTINGS) as port:
        for seed in seeds:
            clip = stories.write(stories.make("seen", seed), folder() / "story.mp4")
            body = vllm_process.about(clip, stories.FRAMES, new_tokens=64)
            answer = vllm_process.chat(port, body)
            said.append(answer["choices"][0]["message"]["content"].strip())
            kept = oracle("llava_onevision", 1, True)["prompt_tokens"]
            assert answer["usage"]["prompt_tokens"] == kept
    assert said[2] == said[0] != said[1]
    told = [
        stories.events_right(text, stories.make("seen", seed))
        for text, seed in zip(said, seeds, strict=True)
    ]
    assert min(told) > 0, said
