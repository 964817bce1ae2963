"""`dycoke bench`: what runs when, what is counted, what comes out. Times are never asserted."""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dycoke import DyCoke, costs, methods, precision
from dycoke.bench import peak, plan, results, show, speed
from dycoke.bench.arch import ARCHS, Arch, _text
from dycoke.compressor import Compressor
from dycoke.core.method import VideoContext
from dycoke.timing import Stopwatch
from dycoke.vision.scores import Vision

LAYERS, FRAMES, TOKENS, NEW = 5, 9, 9, 4
TEXT = {
    **_text(32, 48, LAYERS, 4, 2, 96),
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
ONEVISION = Arch(
    "tiny",
    "llava_onevision",
    {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "image_token_index": 90,
        "video_token_index": 91,
    },
    {"size": {"height": 24, "width": 24}},
)
NEXT = Arch(
    "tiny-next",
    "llava_next_video",
    {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 90,
        "video_token_index": 91,
    },
    {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
)
QWEN = Arch(
    "tiny-qwen",
    "qwen2_5_vl",
    {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    {
        "size": {"shortest_edge": 16 * 16, "longest_edge": 24 * 24},
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
)
TIMINGS = [
    "decode_s",
    "process_s",
    "video_s",
    "vision_s",
    "compress_s",
    "prefill_s",
    "ttft_s",
    "per_token_s",
    "total_s",
]
HEAD = [
    "arch",
    "model",
    "layers",
    "layers_cut",
    "frames",
    "new_tokens",
    "batch",
    "repeat",
    "retention",
    "prompt_tokens",
    "visual_tokens",
    "video",
    "device",
    "hardware",
    "threads",
    "dtype",
    "attention",
    "versions",
    "command",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> str:
    return str(clips.render(tmp_path_factory.mktemp("clips") / "clip.mp4", 20))


@pytest.fixture(autouse=True)
def tiny_archs(monkeypatch: Any) -> None:
    for arch in (ONEVISION, NEXT, QWEN):
        monkeypatch.setitem(ARCHS, arch.name, arch)


@pytest.fixture(autouse=True)
def peaks(monkeypatch: Any) -> list[str]:
    """The methods whose peak was measured; in this process, since another takes long to start."""
    asked: list[str] = []

    def here(command: list[str], input: str, **_: object) -> Any:
        assert command == [sys.executable, "-m", "dycoke.bench.peak"]
        asked.append(json.loads(input)["method"])
        said = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(input))
            patch.setattr(sys, "stdout", said)
            peak.main()
        return subprocess.CompletedProcess(command, 0, said.getvalue(), "")

    monkeypatch.setattr(peak.subprocess, "run", here)
    return asked


def planned(*names: str, arch: Arch | None = ONEVISION, **settings: Any) -> plan.Plan:
    fixed = {"frames": FRAMES, "new_tokens": NEW, "repeat": 3, "device": "cpu"}
    return plan.Plan(names, arch, **{**fixed, **settings})


def test_methods_take_turns_after_a_warm_up(clip: str) -> None:
    order: list[str] = []
    samples = speed.Bench(planned("full", "dycoke")).measure(clip, order.append)
    turns = ("warm-up", "turn 1 of 3", "turn 2 of 3", "turn 3 of 3")
    assert order == [f"{turn}: {name}" for turn in turns for name in ("full", "dycoke")]
    assert [len(runs) for runs in samples.values()] == [3, 3]  # the warm-up is left out


def test_counts_and_bytes_are_those_of_the_run(clip: str) -> None:
    bench = speed.Bench(planned("full", "dycoke", repeat=1, batch=2))
    rows = results.method_results(bench, bench.measure(clip))
    full, ours = rows
    visual = FRAMES * TOKENS
    kept, active = 3 * TOKENS + 6 * 2, 11  # int(.3 x 9) = 2 of a frame, int(.3 x 39) = 11
    assert [r["visual_tokens"] for r in rows] == [visual, visual]
    assert (full["kept_tokens"], full["active_tokens"]) == (visual, visual)
    assert (ours["kept_tokens"], ours["active_tokens"]) == (kept, active)
    # 2 samples; 30 tokens of text, a newline, and all new ones but the last; keys and values in
    # float32, of 2 heads 8 wide.
    row = 2 * 2 * 2 * 8 * 4
    assert full["kv_bytes"] == LAYERS * (visual + 31 + NEW - 1) * row
    assert LAYERS * (kept + 31 + NEW - 1) * row <= ours["kv_bytes"]
    assert ours["kv_bytes"] <= LAYERS * (kept + 31 + 64) * row
    shape = costs.Shape(32, 48, LAYERS)
    assert ours["flops"] == 2 * costs.counted(kept, active, shape, NEW).total
    assert full["flops"] == 2 * costs.flops(visual, 32, 48, LAYERS, new_tokens=NEW).total
    assert ours["settings"] == DyCoke().to_dict()


def test_flops_follow_the_layers(clip: str) -> None:
    """A method that drops inside the LLM: each layer costs what it holds."""
    bench = speed.Bench(planned("fastv", "visionzip+dycoke", repeat=1, retention=0.5))
    dropped, composed = results.method_results(bench, bench.measure(clip))
    visual, left = FRAMES * TOKENS, dropped["active_tokens"]
    assert dropped["kept_tokens"] == visual and 0 < left < visual // 2
    layer = costs.Shape(32, 48, 1)
    naive = sum(costs.counted(n, n, layer, NEW).total for n in [visual] + [left] * (LAYERS - 1))
    assert dropped["flops"] == pytest.approx(naive)
    kept, active = composed["kept_tokens"], composed["active_tokens"]
    assert (kept, active) == (FRAMES * 4, int(0.3 * FRAMES * 4))
    assert composed["flops"] == costs.counted(kept, active, costs.Shape(32, 48, 5), NEW).total


def test_scores_of_the_vision_encoder_are_compression(clip: str, monkeypatch: Any) -> None:
    """A clock that only three places move on: what each stage is told of them."""
    bench = speed.Bench(planned("visionzip", repeat=1))
    clock = [0.0]
    monkeypatch.setattr(Stopwatch, "now", lambda self: clock[0])

    def taking(seconds: float, inner: Any) -> Any:
        @functools.wraps(inner)
        def taken(*args: Any, **kwargs: Any) -> Any:
            clock[0] += seconds
            return inner(*args, **kwargs)

        return taken

    base = bench.model.base_model
    monkeypatch.setattr(base, "get_video_features", taking(1000, base.get_video_features))
    monkeypatch.setattr(Vision, "note", taking(100, Vision.note))
    monkeypatch.setattr(Vision, "pool", taking(10, Vision.pool))
    timings = bench.once(clip, methods.create("visionzip", retention=0.5), 3).timings
    assert (timings.vision_s, timings.compress_s) == (1000, 110)
    assert timings.ttft_s == timings.total_s == 1110


@pytest.mark.parametrize("arch", [NEXT, QWEN], ids=lambda arch: arch.name)
def test_every_family_runs_from_pixels(clip: str, arch: Arch) -> None:
    plan = planned("full", "dycoke", arch=arch, repeat=1, batch=2, frames=8, dtype="bfloat16")
    bench = speed.Bench(plan)
    assert bench.model.dtype == torch.bfloat16
    samples = bench.measure(clip)
    report = samples["dycoke"][0].report
    assert report is not None and report.engaged
    assert [s.visual_tokens for s in report.samples] == [samples["full"][0].visual_tokens] * 2


def test_a_plans_number_format_follows_the_processor(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset({"avx512_bf16"}))
    chosen = [
        planned("full", **how).number_format.dtype
        for how in (
            {},
            {"dtype": "float32"},
            {"arch": None},
            {"arch": None, "model": "some/hub-id"},
        )
    ]
    assert chosen == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert speed.Bench(planned("full")).model.dtype == torch.bfloat16


def test_settings_are_measured_beside_the_methods_without_them(clip: str, peaks: Any) -> None:
    given = {"skip_ratio": 0.6, "skip_layer": 1}
    names = ("full", "dycoke", "fastv", "dycoke+")
    made = planned(*names, settings=given, repeat=1, retention=None)
    head, rows = results.measure(made, clip)
    lines = ["full", "dycoke", "dycoke skip 0.6 at 1", "fastv", "dycoke+", "dycoke+ skip 0.6 at 1"]
    assert [row["method"] for row in rows] == lines == list(made.lines()) == peaks
    by_name = {row["method"]: row for row in rows}
    for name in ("dycoke", "dycoke+"):
        plain, skipping = (by_name[n] for n in (name, f"{name} skip 0.6 at 1"))
        assert {**plain["settings"], **given} == skipping["settings"]
        assert plain["encoded_tokens"] == plain["visual_tokens"] == FRAMES * TOKENS
        # Of a frame that is no anchor int(.4 x 9) = 3 tokens are computed, behind a cut all 9.
        more, left_out = divmod(skipping["encoded_tokens"] - (3 * TOKENS + 6 * 3), TOKENS - 3)
        assert 0 <= more < 6 and not left_out
        assert skipping["kept_tokens"] == plain["kept_tokens"]
    screen = Console(width=80, file=io.StringIO())
    for table in show.speed_tables(head, rows):
        assert set(lines) <= set(table.columns[0].cells)
        screen.print(table)
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed and "skip 0.6" in printed and "process" in printed


def test_medians_least_and_most() -> None:
    bench = speed.Bench(planned("full", "dycoke"))
    report = None
    samples = {
        name: [
            speed.Sample(
                speed.Timings(0.5, 0.5, 1, 2, 0, 4, ttft_s=6, per_token_s=t, total_s=10 * t),
                kv_bytes=100 * factor, peak_bytes=10 * int(t), report=report,
                frames=1, visual_tokens=9, prompt_tokens=40,
            )
            for t in times
        ]
        for name, times, factor in (("full", (4.0, 2.0, 9.0), 3), ("dycoke", (2.0, 1.0, 3.0), 1))
    }  # fmt: skip
    rows = results.method_results(bench, samples)
    results.compare(rows)
    full, ours = rows
    assert [full[k]["total_s"] for k in ("stages", "stages_min", "stages_max")] == [40, 20, 90]
    assert ours["stages"]["per_token_s"] == 2 and ours["llm_s"] == 17
    assert (full["peak_bytes"], ours["peak_bytes"]) == (90, 30)
    assert ours["vs_full"]["total_s"] == 2 and ours["vs_full"]["kv_bytes"] == 3
    assert ours["vs_full"]["ttft_s"] == ours["vs_full"]["flops"] == 1
    assert set(full["vs_full"].values()) == {1.0}
    results.compare(rows[1:])
    assert ours["vs_full"] is None  # nothing to compare with
    assert show.speed_tables({**results.heading(bench, samples["full"][0], "")}, rows)


def test_stacked_bars_show_the_stages() -> None:
    stages = dict(zip(TIMINGS, (0.75, 0.25, 1.0, 2.0, 0.5, 3.0, 5.5, 0.1, 10.0), strict=True))
    row = {"method": "a", "stages": stages, "stages_min": stages, "stages_max": stages}
    row |= {"vs_full": None}
    assert show.parts(row) == {
        "video": 0.75, "processor": 0.25, "vision encoder": 2.0, "compression": 0.5,
        "prefill": 3.0, "decoding": 3.5,
    }  # fmt: skip
    half = {key: value / 2 for key, value in stages.items()}
    short = {**row, "method": "b", "stages": half, "stages_min": half, "stages_max": half}
    head = {"arch": "x", "model": None, "frames": 1, "visual_tokens": 9, "new_tokens": 4,
            "batch": 1, "dtype": "bfloat16", "hardware": "y", "device": "cpu", "threads": 1,
            "layers_cut": {"language": [2, 24], "vision": [26, 26]}}  # fmt: skip
    assert "CUT to 2 of 24 language layers" in " ".join(show.title(head))
    image = np.asarray(show.bars(head, [row, short]))
    width = []
    for i in range(2):
        y = len(image) - show.MARGIN - (2 - i) * (show.BAR + show.GAP) + 2  # above the whisker
        drawn = [(image[y] == colour).all(-1).sum() for colour in show.STAGE_COLOURS.values()]
        width.append(drawn)
        whole = sum(drawn)
        for pixels, seconds in zip(drawn, show.parts(row).values(), strict=True):
            assert pixels == pytest.approx(whole * seconds / 10, abs=3)
    assert sum(width[0]) == pytest.approx(2 * sum(width[1]), abs=6)


def test_the_command(run: Any, clip: str, tmp_path: Path, peaks: list[str]) -> None:
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code, out, err = run("bench", "--arch", "tiny", "--frames", FRAMES, "--new-tokens", NEW,
                         "--repeat", 1, "--methods", "full, once,dycoke", "--layers", 4,
                         "--retention", 0.7, "--device", "cpu", "--video", clip,
                         "--json", file, "--picture", picture)  # fmt: skip
    assert code == 0, err
    last = out.splitlines()[-1]
    content = json.loads(last)
    assert content == json.loads(file.read_text())
    assert [key for key in content if key != "results"] == HEAD
    assert (content["arch"], content["frames"], content["device"]) == ("tiny", FRAMES, "cpu")
    assert content["layers_cut"] == {"language": [4, 5], "vision": [2, 2]}
    assert content["command"].startswith("dycoke bench --arch tiny")
    assert content["prompt_tokens"] == FRAMES * TOKENS + 31
    assert [r["method"] for r in content["results"]] == ["full", "once", "dycoke"] == peaks
    for result in content["results"]:
        assert {"method", "stages", "kv_bytes", "peak_bytes", "flops", "vs_full"} <= set(result)
        for key in ("stages", "stages_min", "stages_max"):
            assert list(result[key]) == TIMINGS
        assert result["peak_bytes"] > 0
        assert set(TIMINGS) - {"compress_s"} <= set(result["vs_full"])
    assert content["results"][1]["settings"]["token_budget"] == 0.7
    words = " ".join(out.split())
    for word in ("least", "most", "vs full", "TTFT", "CUT to 4 of 5 language", "random weights"):
        assert word in words
    assert Image.open(picture).format == "PNG"


def test_the_embedded_model_and_a_rendered_story(run: Any, tmp_path: Path) -> None:
    code, out, err = run("bench", "--frames", 30, "--new-tokens", 1, "--repeat", 1, "--no-peak",
                       "--methods", "dycoke", "--device", "cpu",
                       "--picture", tmp_path / "b.png")  # fmt: skip
    assert code == 0
    content = json.loads(out.splitlines()[-1])
    assert (content["model"], content["frames"]) == ("nano", 30)
    assert content["dtype"] == "float32" and "number format: float32 (the embedded model)" in err
    assert content["video"] == "a story rendered by dycoke.nano.stories"
    assert content["results"][0]["vs_full"] is content["results"][0]["peak_bytes"] is None
    assert content["results"][0]["stages"]["per_token_s"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--arch", "gpt"), "unknown architecture 'gpt'; there are llava-onevision-0.5b, "),
        (("--methods", "full,nothing"), "unknown method 'nothing'; there are full, dycoke, "),
        (("--methods", ","), "no method is named; there are full, dycoke, "),
        (("--device", "abacus"), "unknown device 'abacus'; there are cpu"),
        (("--dtype", "float99"), "unknown dtype 'float99'; try bfloat16, float16, float32"),
        (
            ("--methods", "full,fastv", "--skip-ratio", "0.5"),
            "skip_ratio: none of full, fastv has such settings",
        ),
        (("--skip-ratio", "0.9"), "skip_ratio=0.9 must not be above merge_ratio=0.7"),
        (("--skip-ratio", "0.5", "--retention", "0.5"), "leaves out what merge_ratio drops"),
        (("--echo", "2"), "echo must be in [0, 1], got 2"),
        (("--retention", "0"), "retention must be in (0, 1], got 0"),
        (("--retention", "30"), "retention must be in (0, 1], got 30; did you mean 0.3?"),
        (("--ratio", "0.3"), "--ratio is now --retention, the share of the visual tokens that"),
        (("--arch", "tiny", "--layers", "9"), "layers must be in 1 to 5, got 9"),
        (("--arch", "tiny", "--vision-layers", "0"), "vision layers must be in 1 to 2, got 0"),
        (("--arch", "tiny", "--layers", "3"), "prune_layer=3 leaves no layer to prune"),
        (("--layers", "3"), "--layers and --vision-layers cut random weights only"),
        (("--arch", "tiny", "--model", "x"), "--arch and --model exclude each other"),
        (("--arch", "tiny", "--video", "none.mp4"), "none.mp4"),
        (("--arch", "tiny", "--attention", "magic"), "cannot load the model 'tiny'"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--json", "/no/such/folder/x.json"), "/no/such/folder/x.json"),
        (("--repeat", "0"), "--repeat"),
    ],
)
def test_bad_input_is_one_line(
    run: Any,
    clip: str,
    tmp_path: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    usual = {"--video": clip, "--picture": str(tmp_path / "b.png"), "--frames": "2"}
    rest = [word for name, value in usual.items() if name not in args for word in (name, value)]
    code, out, err = run("bench", *args, *rest)
    lines = [line for line in err.splitlines() if line.startswith("dycoke: ")]
    assert code == 2 and out == ""
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_memory_running_out_is_told(monkeypatch: Any, clip: str) -> None:
    bench = speed.Bench(planned("full", "dycoke"))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.model, "generate", full)
    with pytest.raises(speed.BenchError, match="cpu has too little memory for full"):
        bench.measure(clip)


def test_a_process_that_fails_leaves_its_peak_open(monkeypatch: Any, clip: str) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: too much")
    monkeypatch.setattr(peak.subprocess, "run", lambda *_, **__: failed)
    with pytest.warns(UserWarning, match="peak memory of full is unknown: MemoryError"):
        assert peak.peak_of_process(planned("full"), clip, "full") is None


def test_plans_travel_as_json() -> None:
    there = planned("full", "dycoke", arch=QWEN, retention=0.5)
    assert plan.Plan.from_dict(json.loads(json.dumps(there.to_dict()))) == there


def test_the_papers_flops(run: Any) -> None:
    code, out, _ = run("bench", "--check-paper")
    assert code == 0
    for figure in ("41.4 (41.4)", "24.2 (24.1)", "17.9 (17.9)", "197.2 (195.1)", "1.3 (1.2)"):
        assert figure in out
    assert run("flops")[1] == out


def test_methods_are_listed(run: Any) -> None:
    code, out, _ = run("methods")
    assert code == 0
    assert all(name in out for name in methods.METHODS)
    where = {name: entry.where for name, entry in methods.METHODS.items()}
    assert where["full"] == [] and where["dycoke"] == ["before", "decoding"]
    assert where["fastv"] == ["inside"] and where["vidcom2"] == ["before"]
    assert where["holitom"] == ["before", "vision", "inside"]


def held(method: Compressor, features: torch.Tensor) -> float:
    """Visual tokens that a method holds before it decodes, a mean over 28 layers."""
    clip = VideoContext(
        torch.rand(features.shape[:2]), torch.randn(*features.shape[:2], 6), grid=(3, 4)
    )
    features, keep = method.merge_tokens(features, clip)
    states, layer = features[keep], method.drop_layer(28)
    if layer is None:
        return len(states)
    below = layer / 28
    later = method.drop_tokens(torch.rand(len(states)), states, below)[1]
    return below * len(states) + (1 - below) * int(later.sum())


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "full"])
def test_a_method_by_name_and_retention(name: str) -> None:
    default, half = methods.create(name), methods.create(name, retention=0.5)
    assert default is not None and half is not None
    # Each method has its own rounding; all are within one token of a frame.
    assert abs(held(half, torch.randn(8, 12, 4)) - 48) <= 8
    nothing = methods.create(name, retention=1)
    assert nothing is not None and held(nothing, torch.randn(8, 12, 4)) == 96
    assert methods.create("full") is methods.create("full", retention=0.5) is None
    with pytest.raises(ValueError, match=f"{re.escape(name)}: retention must be in"):
        methods.create(name, retention=1.1)
