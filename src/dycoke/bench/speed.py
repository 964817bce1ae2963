"""Time and memory of methods, interleaved in one process, from the file to the last token."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dycoke import __version__, methods
from dycoke.assistant import GREEDY, Assistant, best_device
from dycoke.bench.arch import ARCHS, Arch
from dycoke.cache import kv_bytes
from dycoke.compressor import Compressor
from dycoke.costs import Shape, counted
from dycoke.models import Prompt, family_of
from dycoke.nano import stories
from dycoke.report import Report
from dycoke.timing import Stopwatch, Timings
from dycoke.video import Video, read

QUESTION = "Describe what happens in this video."
STAGES = tuple(field.name for field in fields(Timings))


class BenchError(Exception):
    """What was asked for cannot be measured here; the message names the way out."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    methods : names from `dycoke.methods`, in the order of the turns.
    arch : shapes to build with random weights; None for a checkpoint.
    model : directory or hub id of a checkpoint; None for the embedded model.
    video : a file; None for a rendered story.
    frames : frames to sample from it.
    new_tokens : tokens to generate, never fewer.
    repeat : measured turns; a turn runs every method once.
    batch : copies of the prompt in one batch.
    ratio : share of the visual tokens to remove; None for each method's own default.
    device : such as "cuda:1"; None for the best there is.
    attention : such as "flash_attention_2"; None for transformers' choice.

    Raises
    ------
    ValueError
        For an unknown method or device, with those there are; for a count below 1.
    """

    methods: tuple[str, ...]
    arch: Arch | None = None
    model: str | None = None
    video: str | None = None
    frames: int = 32
    new_tokens: int = 64
    repeat: int = 3
    batch: int = 1
    ratio: float | None = None
    device: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "new_tokens", "repeat", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.methods:
            raise ValueError(f"no method is named; there are {', '.join(methods.METHODS)}")
        for name in self.methods:
            methods.create(name, self.ratio)  # an error now, not after minutes
        if self.device is not None and self.device not in (known := devices()):
            raise ValueError(f"unknown device {self.device!r}; there are {', '.join(known)}")

    @property
    def place(self) -> str:
        return self.device or best_device()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        arch = plan["arch"] and Arch(**plan["arch"])
        return cls(**{**plan, "arch": arch, "methods": tuple(plan["methods"])})


def devices() -> list[str]:
    """Names of the devices of this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return names + ["mps"] * torch.backends.mps.is_available()


@dataclass
class Sample:
    """One generation.

    Attributes
    ----------
    timings : seconds per stage.
    kv_bytes : bytes of the cache's tensors after the last token.
    peak_bytes : most memory that torch held on a CUDA device, weights included; else None.
    report : what was compressed; None for the full model.
    frames, visual_tokens, prompt_tokens : of one row of the batch.
    """

    timings: Timings
    kv_bytes: int
    peak_bytes: int | None
    report: Report | None
    frames: int
    visual_tokens: int
    prompt_tokens: int


class Bench:
    """A model, and its inputs for a video.

    Parameters
    ----------
    plan : what to measure; the model is built or loaded here.

    Raises
    ------
    BenchError
        Where the model cannot be built or loaded.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.prepare: Callable[[Video], dict[str, Any]]
        try:
            if plan.arch is not None:
                arch = plan.arch
                self.model = arch.build(plan.place, plan.attention)
                self.prepare = lambda video: arch.inputs(self.model, video.frames)
            else:
                assistant = Assistant.load(plan.model, plan.place, attention=plan.attention)
                self.model = assistant.model
                self.prepare = lambda video: assistant.prepare(video, QUESTION)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            name = plan.arch.name if plan.arch else plan.model
            raise BenchError(f"cannot load the model {name!r}: {error}") from None

    @torch.inference_mode()
    def once(self, path: str, compressor: Compressor | None, new_tokens: int) -> Sample:
        """One generation, from the file at ``path`` on."""
        device, watch = self.model.device, Stopwatch(self.model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with watch.reading():
            video = read(path, self.plan.frames)
            inputs = {k: _repeated(v, self.plan.batch) for k, v in self.prepare(video).items()}
        with watch.compressing(compressor) as run:
            output = self.model.generate(
                **inputs,
                **GREEDY,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
        return Sample(
            timings=watch.timings,
            kv_bytes=kv_bytes(output.past_key_values),
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            report=None if run is None else run.report,
            frames=len(video.frames),
            visual_tokens=self._visual_tokens(inputs) // self.plan.batch,
            prompt_tokens=inputs["input_ids"].shape[1],
        )

    def _visual_tokens(self, inputs: dict[str, Any]) -> int:
        config = self.model.base_model.config
        prompt = Prompt(config, inputs["input_ids"], None, inputs, None)
        return sum(span.positions.numel() for span in family_of(config).layout(prompt))

    def measure(
        self, path: str, on_run: Callable[[int | None, str], None] | None = None
    ) -> dict[str, list[Sample]]:
        """Every method once per turn, A B A B; the warm-up before the first turn is left out.

        Parameters
        ----------
        path : the video.
        on_run : called with the turn (None for the warm-up) and the method before each run.

        Raises
        ------
        VideoError, UnsupportedError
            Where the file cannot be read, or a method cannot work on this model.
        BenchError
            Where memory runs out.
        """
        plan, tell = self.plan, on_run or (lambda *_: None)
        ready = {name: methods.create(name, plan.ratio) for name in plan.methods}
        samples: dict[str, list[Sample]] = {name: [] for name in ready}
        try:
            for name, compressor in ready.items():
                tell(None, name)
                self.once(path, compressor, min(2, plan.new_tokens))
            for turn in range(plan.repeat):
                for name, compressor in ready.items():
                    tell(turn, name)
                    samples[name].append(self.once(path, compressor, plan.new_tokens))
        except torch.OutOfMemoryError:
            raise BenchError(
                f"{plan.place} has too little memory for {name}; take fewer frames, a smaller "
                "batch, or fewer layers"
            ) from None
        return samples


def _repeated(value: Any, times: int) -> Any:
    """The same prompt and video ``times`` times in one batch."""
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value * times if isinstance(value, list) else value


@contextmanager
def clip(plan: Plan) -> Iterator[str]:
    """The plan's video as a file: its own, or a story rendered for as long as this lasts."""
    if plan.video is not None:
        yield plan.video
        return
    with tempfile.TemporaryDirectory() as folder:
        story = stories.make("seen", 0, frames=max(stories.FRAMES, plan.frames))
        yield str(stories.write(story, Path(folder) / "story.mp4"))


def results(bench: Bench, samples: Mapping[str, list[Sample]]) -> list[dict[str, Any]]:
    """One dictionary per method, ready for JSON; `compare` adds the ratios.

    ``stages`` holds medians in seconds, ``stages_min`` and ``stages_max`` their range, ``llm_s``
    the median of the total without video and vision encoder. Token counts are those of one prompt
    of the batch, ``flops`` is the paper's formula on them, over the whole batch.
    """
    table = []
    for name, runs in samples.items():
        times = [run.timings.to_dict() for run in runs]
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        row: dict[str, Any] = {"method": name, **_tokens(bench, runs[-1])}
        for key, take in (
            ("stages", statistics.median),
            ("stages_min", min),
            ("stages_max", max),
        ):
            row[key] = {stage: round(take([t[stage] for t in times]), 6) for stage in STAGES}
        llm = [t["total_s"] - t["video_s"] - t["vision_s"] for t in times]
        row["llm_s"] = round(statistics.median(llm), 6)
        row["kv_bytes"] = runs[-1].kv_bytes
        row["peak_bytes"] = max(peaks) if peaks else None
        table.append(row)
    return table


def _tokens(bench: Bench, sample: Sample) -> dict[str, Any]:
    """Settings and true counts of a run, and the FLOPs that follow from them."""
    text = bench.model.config.get_text_config()
    shape = Shape(text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    report, kept = sample.report, sample.visual_tokens
    active, refreshes = kept, 0
    if report is not None:
        first = report.samples[0]  # the batch repeats it
        kept, active, refreshes = first.kept_tokens, first.active_tokens, first.refreshes
    flops = counted(kept, active, shape, bench.plan.new_tokens)
    return {
        "settings": report.settings if report else {},
        "not_engaged": report.reason if report else None,
        "visual_tokens": sample.visual_tokens,
        "kept_tokens": kept,
        "active_tokens": active,
        "refreshes": refreshes,
        "flops": flops.total * bench.plan.batch,
    }


def compare(table: list[dict[str, Any]]) -> None:
    """Add ``vs_full`` to each row: how many times less than the full model; None without it."""
    full = next((row for row in table if row["method"] == "full"), None)
    for row in table:
        if full is None:
            row["vs_full"] = None
            continue
        mine, whole = ({**r["stages"], **{k: r[k] for k in SIZES}} for r in (row, full))
        row["vs_full"] = {
            key: round(whole[key] / mine[key], 3) if mine[key] and whole[key] else None
            for key in mine
            if key != "compress_s"  # the full model has none to compare with
        }


SIZES = ("llm_s", "kv_bytes", "peak_bytes", "flops")


def heading(bench: Bench, sample: Sample, command: str) -> dict[str, Any]:
    """What the results are about: shapes, machine and versions."""
    plan, model = bench.plan, bench.model
    text = model.config.get_text_config()
    cut = None
    if plan.arch is not None and plan.arch.layers != (whole := ARCHS[plan.arch.name].layers):
        cut = {
            "language": [plan.arch.layers[0], whole[0]],
            "vision": [plan.arch.layers[1], whole[1]],
        }
    return {
        "arch": plan.arch.name if plan.arch else model.config.model_type,
        "model": None if plan.arch else plan.model or "nano",
        "layers": text.num_hidden_layers,
        "layers_cut": cut,
        "frames": sample.frames,
        "new_tokens": plan.new_tokens,
        "batch": plan.batch,
        "repeat": plan.repeat,
        "ratio": plan.ratio,
        "prompt_tokens": sample.prompt_tokens,
        "visual_tokens": sample.visual_tokens,
        "video": plan.video or "a story rendered by dycoke.nano.stories",
        "device": str(model.device),
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
        "versions": {
            "dycoke": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "command": command,
    }


def hardware(device: torch.device) -> str:
    """The name of a device, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_of_process(plan: Plan, path: str, method: str) -> int | None:
    """Peak resident memory of a process that runs one method once, in bytes.

    Weights, libraries and interpreter are in it. None where the system does not tell, or, with a
    warning, where that process fails, as when memory runs out.
    """
    task = {"plan": plan.to_dict(), "path": path, "method": method}
    done = subprocess.run(
        [sys.executable, "-m", "dycoke.bench.peak"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        warnings.warn(f"the peak memory of {method} is unknown: {why}", stacklevel=2)
        return None
    peak: int | None = json.loads(done.stdout)
    return peak


def run(
    plan: Plan,
    path: str,
    command: str = "",
    on_run: Callable[[int | None, str], None] | None = None,
    peaks: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the plan on the video at ``path``: what it is about, and a row per method.

    ``peaks`` asks for peak memory on the CPU too, each in a process of its own. Raises what `Bench`
    and `Bench.measure` raise.
    """
    bench = Bench(plan)
    samples = bench.measure(path, on_run)
    head = heading(bench, samples[plan.methods[0]][-1], command)
    rows = results(bench, samples)
    on_cpu = bench.model.device.type == "cpu"
    del bench  # its weights should not crowd out the processes that come now
    if peaks and on_cpu:
        for row in rows:
            if on_run is not None:
                on_run(None, f"peak memory of {row['method']}")
            row["peak_bytes"] = peak_of_process(plan, path, row["method"])
    compare(rows)
    return head, rows
